"""Accesses whose order nobody says: two waves of a workgroup touch the same bytes of LDS between two barriers, one of
them not only to read; or two lanes store different values to the same bytes of memory with one instruction.

Stores of the same value do no harm, and are not reported. In memory only the lanes of one instruction are held against
each other: which waves and workgroups synchronize there, by atomics and flags, no check knows. In LDS lanes of a wave
are not: where several hold one sum, each added up in another order, Triton stores all to one place, and the last stays.
"""

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.lanes import ATOMIC, READ, WRITE, active
from wave64.testing.emulator.memory import EmulationError, Space
from wave64.testing.emulator.watch import Check

#: what another wave may not have done with the same bytes
AGAINST = {READ: WRITE | ATOMIC, WRITE: READ | WRITE | ATOMIC, ATOMIC: READ | WRITE}
VERB = {READ: "reads", WRITE: "writes", ATOMIC: "changes"}


class SharedMemory(Check):
    """Keeps, for every byte of LDS, what each wave of the workgroup did with it since the last barrier. Waves that
    write the same value to the same place do no harm."""

    def __init__(self, machine):
        super().__init__(machine)
        shape = machine.shape
        self.accesses = np.zeros((shape.groups * machine.lds_stride, shape.waves), np.uint8)
        self.after = np.zeros(shape.groups * machine.lds_stride, np.uint8)  # what an instruction's stores leave

    def start(self) -> None:
        self.accesses.fill(0)

    def met(self, groups: np.ndarray) -> None:
        self.accesses.reshape(self.machine.shape.groups, -1)[groups] = 0

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        if self.machine.shape.waves == 1 or not offsets.size:
            return
        wave = np.repeat(active(b, (b.party.numbers % self.machine.shape.waves)[:, None]), width)
        places = (offsets[:, None] + np.arange(width)).reshape(-1)
        before = self._others(places, wave)
        self.accesses[places, wave] |= access
        clash = before & AGAINST[access]
        if words is not None:
            new = np.ascontiguousarray(words).view(np.uint8).reshape(len(offsets), -1)[:, :width].reshape(-1)
            self.after[places] = new
            clash &= np.where(self.machine.lds.u8[places] == new, READ | ATOMIC, 0xFF).astype(np.uint8)
            clash |= np.where(self.after[places] == new, 0, self._others(places, wave) & WRITE).astype(np.uint8)
        if clash.any():
            self._report(places, wave, int(np.flatnonzero(clash)[0]), access, clash)

    def _others(self, places: np.ndarray, wave: np.ndarray) -> np.ndarray:
        """What waves other than `wave` did at `places`, all of them together."""
        rows = self.accesses[places]
        rows[np.arange(len(rows)), wave] = 0
        return np.bitwise_or.reduce(rows, axis=1)

    def _report(self, places: np.ndarray, wave: np.ndarray, first: int, access: int, clash: np.ndarray) -> None:
        row = self.accesses[places[first]].copy()
        row[wave[first]] = 0
        other = int(np.flatnonzero(row & clash[first])[0])
        kinds = [VERB[kind] for kind in (READ, WRITE, ATOMIC) if row[other] & kind]
        raise EmulationError(
            f"wave {wave[first]} {VERB[access]} byte {int(places[first]) % self.machine.lds_stride} of LDS, which wave "
            f"{other} {' and '.join(kinds)}, with no barrier between")


class OneValue(Check):
    """Looks at what a store leaves: another value than a lane stored is another lane's, and on hardware it may be this
    one's that stays."""

    def stored(self, b: Binding, space: Space, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
        other = space.load(offsets, width) != words
        if other.any():
            lane, word = np.argwhere(other)[0]
            raise EmulationError(f"lanes store different values to the same place: 0x{int(words[lane, word]):x}, and "
                                 f"0x{int(space.load(offsets[lane:lane + 1], width)[0, word]):x} that stays")
