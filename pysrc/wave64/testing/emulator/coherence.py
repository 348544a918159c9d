"""The memory model at work: a launch's memory, seen through the views of its waves (views.py), and what instructions
say of who sees what."""

from collections.abc import Callable
from typing import Any

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.memory import Memory
from wave64.testing.emulator.views import NOWHERE, Loaded, World, WriteBack, scope_of
from wave64.testing.emulator.watch import Check


class CoherentMemory(Memory):
    """A launch's memory, seen through the world's views. `bits` are sc0 and sc1 of the instruction that accesses it;
    launch, shadow and across are for Unordered, across: whether launches run on several devices."""

    def __init__(self, world: World, launch: int, shadow: Any, across: bool):
        super().__init__()
        self.launch, self.shadow, self.across = launch, shadow, across
        self.world, self.bits, self.last = world, (False, False), None

    def _spots(self, offsets: np.ndarray, width: int) -> np.ndarray | None:
        return self.world.spots((offsets + self.base).view(np.uint64), width) if offsets.size else None

    def load(self, offsets: np.ndarray, width: int) -> np.ndarray:
        at = self._spots(offsets, width)
        self.last = at
        if at is None:
            return super().load(offsets, width)
        octets = self.world.load(self.world.now, at, *self.bits)
        return words_of(octets, width)

    def store(self, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
        at = self._spots(offsets, width)
        if at is None:
            super().store(offsets, width, words)
        else:
            octets = np.ascontiguousarray(words).view(np.uint8).reshape(len(offsets), -1)[:, :width]
            self.world.store(self.world.now, at, octets.copy(), *self.bits)

    def atomic(self, offsets: np.ndarray, kind: type, change: Callable, *operands: np.ndarray) -> np.ndarray:
        size = np.dtype(kind).itemsize
        at = self._spots(offsets, size)
        if at is None:
            return super().atomic(offsets, kind, change, *operands)
        self._aligned(offsets, kind)
        old = np.empty(len(offsets), kind)
        for lane in range(len(offsets)):
            def changed(octets: np.ndarray, lane: int = lane) -> np.ndarray:
                old[lane:lane + 1] = octets.view(kind)
                new = change(old[lane:lane + 1], *(operand[lane:lane + 1] for operand in operands))
                return np.ascontiguousarray(new.astype(kind)).view(np.uint8)

            self.world.atomic(self.world.now, at[lane], self.bits[1], changed)
        return old

    def accumulate(self, offsets: np.ndarray, kind: type, change: np.ufunc, operand: np.ndarray) -> None:
        self.atomic(offsets, kind, change, operand)


def words_of(octets: np.ndarray, width: int) -> np.ndarray:
    """[accesses, bytes] as Space.load gives them."""
    octets = np.ascontiguousarray(octets)
    if width < 4:
        return (octets if width == 1 else octets.view(np.uint16)).astype(np.uint32).reshape(-1, 1)
    return octets.view(np.uint32)


class Coherence(Check):
    """Tells the world what a wave's memory instructions say, and ends its turn at each of them."""

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        memory, name, family = self.machine.memory, b.instruction.name, b.instruction.family
        if not isinstance(memory, CoherentMemory):
            return execute
        world, here, after = memory.world, np.array([b.pc]), np.array([b.pc + b.instruction.words])
        if name == "s_waitcnt":
            count = b.fields.simm16 & 15 | b.fields.simm16 >> 10 & 0x30

            def wait() -> np.ndarray | None:
                return execute() if world.wait(world.now, count) else here
            return wait
        if family == "SMEM" and ("_store_" in name or "_atomic_" in name):
            raise NotImplementedError(f"{name} while views of memory differ: the scalar cache is not in this model")
        if name not in ("buffer_inv", "buffer_wbl2") and family not in ("GLOBAL", "FLAT", "MUBUF"):
            return execute
        sc0, sc1 = bool(b.fields.sc0), bool(b.fields.sc1)
        later = self._look_again(b) if family in ("GLOBAL", "FLAT") and "_load_dword" in name else None

        def run() -> np.ndarray:
            wave, memory.bits = world.now, (sc0, sc1)
            memory.last = None
            execute()
            if name == "buffer_inv":
                world.invalidate(wave, sc0, sc1)
            elif name == "buffer_wbl2":
                wave.issue(WriteBack, NOWHERE, scope_of(sc0, sc1))
            elif "_store_" not in name:  # atomics have acted, and count until they are waited for
                at = NOWHERE if memory.last is None else memory.last
                wave.issue(Loaded, at, later(at) if later and at.size else _seen)
            return after
        return run

    def _look_again(self, b: Binding) -> Callable:
        """What looks a second time, when the load ends, and writes the registers anew."""
        party, world = b.party, self.machine.memory.world
        file = party.A if b.fields.acc else party.V
        first, sc0, sc1 = b.number("vdst"), bool(b.fields.sc0), bool(b.fields.sc1)

        def later(at: np.ndarray) -> Callable[[Loaded], None]:
            if not world.order.randrange(2):
                return _seen
            wave, mask = world.now, party.mask.copy()

            def look(entry: Loaded) -> None:
                words = words_of(world.load(wave, at, sc0, sc1, entry), at.shape[1])
                for i in range(words.shape[1]):
                    file[first + i][mask] = words[:, i]
            return look
        return later


def _seen(entry: Loaded) -> None:
    """Of a load that looked where it stands."""

