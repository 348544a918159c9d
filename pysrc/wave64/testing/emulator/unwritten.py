"""What comes from a register or LDS that nobody wrote decides a branch, an address or EXEC, or is stored."""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import EXEC, SCC
from wave64.testing.emulator.lanes import ATOMIC, WRITE
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.watch import SCALAR, Check, name_of, registers


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
