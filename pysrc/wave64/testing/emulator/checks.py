"""What hardware does not check, and a kernel must not do: each class watches a machine and raises EmulationError.

`Waits`: a result is used, or overwritten, before an s_waitcnt has waited for the load that brings it; LDS stores are
on their way when a barrier is reached. `SharedMemory`: two waves of a workgroup touch the same bytes of LDS between two
barriers, one of them not only to read. `Unwritten`: what comes from a register or LDS that nobody wrote decides a
branch, an address or EXEC, or is stored.
"""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import EXEC, SCC, VCC
from wave64.testing.emulator.lanes import ATOMIC, READ, WRITE, active
from wave64.testing.emulator.memory import EmulationError

SCALAR = 1000  # where the scalar registers begin in one numbering of both kinds


def registers(ranges: list[tuple[str, int, int]]) -> list[int]:
    """Ranges as a binding notes them, in one numbering: vector registers, then from SCALAR on scalar ones."""
    return [(SCALAR if kind == "s" else 0) + first + i for kind, first, count in ranges for i in range(count)]


def name_of(register: int) -> str:
    scalar = {VCC: "vcc_lo", VCC + 1: "vcc_hi", EXEC: "exec_lo", EXEC + 1: "exec_hi", SCC: "scc"}
    if register < SCALAR:
        return f"v{register}"
    return scalar.get(register - SCALAR, f"s{register - SCALAR}")


class Check:
    """One that sees nothing; the machine calls these."""

    def __init__(self, machine):
        self.machine = machine

    def start(self) -> None:
        """A batch of workgroups begins."""

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        """What is called instead of `execute`, the bound instruction."""
        return execute

    def met(self, groups: np.ndarray) -> None:
        """These workgroups (bool) have come to a barrier, all their waves."""

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        """The active lanes are about to access LDS: READ, WRITE (of `words`) or ATOMIC."""

    def buffer_store(self, b: Binding, inside: np.ndarray) -> None:
        """A buffer store is about to write, of the active lanes' accesses those that are inside its resource."""


# ---- waits

