"""What comes from a register or LDS that was never written decides a branch, an address or EXEC, or is stored."""

from collections.abc import Callable
from typing import cast

import numpy as np

from wave64.testing.emulator.binding import Binding, lanes_of, masks_of
from wave64.testing.emulator.decode import EXEC, SCC
from wave64.testing.emulator.lanes import ATOMIC, WRITE
from wave64.testing.emulator.machine import FULL, READY
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.watch import SCALAR, Check, name_of, registers


class Unwritten(Check):
    """Follows, lane by lane, which registers hold what somebody wrote, as memory checkers do: what is computed from
    something unwritten is unwritten, which is no mistake until it matters; lanes that move, and matrices, are followed
    from where they come. A register counts as written with its first half. Of LDS and private memory, which bytes
    somebody wrote."""

    MATTERS = ("s_cbranch", "s_setpc", "s_swappc")

    def __init__(self, machine):
        super().__init__(machine)
        #: by register and wave, the lanes that know it; of scalar registers all or none
        self.known = np.zeros((SCALAR + SCC + 1, machine.count), np.uint64)
        self.sure = np.zeros(SCALAR + SCC + 1, bool)  # registers that all lanes of all waves know
        self.written = np.zeros(machine.shape.groups * machine.lds_stride, bool)
        self.private = np.zeros(len(machine.scratch.u8), bool)
        self.loaded: np.ndarray | None = None  # of an LDS load, the accesses that found only stored bytes; None: all

    def start(self) -> None:
        machine = self.machine
        self.sure.fill(False)
        self.known.fill(0)
        self.written.fill(False)
        self.private.fill(False)
        kernel, absent = machine.kernel, machine.states != READY
        self.known[:, absent] = FULL  # of waves that are not there nothing matters
        given = [*range(len(kernel.user_sgprs) + len(kernel.system_sgprs)), EXEC, EXEC + 1]
        given = [0, *(SCALAR + r for r in given)]
        self.known[given], self.sure[given] = FULL, True

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, family, party, sure = b.instruction.name, b.instruction.family, b.party, self.sure
        reads, writes = frozenset(registers(b.reads)), registers(b.writes)
        read, written = np.array(sorted(reads), np.intp), np.array(writes, np.intp)
        memory = family in ("DS", "FLAT", "GLOBAL", "SCRATCH", "MUBUF", "SMEM")
        follow = b.follow
        memory = memory and follow is None
        matters = reads if memory or name.startswith(self.MATTERS) else frozenset()
        if {SCALAR + EXEC, SCALAR + EXEC + 1} & set(writes):
            matters = reads
        if name.startswith("buffer_store"):  # what does not reach memory does not matter: see `buffer_store`
            matters -= set(self._data(b))
        always = name == "v_writelane_b32"  # of whose destination one lane is written
        every = np.ones((party.count, 64), bool) if name.startswith(("v_mfma", "v_smfmac")) else None
        parts = [(registers(sources), registers(results)) for sources, results in self._parts(b)]

        def checked():
            known = True
            if always or not sure[read].all():
                if matters:
                    self._demand(matters, party)
                known = memory  # what comes from memory is taken as known
            if known:
                outcome = execute()
                if self.loaded is not None:
                    lanes = np.ones((party.count, 64), bool)
                    lanes[party.mask], self.loaded = self.loaded, None
                    self._mark(writes, party, lanes)
                elif not sure[written].all():
                    self._mark(writes, party, True, every)
                return outcome
            if follow is not None:
                moved = follow(lambda i: [self._of(register, party) for register in registers(b.reads[i:i + 1])])
                outcome = execute()
                for i, new, lanes in moved:
                    for n, register in enumerate(registers(b.writes[i:i + 1])):
                        self._mark([register], party, new[n] if new.ndim == 3 else new, lanes)
                return outcome
            news = [self._known(sources, party) for sources, _ in parts]
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
        if self.sure[data].all():
            return
        lanes = b.party.mask.copy()
        lanes[lanes] = inside
        self._demand(frozenset(data), b.party, lanes)

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        octets = offsets[:, None] + np.arange(width)
        if access == WRITE:
            self.written[octets] = True
            return
        stored = cast(np.ndarray, self.written[octets].all(1))
        if not stored.all():
            if access == ATOMIC:
                at = int(offsets[~stored][0]) % self.machine.lds_stride
                raise EmulationError(f"an atomic on byte {at} of LDS, which was never written")
            self.loaded = stored if self.loaded is None else self.loaded & stored

    def scratch(self, b: Binding, offsets: np.ndarray, width: int, writes: bool) -> None:
        octets = offsets[:, None] + np.arange(width)
        if writes:
            self.private[octets] = True
        elif not (stored := cast(np.ndarray, self.private[octets].all(1))).all():
            self.loaded = stored

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

    def _known(self, sources: list[int], party) -> np.ndarray:
        """[waves, 64]: where all sources are known."""
        known = np.ones((party.count, 64), bool)
        for register in sources:
            known &= self._of(register, party)
        return known

    def _of(self, register: int, party) -> np.ndarray:
        known = self.known[register, party.waves]
        return (known != 0)[:, None] if register >= SCALAR else lanes_of(known)

    def _mark(self, writes: list[int], party, known: np.ndarray | bool, lanes: np.ndarray | None = None) -> None:
        lanes = party.mask if lanes is None else lanes
        known = np.broadcast_to(known, lanes.shape)
        for register in writes:
            if register >= SCALAR:
                new = np.where((known | ~lanes).all(1), FULL, np.uint64(0))
            else:
                new = masks_of(np.where(lanes, known, self._of(register, party)))
            self.known[register, party.waves] = new
            self.sure[register] = (self.known[register] == FULL).all()

    def _demand(self, needed: frozenset[int], party, lanes: np.ndarray | None = None) -> None:
        for register in sorted(needed):
            unknown = ~self._of(register, party) & (party.mask if lanes is None else lanes)
            if unknown.any():
                wave, lane = np.argwhere(unknown)[0]
                where = f"wave {party.numbers[wave] % self.machine.shape.waves}"
                if register < SCALAR:
                    where += f", lane {lane}"
                raise EmulationError(f"{where}: {name_of(register)} comes from a register that was never written")
