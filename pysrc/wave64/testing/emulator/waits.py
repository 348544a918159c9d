"""A result is used, or overwritten, before an s_waitcnt has waited for the load that brings it; or LDS is accessed
where another wave's store was still on its way when the two met at a barrier."""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator.binding import Binding, lanes_of
from wave64.testing.emulator.lanes import READ, active
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.watch import SCALAR, Check, name_of, registers


class Waits(Check):
    """Counts what waves have issued (vm: vector memory, lgkm: LDS and scalar memory) and what waits have seen done.

    Loads of vector memory and LDS operations come back in order, so waiting until n are left says which are done.
    Scalar loads come in any order, and flat accesses, which count as vector memory and as LDS, may be either: with one
    of these in flight only waiting for all says something.
    """

    def __init__(self, machine):
        super().__init__(machine)
        n, count = machine.count, SCALAR + 256
        self.issued = {"vm": np.zeros(n, np.int64), "lgkm": np.zeros(n, np.int64)}
        self.done = {"vm": np.zeros(n, np.int64), "lgkm": np.zeros(n, np.int64)}
        self.due = {"vm": np.zeros((count, n), np.int64), "lgkm": np.zeros((count, n), np.int64)}
        #: the last scalar load or flat access
        self.unordered = {"vm": np.zeros(n, np.int64), "lgkm": np.zeros(n, np.int64)}
        #: LDS stores since the last barrier: (lgkm count and wave of each lane, bytes of LDS)
        self.stores: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.met_with = np.zeros(n, np.int64)   # what lgkm waits had seen done when the wave last came to a barrier
        #: by byte of LDS, a store that was on its way at a barrier: (lgkm count, wave); None before the first such one
        self.late: tuple[np.ndarray, np.ndarray] | None = None
        self.busy = np.zeros(count, bool)       # registers that some wave may wait for
        #: LDS stores that the core made, as `stores`: STORED of core.py, and how many
        self.log: np.ndarray | None = None
        self.logged = 0
        #: by byte of LDS, what a load past the registers brings: (vm count, wave); None before the first such load
        self.direct: tuple[np.ndarray, np.ndarray] | None = None
        self.unaligned = False                  # one of these was not to whole words

    def start(self) -> None:
        for arrays in (self.issued, self.done, self.due, self.unordered):
            for array in arrays.values():
                array.fill(0)
        self.stores.clear()
        self.met_with.fill(0)
        self.busy.fill(False)
        self.logged = 0
        self.direct, self.late = None if self.direct is None else self._bytes(), None
        self.unaligned = False

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, waves = b.instruction.name, b.party.waves
        if name == "s_waitcnt":
            return self._wait(b.fields.simm16, waves)
        if name == "s_barrier":
            return self._barrier(execute, b.party.numbers)
        counters = self._counters(name, b.instruction.family)
        written = registers(b.writes)
        watched = registers(b.reads) + written
        if counters:  # loads into one register come in order: of its destinations, a load need not wait for others
            watched = [r for r in watched if r not in written] + ([] if len(counters) == 1 else written)
        watched, busy, brought = np.array(sorted(set(watched)), np.intp), self.busy, np.array(written, np.intp)
        unordered = b.instruction.family in ("SMEM", "FLAT")

        def checked():
            if busy[watched].any():
                self._examine(watched[busy[watched]], waves)
            outcome = execute()
            if counters:
                for counter in counters:
                    self.issued[counter][waves] += 1
                    for register in written:
                        self.due[counter][register, waves] = self.issued[counter][waves]
                    if unordered:
                        self.unordered[counter][waves] = self.issued[counter][waves]
                busy[brought] = True
            return outcome
        return checked

    @staticmethod
    def _counters(name: str, family: str) -> tuple[str, ...]:
        if name.startswith(("s_dcache", "buffer_wb", "buffer_inv")) or name == "ds_nop":
            return ()
        return {"DS": ("lgkm",), "SMEM": ("lgkm",), "FLAT": ("vm", "lgkm"), "GLOBAL": ("vm",), "SCRATCH": ("vm",),
                "MUBUF": ("vm",)}.get(family, ())

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        loads = b.instruction.family != "DS"
        stores = not loads and access != READ and self.machine.shape.waves > 1
        if not (loads or stores or self.direct or self.late):
            return
        wave, octets = active(b, b.party.numbers[:, None])[:, None], offsets[:, None] + np.arange(width)
        if self.late is not None:
            self._meet_late(self.late, octets, wave)
        if stores:
            self.stores.append((self.issued["lgkm"][wave] + 1, wave, octets))
        if loads:
            due, by = self._direct()
            self.unaligned |= bool((offsets & 3).any())
            due[octets], by[octets] = self.issued["vm"][wave] + 1, wave
        elif self.direct is not None:
            due, by = self.direct
            if (due[octets] > self.done["vm"][by[octets]]).any():
                raise EmulationError(
                    "LDS is accessed, but no s_waitcnt has waited (vmcnt) for the load that goes there")

    def _meet_late(self, late: tuple[np.ndarray, np.ndarray], octets: np.ndarray, wave: np.ndarray) -> None:
        due, by = late
        met = (due[octets] > self.met_with[by[octets]]) & (by[octets] != wave)
        if met.any():
            octet = int(octets[met][0])
            raise EmulationError(
                f"byte {octet % self.machine.lds_stride} of LDS is accessed, but no s_waitcnt had waited (lgkmcnt) for "
                f"the store of wave {by[octet] % self.machine.shape.waves} there when that wave came to the barrier")

    def _bytes(self) -> tuple[np.ndarray, np.ndarray]:
        size = self.machine.shape.groups * self.machine.lds_stride
        return np.zeros(size, np.int64), np.zeros(size, np.int64)

    def _direct(self) -> tuple[np.ndarray, np.ndarray]:
        if self.direct is None:
            self.direct = self._bytes()
        return self.direct

    def _wait(self, immediate: int, waves: slice) -> Callable:
        left = {"vm": immediate & 15 | immediate >> 10 & 0x30, "lgkm": immediate >> 8 & 15}

        def run() -> None:
            for counter, count in left.items():
                seen = self.issued[counter][waves] - count
                if count:
                    seen = np.where(self.unordered[counter][waves] > self.done[counter][waves], 0, seen)
                self.done[counter][waves] = np.maximum(self.done[counter][waves], seen)
            for r in np.flatnonzero(self.busy):
                self.busy[r] = any((self.due[c][r] > self.done[c]).any() for c in ("vm", "lgkm"))
        return run

    def _barrier(self, execute: Callable, waves: np.ndarray) -> Callable:
        def run():
            kept = []
            self._take_logged(waves)
            for store in self.stores:
                count, wave, octets = store
                here = np.isin(wave, waves)
                if not here.all():
                    kept.append(store)
                late = (here & (count > self.done["lgkm"][wave]))[:, 0]
                if late.any():
                    self.late = self.late or self._bytes()
                    self.late[0][octets[late]], self.late[1][octets[late]] = count[late], wave[late]
            self.stores = kept
            self.met_with[waves] = self.done["lgkm"][waves]
            return execute()
        return run

    def _take_logged(self, waves: np.ndarray) -> None:
        """The stores of these waves that the core made, and that no wait has seen done, among the others."""
        if self.log is None or not self.logged:
            return
        made = self.log[:self.logged].copy()
        here = np.isin(made["wave"], waves)
        self.logged = int((~here).sum())
        self.log[:self.logged] = made[~here]
        for each in made[here & (made["count"] > self.done["lgkm"][made["wave"]])]:
            lanes = lanes_of(each["lanes"][None])[0]
            octets = each["offset"][lanes].astype(np.int64)[:, None] + np.arange(each["width"])
            wave = np.full((len(octets), 1), each["wave"], np.int64)
            self.stores.append((np.full_like(wave, each["count"]), wave, octets))

    def _examine(self, touched: np.ndarray, waves: slice) -> None:
        for register in touched.tolist():
            for counter in ("vm", "lgkm"):
                if (self.due[counter][register, waves] > self.done[counter][waves]).any():
                    raise EmulationError(f"{name_of(register)} is used, but no s_waitcnt has waited ({counter}cnt) for "
                                         "what brings it")
