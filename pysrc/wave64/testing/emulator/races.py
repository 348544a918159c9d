"""Accesses whose order is not defined: two waves of a workgroup touch the same bytes of LDS between two barriers, and
one of them not only to read; or two lanes store different values to the same bytes of memory with one instruction.

Stores of the same value do no harm, and are not reported. In memory only the lanes of one instruction are held against
each other: which waves and workgroups synchronize there, by atomics and flags, no check knows. In LDS lanes of a wave
are not: where several hold one sum, each added up in another order, Triton stores all to one address; the last stays.
So waves that hold the same are held against each other by what the last lane of each stores: an instruction's lanes are
ordered alike in all waves, and which wave is the last makes no difference.
"""

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.lanes import ATOMIC, READ, WRITE, active
from wave64.testing.emulator.memory import EmulationError, Space
from wave64.testing.emulator.watch import Check

#: what another wave may not have done with the same bytes
AGAINST = {READ: WRITE | ATOMIC, WRITE: READ | WRITE | ATOMIC, ATOMIC: READ | WRITE}
VERB = {READ: "reads", WRITE: "writes", ATOMIC: "changes"}


class Accesses:
    """Who did one kind of thing with each byte of LDS since the last barrier: the first wave and the last one, counted
    from 1; 0: none. They differ where there are several."""

    def __init__(self, size: int):
        self.first, self.last = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def by_others(self, octets: np.ndarray, waves: np.ndarray) -> np.ndarray:
        """Where waves other than `waves` did it. Places count units of as many bytes as a number of `waves` has."""
        unit = waves.dtype
        last = self.last.view(unit)[octets]
        if not last.any():
            return np.zeros(len(octets), bool)
        return (last != 0) & ((last != waves) | (self.first.view(unit)[octets] != waves))

    def note(self, octets: np.ndarray, waves: np.ndarray) -> None:
        first, last = self.first.view(waves.dtype), self.last.view(waves.dtype)
        before = first[octets]
        first[octets] = np.where(before == 0, waves, before)
        last[octets] = waves
        lost = np.flatnonzero(last[octets] != waves)  # several waves at once: one of them is the last
        first[octets[lost]] = waves[lost]

    def other(self, octet: int, wave: int) -> int:
        """A wave other than `wave` that accessed a byte so; 0: no wave."""
        return next((int(by[octet]) for by in (self.last, self.first) if by[octet] not in (0, wave)), 0)


#: Numbers of 8, 4, 2 bytes, and of each the ones of which every byte is 1.
UNITS = {8: np.uint64(0x0101010101010101), 4: np.uint32(0x01010101), 2: np.uint16(0x0101), 1: np.uint8(1)}


class SharedMemory(Check):
    """Keeps, for every byte of LDS, which waves of the workgroup did what with it since the last barrier. Waves that
    write the same value to the same place do no harm."""

    def __init__(self, machine):
        super().__init__(machine)
        size = machine.shape.groups * machine.lds_stride
        self.accesses = {kind: Accesses(size) for kind in (READ, WRITE, ATOMIC)}
        self.after = np.zeros(size, np.uint8)  # what an instruction's stores leave
        self.atomics = np.zeros(1, bool)       # whether there were any
        self.dirty = np.zeros(-(-size // 256) + 1, bool)  # by 256 bytes, where the accesses may not be all 0

    def start(self) -> None:
        for by in self.accesses.values():
            by.first.fill(0)
            by.last.fill(0)
        self.dirty.fill(False)
        self.atomics.fill(False)

    def met(self, groups: np.ndarray) -> None:
        for by in self.accesses.values():
            by.first.reshape(self.machine.shape.groups, -1)[groups] = 0
            by.last.reshape(self.machine.shape.groups, -1)[groups] = 0

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        if self.machine.shape.waves == 1 or not offsets.size:
            return
        wave = active(b, (b.party.numbers % self.machine.shape.waves + 1)[:, None]).astype(np.uint8)
        self.atomics[0] |= access == ATOMIC
        self.dirty[offsets >> 8] = self.dirty[offsets + width - 1 >> 8] = True
        if access == READ and self._read(offsets, width, wave):
            return
        wave = np.repeat(wave, width)
        octets = (offsets[:, None] + np.arange(width)).reshape(-1)
        clash = self._others(octets, wave, AGAINST[access])
        self.accesses[access].note(octets, wave)
        if words is not None:
            new = np.ascontiguousarray(words).view(np.uint8).reshape(len(offsets), -1)[:, :width].reshape(-1)
            self.after[octets] = new
            clash &= np.where(self.machine.lds.u8[octets] == new, READ | ATOMIC, 0xFF).astype(np.uint8)
            clash |= np.where(self.after[octets] == new, 0, self._others(octets, wave, WRITE)).astype(np.uint8)
            if clash.any():
                clash[~_stays(octets, wave)] = 0
        if clash.any():
            self._report(octets, wave, int(np.flatnonzero(clash)[0]), access, clash)

    def _read(self, offsets: np.ndarray, width: int, wave: np.ndarray) -> bool:
        """Notes a read of bytes not written since the last barrier, several at a time; False: it is another."""
        aligned = int(np.bitwise_or.reduce(offsets)) | width | 8
        size = aligned & -aligned
        octets, unit = ((offsets // size)[:, None] + np.arange(width // size)).reshape(-1), UNITS[size]
        for kind in (WRITE, ATOMIC):
            if self.accesses[kind].last.view(unit.dtype)[octets].any():
                return False
        before = self.accesses[READ].first.view(unit.dtype)[octets]
        if ((before != 0) & ((before - unit & ~before & unit * 128) != 0)).any():
            return False  # some bytes of a number were read before, and some were not
        self.accesses[READ].note(octets, np.repeat(wave * unit, width // size))
        return True

    def _others(self, octets: np.ndarray, wave: np.ndarray, kinds: int) -> np.ndarray:
        """What of `kinds` waves other than `wave` did at `octets`, all of them together."""
        found = np.zeros(len(octets), np.uint8)
        for kind, by in self.accesses.items():
            if kind & kinds:
                found[by.by_others(octets, wave)] |= kind
        return found

    def _report(self, octets: np.ndarray, wave: np.ndarray, first: int, access: int, clash: np.ndarray) -> None:
        octet, mine = int(octets[first]), int(wave[first])
        others = {kind: by.other(octet, mine) for kind, by in self.accesses.items()}
        other = next(others[kind] for kind in others if kind & clash[first])
        kinds = [VERB[kind] for kind in others if other in (self.accesses[kind].first[octet],
                                                            self.accesses[kind].last[octet])]
        raise EmulationError(
            f"wave {mine - 1} {VERB[access]} byte {octet % self.machine.lds_stride} of LDS, which wave {other - 1} "
            f"{' and '.join(kinds)}, with no barrier between")


def _stays(octets: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Which of an instruction's stores to bytes are the last of their wave to theirs."""
    keys = octets.astype(np.int64) << 8 | wave
    _, from_the_end = np.unique(keys[::-1], return_index=True)
    last = np.zeros(len(keys), bool)
    last[len(keys) - 1 - from_the_end] = True
    return last


class OneValue(Check):
    """Looks at what a store leaves: another value than a lane stored is another lane's, and on hardware it may be this
    one's that stays."""

    def stored(self, b: Binding, space: Space, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
        other = space.load(offsets, width) != words
        if other.any():
            lane, word = np.argwhere(other)[0]
            raise EmulationError(f"lanes store different values to the same place: 0x{int(words[lane, word]):x}, and "
                                 f"0x{int(space.load(offsets[lane:lane + 1], width)[0, word]):x} that stays")