class Waits(Check):
    """Counts what waves have issued (vm: vector memory, lgkm: LDS and scalar memory) and what waits have seen done.

    Loads of vector memory and LDS operations come back in order, so waiting until n are left says which are done;
    scalar loads come in any order, so that with one under way only waiting for all says something.
    """

    def __init__(self, machine):
        super().__init__(machine)
        n, count = machine.count, SCALAR + 256
        self.issued = {"vm": np.zeros(n, np.int64), "lgkm": np.zeros(n, np.int64)}
        self.done = {"vm": np.zeros(n, np.int64), "lgkm": np.zeros(n, np.int64)}
        self.due = {"vm": np.zeros((count, n), np.int64), "lgkm": np.zeros((count, n), np.int64)}
        self.unordered = np.zeros(n, np.int64)  # the last scalar load
        self.stored = np.zeros(n, np.int64)     # the last LDS operation that writes
        self.busy: set[int] = set()             # registers that some wave waits for
        #: by byte of LDS, what a load past the registers brings: (vm count, wave); None before the first such load
        self.direct: tuple[np.ndarray, np.ndarray] | None = None

    def start(self) -> None:
        for arrays in (self.issued, self.done, self.due):
            for array in arrays.values():
                array.fill(0)
        self.unordered.fill(0)
        self.stored.fill(0)
        self.busy.clear()
        self.direct = None

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, waves = b.instruction.name, b.party.waves
        if name == "s_waitcnt":
            return self._wait(b.fields.simm16, waves)
        if name == "s_barrier":
            return self._barrier(execute, waves)
        counters = self._counters(name, b.instruction.family)
        written = registers(b.writes)
        watched = registers(b.reads) + written
        if counters:  # loads into one register come in order: of its destinations, a load need not wait for others
            watched = [r for r in watched if r not in written] + ([] if len(counters) == 1 else written)
        watched = frozenset(watched)
        busy = self.busy
        only_gives = ("ds_read", "ds_bpermute", "ds_permute", "ds_swizzle")
        stores = b.instruction.family == "DS" and not name.startswith(only_gives)

        def checked():
            if busy and not busy.isdisjoint(watched):
                self._examine(watched & busy, waves)
            outcome = execute()
            if counters:
                for counter in counters:
                    self.issued[counter][waves] += 1
                    for register in written:
                        self.due[counter][register, waves] = self.issued[counter][waves]
                busy.update(written)
                if b.instruction.family == "SMEM":
                    self.unordered[waves] = self.issued["lgkm"][waves]
                if stores:
                    self.stored[waves] = self.issued["lgkm"][waves]
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
        if not loads and self.direct is None:
            return
        if self.direct is None:
            size = self.machine.shape.groups * self.machine.lds_stride
            self.direct = np.zeros(size, np.int64), np.zeros(size, np.int64)
        due, by = self.direct
        places = offsets[:, None] + np.arange(width)
        if loads:
            wave = active(b, b.party.numbers[:, None])[:, None]
            due[places], by[places] = self.issued["vm"][wave] + 1, wave
        elif (due[places] > self.done["vm"][by[places]]).any():
            raise EmulationError("LDS is accessed, but no s_waitcnt has waited (vmcnt) for the load that goes there")

    def _wait(self, immediate: int, waves: slice) -> Callable:
        left = {"vm": immediate & 15 | immediate >> 10 & 0x30, "lgkm": immediate >> 8 & 15}

        def run() -> None:
            for counter, count in left.items():
                seen = self.issued[counter][waves] - count
                if counter == "lgkm" and count:
                    seen = np.where(self.unordered[waves] > self.done[counter][waves], 0, seen)
                self.done[counter][waves] = np.maximum(self.done[counter][waves], seen)
            waiting = [r for r in self.busy
                       if any((self.due[c][r] > self.done[c]).any() for c in ("vm", "lgkm"))]
            self.busy.intersection_update(waiting)
        return run

    def _barrier(self, execute: Callable, waves: slice) -> Callable:
        def run():
            if (self.stored[waves] > self.done["lgkm"][waves]).any():
                raise EmulationError("a barrier, but no s_waitcnt has waited for the LDS stores before it")
            return execute()
        return run

    def _examine(self, touched: frozenset[int], waves: slice) -> None:
        for register in sorted(touched):
            for counter in ("vm", "lgkm"):
                if (self.due[counter][register, waves] > self.done[counter][waves]).any():
                    raise EmulationError(f"{name_of(register)} is used, but no s_waitcnt has waited ({counter}cnt) for "
                                         "what brings it")


# ---- LDS

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


# ---- registers

