"""Who sees a store when: caches and stores on their way, as the memory model of gfx942 and gfx950 leaves them.

Four views of memory lie behind each other: the first-level cache of a workgroup's compute unit, the second-level cache
of its die (a device has eight), the device's, and memory itself, which is the system's. A load takes the nearest view
that has the line, stale or not; a store is on its way until a wait, and then reaches a view. How far loads look and
stores go, and what makes views equal, is said by the bits sc0 and sc1:

                  load looks past             store reaches     buffer_wbl2 writes back    buffer_inv drops
    neither       nothing                     the die           -                          -
    sc0           the first level             the die           -                          the first level
    sc1           the first level             the device        the die's to the device    and what the die has stale
    sc0 sc1       to memory                   memory            and the device's on        and what the device has

Atomics act on the device's view, with sc1 on memory. What a die or device may have stale follows from the kind of
memory: lines of its own device's memory are dropped when another store reaches where they come from; those of another
device's stay. Uncached memory is written through at home and read past the caches from elsewhere. A barrier and a wait
make no view equal to another. Nothing is ever late for the wave that stored it. (AMDGPU usage guide, "Memory Model
gfx942"; AMD's MI300 ISA manual, chapter 9.)

A store arrives in pieces: of a line that one instruction writes whole, its 128 bytes at once, of others aligned 8
bytes. The first is what LL128 protocols rest on, RCCL's too, on gfx942 within a node; without `whole_lines` it is not
so.

When what need not happen happens is drawn: stores on their way arrive in any order, lines are written back or dropped,
or, in most schedules, not until something asks for it. So a protocol that owes something to this model is seen to fail
in most schedules, and one that owes nothing never fails. Loads, too, may look later than where they stand, until a wait
for them. Scalar loads see memory itself.
"""

import ctypes
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wave64.testing.emulator.memory import Buffer

LINE = 128   # bytes of a line
DIES = 8     # of a device: workgroups go to them in turn
PIECE = 8    # bytes of a store that are never torn
TORN = 1 / 2  # of stores of several pieces, those that arrive in two parts
LAZY = 0.98  # of schedules, those in which nothing happens before it must
NOWHERE = np.zeros(0, np.int64)
SYSTEM, DEVICE, DIE = "system", "device", "die"


@dataclass(frozen=True)
class DeviceBuffer(Buffer):
    """A buffer with the device whose memory it is in, and whether it was allocated uncached."""

    device: int = 0
    uncached: bool = False


def scope_of(sc0: bool, sc1: bool) -> str:
    """How far a store goes: see the table above."""
    return (SYSTEM if sc0 else DEVICE) if sc1 else DIE


class View:
    """A cache's view: bytes of all buffers, whole lines of them valid, and bytes that are newer than what lies behind.
    """

    def __init__(self, lines: int):
        self.data = np.zeros((lines, LINE), np.uint8)
        self.valid = np.zeros(lines, bool)
        self.dirty = np.zeros((lines, LINE), bool)

    def fill(self, lines: np.ndarray, behind: np.ndarray) -> None:
        """These lines anew; newer bytes stay."""
        self.data[lines] = np.where(self.dirty[lines], self.data[lines], behind)
        self.valid[lines] = True

    def drop(self, lines: np.ndarray) -> None:
        """Lines (numbers or bool) with nothing newer in them are no longer valid, and of others only that is."""
        self.valid[lines] = False

    def put(self, at: np.ndarray, octets: np.ndarray, dirty: bool) -> None:
        self.data.reshape(-1)[at], self.dirty.reshape(-1)[at] = octets, dirty


@dataclass(eq=False)
class UnderWay:
    """What a wave has issued and not yet waited for. at: the positions of the bytes that it accesses."""

    number: int  # of the wave's accesses, in the order of issue
    at: np.ndarray

    def __post_init__(self) -> None:
        self.first, self.last = (int(self.at.min()), int(self.at.max())) if self.at.size else (0, -1)

    def meets(self, at: np.ndarray, first: int, last: int) -> bool:
        """Whether it accesses one of these positions, which are first to last."""
        return self.first <= last and first <= self.last and bool(np.isin(self.at, at).any())


@dataclass(eq=False)
class Stored(UnderWay):
    octets: np.ndarray
    scope: str


@dataclass(eq=False)
class WriteBack(UnderWay):
    """A buffer_wbl2: it comes behind what was stored before it."""

    scope: str


@dataclass(eq=False)
class Loaded(UnderWay):
    """A load, which may look later than where it stands: look. Loads end in order."""

    look: Callable[["Loaded"], None]


@dataclass
class Wave:
    """The accesses that a wave has in flight, and its position."""

    launch: int
    number: int
    group: int
    device: int
    issued: int = 0
    under_way: list[UnderWay] = field(default_factory=list)  # oldest first

    def issue(self, kind: type, at: np.ndarray, *more: Any) -> None:
        self.issued += 1
        self.under_way.append(kind(self.issued, at, *more))

    def may_end(self, entry: UnderWay) -> bool:
        """Whether nothing older has to come first: an access of the same bytes; of a write-back what was stored, of a
        load what was loaded."""
        for older in self.under_way:
            if older is entry:
                return True
            if isinstance(entry, Loaded):
                if isinstance(older, Loaded):
                    return False
            elif isinstance(entry, WriteBack):
                if isinstance(older, Stored):
                    return False
            elif not isinstance(older, WriteBack) and older.meets(entry.at, entry.first, entry.last):
                return False
        raise LookupError(entry)

    @property
    def unit(self) -> tuple[int, int]:
        return self.launch, self.group

    @property
    def die(self) -> tuple[int, int]:
        return self.device, self.group % DIES


class World:
    """The views of all devices, and what is on its way. `now` is the wave whose turn it is."""

    def __init__(self, buffers: Iterable[Buffer], order: random.Random, show: Callable[[str], None] | None = None,
                 whole_lines: bool = True):
        self.whole_lines = whole_lines
        self.order, self.lazy, self.show = order, order.random() < LAZY, show
        self.buffers = sorted((p for p in buffers if p.size), key=lambda p: p.start)
        self.starts = np.array([p.start for p in self.buffers], np.int64)
        self.stops = np.array([p.end for p in self.buffers], np.int64)
        first = [p.start // LINE * LINE for p in self.buffers]
        lines = [(p.end - start + LINE - 1) // LINE for p, start in zip(self.buffers, first, strict=True)]
        self.shift = np.array(first, np.int64) - LINE * np.concatenate([[0], np.cumsum(lines)[:-1]]).astype(np.int64)
        self.lines = sum(lines)
        self.addresses = np.concatenate([start + LINE * np.arange(n) for start, n in zip(first, lines, strict=True)])
        self.home = np.repeat([getattr(p, "device", 0) for p in self.buffers], lines)
        self.uncached = np.repeat([getattr(p, "uncached", False) for p in self.buffers], lines)
        self.base = int(self.addresses[0])
        span = int(self.addresses[-1]) + LINE - self.base
        self.memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.base))
        self.changes = 0  # of memory
        self.stores = 0   # and atomics, issued
        self.units: dict[tuple[int, int], View] = defaultdict(self._view)
        self.dies: dict[tuple[int, int], View] = defaultdict(self._view)
        self.devices: dict[int, View] = defaultdict(self._view)
        self.waves: dict[tuple[int, int], Wave] = {}
        self.now: Wave

    def _view(self) -> View:
        return View(self.lines)

    def spots(self, addresses: np.ndarray, width: int) -> np.ndarray | None:
        """[accesses, width] positions of bytes in views; None: not in any buffer, so no other wave's."""
        buffer = np.searchsorted(self.starts, addresses.view(np.int64), side="right") - 1
        inside = buffer >= 0
        if inside.any():
            inside &= addresses.view(np.int64) < self.stops[np.maximum(buffer, 0)]
        if not inside.all():
            return None
        return (addresses.view(np.int64) - self.shift[buffer])[:, None] + np.arange(width)

    def _say(self, wave: Wave, does: str, at: np.ndarray, octets: np.ndarray | None = None) -> None:
        """A line of the schedule, for who reads it."""
        if self.show is None:
            return
        words = f"launch {wave.launch}, wave {wave.number} {does}"
        if at.size:
            first = int(at.reshape(-1)[0])
            address = int(self.addresses[first // LINE]) + first % LINE
            buffer = next(p for p in self.buffers if p.start <= address < p.end)
            words += f" {buffer.name}+{address - buffer.start}"
        if octets is not None:
            words += f": {octets.reshape(-1)[:8].tobytes().hex(' ', 4)}" + (", ..." if octets.size > 8 else "")
        self.show(words)

    # ---- loads

    def load(self, wave: Wave, at: np.ndarray, sc0: bool, sc1: bool, entry: Loaded | None = None) -> np.ndarray:
        """The bytes at these positions as the wave sees them, now or at an `entry` in flight."""
        lines = np.unique(at // LINE)
        elsewhere = self.home[lines] != wave.device
        device, die, unit = self.devices[wave.device], self.dies[wave.die], self.units[wave.unit]
        past = elsewhere & (self.uncached[lines] | (sc0 and sc1))  # of the die's and the device's view
        # what the device's memory has new is in its view at once; of another's, when the line is fetched
        self._fetch(device, lines, ~elsewhere | past, self._memory)
        self._fetch(die, lines, past, lambda wanted: device.data[wanted])
        view = die
        if not (sc0 or sc1):
            self._fetch(unit, lines, np.zeros(len(lines), bool), lambda wanted: die.data[wanted])
            view = unit
        octets = view.data.reshape(-1)[at]  # a copy
        first, last = (int(at.min()), int(at.max())) if wave.under_way else (0, -1)
        for older in wave.under_way:
            if older is entry:
                break
            if isinstance(older, Stored) and older.meets(at, first, last):
                self._overlay(octets, at, older)
        self._say(wave, "finds later" if entry else "finds", at, octets)
        return octets

    def _fetch(self, view: View, lines: np.ndarray, anew: np.ndarray, behind: Callable) -> None:
        dropped = np.zeros(len(lines), bool)
        if not self.lazy:
            dropped = np.array([self.order.random() < 1 / 8 for _ in lines])
        wanted = lines[anew | dropped | ~view.valid[lines]]
        if wanted.size:
            view.fill(wanted, behind(wanted))

    @staticmethod
    def _overlay(octets: np.ndarray, at: np.ndarray, entry: Stored) -> None:
        known = dict(zip(entry.at.reshape(-1).tolist(), entry.octets.reshape(-1).tolist(), strict=True))
        octets[...] = [[known.get(a, o) for a, o in zip(*rows, strict=True)]
                       for rows in zip(at.tolist(), octets.tolist(), strict=True)]

    def _memory(self, lines: np.ndarray) -> np.ndarray:
        return self.memory[(self.addresses[lines] - self.base)[:, None] + np.arange(LINE)]

    # ---- stores

    def store(self, wave: Wave, at: np.ndarray, octets: np.ndarray, sc0: bool, sc1: bool) -> None:
        self.stores += 1
        wave.issue(Stored, at, octets, scope_of(sc0, sc1))
        self._say(wave, "stores", at, octets)

    def atomic(self, wave: Wave, at: np.ndarray, sc1: bool, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """change: from the bytes that are there to those that are then there."""
        self.stores += 1
        while any(np.isin(entry.at, at).any() for entry in wave.under_way):
            self.finish(wave, wave.under_way[0])  # a wave's own accesses to one position stay in order
        self._reach(wave, *self._newer(self.dies[wave.die], np.unique(at // LINE)), DEVICE)
        if sc1:
            self._reach(wave, *self._newer(self.devices[wave.device], np.unique(at // LINE)), SYSTEM)
            before = self.memory[self.addresses[at // LINE] - self.base + at % LINE]
        else:
            device, lines = self.devices[wave.device], np.unique(at // LINE)
            self._fetch(device, lines, self.home[lines] == wave.device, self._memory)
            before = device.data.reshape(-1)[at]
        self._reach(wave, at, change(before), SYSTEM if sc1 else DEVICE)

    @staticmethod
    def _newer(view: View, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, bytes) in these lines that are newer than what lies behind the view."""
        row, column = np.nonzero(view.dirty[lines])
        at = lines[row] * LINE + column
        return at, view.data.reshape(-1)[at]

    def _reach(self, wave: Wave, at: np.ndarray, octets: np.ndarray, scope: str) -> None:
        """Bytes arrive, in all views up to that of their scope."""
        if not at.size:
            return
        lines = np.unique(at // LINE)
        device, die, unit = self.devices[wave.device], self.dies[wave.die], self.units[wave.unit]
        through = self.uncached[lines].all() or scope == SYSTEM  # uncached memory is written through wherever from
        for view in (device, die):
            if (missing := lines[~view.valid[lines]]).size:
                view.fill(missing, self._memory(missing) if view is device else device.data[missing])
        held = unit.valid[at // LINE]
        unit.put(at[held], octets[held], False)
        die.put(at, octets, scope == DIE and not through)
        if scope == DIE and not through:
            return
        device.put(at, octets, not through)
        for number, other in self.dies.items():
            if number[0] == wave.device and other is not die:
                other.drop(lines[self.home[lines] == wave.device])
        if not through:
            return
        where = self.addresses[at // LINE] - self.base + at % LINE
        self.changes += int((self.memory[where] != octets).any())
        self.memory[where] = octets
        for (owner, _), other in self.dies.items():
            if owner != wave.device:
                other.drop(lines[self.home[lines] == owner])

    def write_back(self, wave: Wave, scope: str) -> None:
        self._say(wave, f"writes back to the {scope}", NOWHERE)
        if scope in (DEVICE, SYSTEM):
            self._reach(wave, *self._newer(self.dies[wave.die], np.arange(self.lines)), DEVICE)
        if scope == SYSTEM:
            self._reach(wave, *self._newer(self.devices[wave.device], np.arange(self.lines)), SYSTEM)

    def invalidate(self, wave: Wave, sc0: bool, sc1: bool) -> None:
        """buffer_inv: at once, for what follows."""
        views = {(True, False): "unit", (False, True): "die", (True, True): "device"}
        self._say(wave, f"drops what its {views.get((sc0, sc1), 'registers')} may have stale", NOWHERE)
        elsewhere = self.home != wave.device
        if sc0 or sc1:
            self.units[wave.unit].drop(np.arange(self.lines))
        if sc1:
            self.dies[wave.die].drop(elsewhere)
        if sc0 and sc1:
            self.devices[wave.device].drop(elsewhere)

    # ---- time

    def finish(self, wave: Wave, entry: UnderWay) -> None:
        """Complete everything in flight."""
        if isinstance(entry, Stored):
            at, octets = entry.at.reshape(-1), entry.octets.reshape(-1)
            now = self._arriving(at)
            self._say(wave, f"has its store seen by the {entry.scope}:", at[now])
            self._reach(wave, at[now], octets[now], entry.scope)
            if not now.all():
                entry.at, entry.octets = at[~now], octets[~now]
                return
        elif isinstance(entry, WriteBack):
            self.write_back(wave, entry.scope)
        elif isinstance(entry, Loaded):
            entry.look(entry)
        wave.under_way.remove(entry)

    def _arriving(self, at: np.ndarray) -> np.ndarray:
        """Which bytes of a store arrive: all, or all pieces but one, or one, or those before some address."""
        everything = np.ones(len(at), bool)
        if len(at) <= PIECE or self.order.random() >= TORN:
            return everything
        _, line, sizes = np.unique(at // LINE, return_inverse=True, return_counts=True)
        pieces, piece = np.unique(np.where((sizes[line] == LINE) & self.whole_lines, at // LINE * LINE,
                                           at // PIECE * PIECE), return_inverse=True)
        if len(pieces) == 1:
            return everything
        one, late = piece == self.order.randrange(len(pieces)), self.order.random()
        return ~one if late < 1 / 2 else one if late < 3 / 4 else piece < self.order.randrange(1, len(pieces))

    def wait(self, wave: Wave, count: int) -> bool:
        """For all but the last `count` accesses that the wave issued; False: not yet, one more store has arrived, which
        others may see before the next."""
        while left := [entry for entry in wave.under_way if entry.number <= wave.issued - count]:
            entry = self._next(wave, left)
            self.finish(wave, entry)
            if not isinstance(entry, Loaded):
                self.stores += 1
                return False
        return True

    def _next(self, wave: Wave, entries: list[UnderWay]) -> UnderWay:
        """One of what may end: mostly the youngest, which a program without waits takes for the last."""
        free = [entry for entry in entries if wave.may_end(entry)]
        return free[-1] if self.order.random() < 0.97 else self.order.choice(free)

    def pass_time(self, ended: Callable[[Wave], bool]) -> None:
        """Between two turns: accesses in flight of waves that have ended go on, and in some schedules what others
        have, and caches write back."""
        for wave in self.waves.values():
            if wave.under_way and self.order.random() < self._pace(wave, ended(wave)):
                self.finish(wave, self._next(wave, wave.under_way))
                self.stores += 1
            if not self.lazy and self.order.random() < 1 / 32:
                self.write_back(wave, self.order.choice((DEVICE, SYSTEM)))

    def _pace(self, wave: Wave, ended: bool) -> float:
        """How likely something of the wave's ends now: soon what it issued last, so that others see it, and late what
        came before."""
        if not self.lazy:
            return 1 / 4
        return (1 / 4 if wave.under_way[-1].number == wave.issued else 1 / 256) if ended else 0

    def _all(self, wave: Wave) -> None:
        while wave.under_way:
            self.finish(wave, wave.under_way[0])

    def settle(self) -> bool:
        """Everything that may happen happens: whether memory is then another. What waits for no more than time goes on.
        """
        before = self.changes
        for wave in self.waves.values():
            self._all(wave)
            self.write_back(wave, SYSTEM)
        for views in (self.units, self.dies, self.devices):
            for view in views.values():
                view.drop(np.arange(self.lines))
        return self.changes != before

    def begin(self, launch: int) -> None:
        """A launch behind another: its device drops what it may have stale."""
        for wave in {wave.die: wave for wave in self.waves.values() if wave.launch == launch}.values():
            self.invalidate(wave, True, True)

    def end(self, launch: int) -> None:
        """Of a launch whose waves have ended, all stores arrive, and its device writes back."""
        for wave in [wave for wave in self.waves.values() if wave.launch == launch]:
            self._all(wave)
            self.write_back(wave, SYSTEM)

    def ends(self, launch: int) -> bool:
        """Of a launch whose waves have ended: whether its stores have arrived, and its device has written back."""
        waves = [wave for wave in self.waves.values() if wave.launch == launch]
        if any(wave.under_way for wave in waves) or (self.lazy and self.order.random() > 1 / 256):
            return False
        for wave in {wave.die: wave for wave in waves}.values():
            self.write_back(wave, SYSTEM)
        return True