class Unwritten(Check):
    """Follows, lane by lane, which registers hold what somebody wrote, as memory checkers do: what is computed from
    something unwritten is unwritten, which is no mistake until it matters. A register counts as written with its first
    half. Of LDS, which bytes somebody wrote."""

    MATTERS = ("s_cbranch", "s_setpc", "s_swappc")

    def __init__(self, machine):
        super().__init__(machine)
        self.vector = np.zeros(machine.vgprs.shape, bool)
        self.scalar = np.zeros((SCC + 1, machine.count), bool)
        self.sure: set[int] = set()  # registers that all lanes of all waves know
        self.stored = np.zeros(machine.shape.groups * machine.lds_stride, bool)
        self.loaded: np.ndarray | None = None  # of an LDS load, the accesses that found only stored bytes; None: all

    def start(self) -> None:
        machine = self.machine
        self.sure.clear()
        self.vector.fill(False)
        self.scalar.fill(False)
        self.stored.fill(False)
        kernel = machine.kernel
        self.vector[0] = True
        given = [*range(len(kernel.user_sgprs) + len(kernel.system_sgprs)), EXEC, EXEC + 1]
        self.scalar[given] = True
        self.sure.update([0, *(SCALAR + r for r in given)])

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, family, party, sure = b.instruction.name, b.instruction.family, b.party, self.sure
        reads, writes = frozenset(registers(b.reads)), registers(b.writes)
        memory = family in ("DS", "FLAT", "GLOBAL", "SCRATCH", "MUBUF", "SMEM")
        moves = "permute" in name or "swizzle" in name or "_DPP16" in family or "lane" in name
        matters = reads if memory and not moves or name.startswith(self.MATTERS) else frozenset()
        if {SCALAR + EXEC, SCALAR + EXEC + 1} & set(writes):
            matters = reads
        if name.startswith("buffer_store"):  # what does not reach memory does not matter: see `buffer_store`
            matters -= set(self._data(b))
        # what comes from memory or other lanes is taken as known; so are matrix products, which mix all lanes
        given = memory or moves or name.startswith("v_mfma")
        written = frozenset(writes)
        parts = [(registers(sources), registers(results)) for sources, results in self._parts(b)]
        either = name == "v_cndmask_b32"  # of which one source is not looked at

        def checked():
            known = True
            if not reads <= sure:
                if matters:
                    self._demand(matters, party)
                known = given
            if known:
                outcome = execute()
                if self.loaded is not None:
                    lanes = np.ones((party.count, 64), bool)
                    lanes[party.mask], self.loaded = self.loaded, None
                    self._mark(writes, party, lanes)
                elif not written <= sure:
                    self._mark(writes, party, True)
                return outcome
            news = [self._known(sources, party, either) for sources, _ in parts]
            outcome = execute()
            for (_, results), new in zip(parts, news, strict=True):
                self._mark(results, party, new)
            return outcome
        return checked

    @staticmethod
    def _data(b: Binding) -> list[int]:
        """The registers that a buffer store writes: the binding notes them last."""
        return registers(b.reads[-1:])

    def buffer_store(self, b: Binding, inside: np.ndarray) -> None:
        data = self._data(b)
        if self.sure.issuperset(data):
            return
        lanes = b.party.mask.copy()
        lanes[lanes] = inside
        self._demand(frozenset(data), b.party, lanes)

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        places = offsets[:, None] + np.arange(width)
        if access == WRITE:
            self.stored[places] = True
            return
        stored = self.stored[places].all(1)
        if not stored.all():
            if access == ATOMIC:
                at = int(offsets[~stored][0]) % self.machine.lds_stride
                raise EmulationError(f"an atomic on byte {at} of LDS, which nobody wrote")
            self.loaded = stored if self.loaded is None else self.loaded & stored

    @staticmethod
    def _parts(b: Binding) -> list[tuple[list, list]]:
        """(sources, results) that depend on each other. The low word of a sum or a shift to the left does not depend on
        the sources' high words, which compilers leave unwritten where they want no more."""
        if b.parts:
            return b.parts
        if b.instruction.name in ("v_mad_u64_u32", "v_mad_i64_i32", "v_lshl_add_u64", "v_lshlrev_b64", "s_lshl_b64"):
            kind, first, _ = b.writes[0]
            low = [(kind_of, register, 1) for kind_of, register, _ in b.reads]
            return [(low, [(kind, first, 1)]), (b.reads, [(kind, first + 1, 1), *b.writes[1:]])]
        return [(b.reads, b.writes)]

    def _known(self, sources: list[int], party, either: bool) -> np.ndarray:
        """[waves, 64]: where all sources are known; either: one of them."""
        known = np.full((party.count, 64), not (either and sources))
        for register in sources:
            if either:
                known |= self._of(register, party)
            else:
                known &= self._of(register, party)
        return known

    def _of(self, register: int, party) -> np.ndarray:
        if register >= SCALAR:
            return self.scalar[register - SCALAR, party.waves][:, None]
        return self.vector[register, party.waves]

    def _mark(self, writes: list[int], party, known: np.ndarray | bool) -> None:
        for register in writes:
            if register >= SCALAR:
                file, row = self.scalar, register - SCALAR
                file[row, party.waves] = known if known is True else (known | ~party.mask).all(1)
            else:
                file, row = self.vector, register
                np.copyto(file[row, party.waves], known, where=party.mask)
            if file[row].all():
                self.sure.add(register)
            else:
                self.sure.discard(register)

    def _demand(self, needed: frozenset[int], party, lanes: np.ndarray | None = None) -> None:
        for register in sorted(needed):
            unknown = ~self._of(register, party) & (party.mask if lanes is None else lanes)
            if unknown.any():
                wave, lane = np.argwhere(unknown)[0]
                where = f"wave {party.numbers[wave] % self.machine.shape.waves}"
                if register < SCALAR:
                    where += f", lane {lane}"
                raise EmulationError(f"{where}: {name_of(register)} comes from a register that nobody wrote")


#: all of them, which is what `emulate` uses
ALL = (Waits, SharedMemory, Unwritten)
