"""Hazards: results that come later than hardware looks for them, unless software keeps instructions apart.

Data: AMD's instruction set manuals, for CDNA3 (gfx942) tables 11 and 37, for CDNA4 (gfx950) tables 11 and 38, and table
28 for how long matrix instructions take. Where the two tables 37 and 38 differ in more than numbers (an XDL instruction
that reads an SGEMM result as C), CDNA4's holds, as in LLVM. Not here: exports, s_movrel, trap handlers, VCC under
another name, none of which the emulator executes.

An instruction opens windows: so many wait states long, certain uses of certain registers come too early. Every
instruction between takes one wait state, s_nop N takes N + 1. Looked at are all paths whose steps, from an instruction
to the next one, some wave has taken, branches included: what was not executed is not judged. A step is examined when it
is first taken, so that kernels run as fast with this check as without, but for their first round.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import EXEC, EXECZ, M0, VCC, VCCZ, VGPR0
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.watch import SCALAR, Check, name_of, registers

# ---- uses of registers, as messages name them

LANE_SELECT = "selects a lane by it"
CONSTANT = "reads it as a constant"
MASK_OF_DIVISION = "takes it for the mask of v_div_fmas"
VMEM_SCALAR = "reads it as a scalar (VMEM)"
TO_LDS = "loads to LDS where it says"
ZERO_FLAG = "asks whether it is zero"
DPP, DPP_EXEC = "moves its lanes (DPP)", "moves lanes under it (DPP)"
PERMLANE, PERMLANE_EXEC = "permutes its lanes", "permutes lanes under it"
READLANE, LANE_EXEC = "reads a lane of it", "reads or writes a lane under it"
VALU_READ, VALU_WRITE = "reads it (VALU)", "writes it (VALU)"
NOT_TRANSCENDENTAL = "reads it (VALU, not transcendental)"
MEMORY = "reads it (VMEM, LDS)"
MATRIX, MATRIX_EXEC, FACTOR = "reads it (MFMA)", "runs under it (MFMA)", "reads it as A or B (MFMA)"
ADDEND = {kind: f"reads it as C ({kind})" for kind in ("XDL", "SGEMM", "DGEMM")}
DOT_FACTOR = "multiplies it (dot product)"
ANY = "reads or writes it"
MODE = "reads or sets it"

NONE: frozenset[int] = frozenset()
EXEC_PAIR = frozenset((SCALAR + EXEC, SCALAR + EXEC + 1))
VCC_PAIR = frozenset((SCALAR + VCC, SCALAR + VCC + 1))
HARDWARE = 10_000  # where the registers of s_setreg begin in the numbering of registers

_VMEM = ("FLAT", "GLOBAL", "SCRATCH", "MUBUF")
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_CARRY = re.compile(r"v_(cndmask|addc|subb|subbrev|div_fmas)_")  # their last scalar source is a mask, no constant
_MATRIX = re.compile(r"v_(?:mfma|smfmac)_(?:scale_)?(?:f32|i32|f64)_(\d+)x\d+x\d+_(?:(\d+)b_)?(\w+)$")
_WIDE = re.compile(r"(flat|global|scratch|buffer)_(store_dwordx([34])|atomic_f?cmpswap_x2)$")
_ENDS = ("s_endpgm", "s_branch", "s_setpc", "s_swappc", "s_trap")  # after which it does not go on at the next pc


@dataclass(frozen=True)
class Window:
    """For `states` wait states after an instruction `did` something with registers, `use` comes too early.
    forwarded: not to what accumulates as it does and reads exactly these registers as C."""

    registers: frozenset[int]
    did: str
    use: str
    states: int
    forwarded: bool = False


@dataclass(frozen=True)
class Step:
    """One instruction, as far as hazards go."""

    states: int                        # wait states that it takes
    writes: frozenset[int]
    windows: tuple[Window, ...]
    uses: dict[str, frozenset[int]]
    accumulates_as: str = ""           # instructions of one such kind forward C without a wait
    addend: frozenset[int] = NONE      # the C of a matrix instruction or dot product

    def joined(self, other: "Step") -> "Step":
        """One that may be either: the same instruction with other registers."""
        uses = {use: self.uses[use] | other.uses[use] for use in self.uses}
        windows = tuple(dict.fromkeys(self.windows + other.windows))
        return replace(self, writes=self.writes & other.writes, windows=windows, uses=uses, addend=NONE)

    @cached_property
    def touched(self) -> frozenset[int]:
        return frozenset().union(*self.uses.values())


# ---- matrix instructions

def _parts(name: str) -> tuple[str, str | None, str]:
    """(size, blocks, factors) in the name of a matrix instruction."""
    found = _MATRIX.match(name)
    assert found is not None, name
    size, blocks, factors = found.groups()
    return size, blocks, factors


def kind_of(name: str) -> str:
    """What the manuals call it: XDL; SGEMM, of single precision; DGEMM, of double precision."""
    return {"f32": "SGEMM", "f64": "DGEMM"}.get(_parts(name)[2], "XDL")


def passes_of(b: Binding) -> int:
    """Of 4 cycles each."""
    name = b.instruction.name
    size, blocks, factors = _parts(name)
    small = size == "4", size == "16"
    if factors == "f64":
        return 4 if small[0] else 16 if b.machine.arch == "gfx950" else 8
    if small[0]:
        return 2
    if blocks or factors == "f32":
        return 8 if small[1] else 16
    double = factors == "f8f6f4" and min(b.fields.cbsz, b.fields.blgp) < 2  # FP8 takes twice as long as 6 or 4 bits
    return (4 if small[1] else 8) * (2 if double else 1)


def _after_matrix(b: Binding, kind: str, passes: int, result: frozenset[int], addend: frozenset[int]
                  ) -> Iterator[Window]:
    name, late = b.instruction.name, b.machine.arch == "gfx950"
    wrote = "accumulates it" if name.startswith("v_smfmac") else "writes it"
    if kind == "DGEMM":
        large = passes > 4
        overlap, factor, memory = ((17 if late else 9), (19 if late else 11), 18) if large else (4, 6, 9)
        chain = {"XDL": 0, "SGEMM": overlap, "DGEMM": overlap}
        rest = {FACTOR: factor, VALU_READ: factor, VALU_WRITE: factor, MEMORY: memory}
        same = 0 if large else 4
    elif kind == "SGEMM":
        chain = {"XDL": 0, "SGEMM": passes, "DGEMM": passes}
        rest = dict.fromkeys((FACTOR, VALU_READ, VALU_WRITE, MEMORY), passes + 2)
        same = 2 if passes == 2 else 0
    else:
        more = 1 if late and passes != 2 else 0
        chain = {"XDL": passes + 1 + late, "SGEMM": passes + 1 + more, "DGEMM": passes + 1 + more}
        rest = dict.fromkeys((FACTOR, VALU_READ, VALU_WRITE, MEMORY), passes + 3 + more)
        same = 2 if passes == 2 else 0
    for other, states in chain.items():
        yield Window(result, wrote, ADDEND[other], states, forwarded=other == kind)
    yield Window(result, wrote, ADDEND[kind], same)
    for use, states in rest.items():
        yield Window(result, wrote, use, states)
    if kind == "XDL":
        yield Window(addend, "reads it as C", VALU_WRITE, passes - 1)


def _matrix(b: Binding, reads: frozenset[int], writes: frozenset[int]) -> Step:
    """A matrix instruction."""
    name = b.instruction.name
    kind, passes = kind_of(name), passes_of(b)
    if name.startswith("v_smfmac"):  # C is the destination, the third source an index
        addend = writes
        factors = reads - writes
    else:
        has_addend = b.fields.src2.offset >= VGPR0
        addend = frozenset(registers(b.reads[2:3])) if has_addend else NONE
        factors = frozenset(registers(b.reads[:2] + b.reads[2 + has_addend:]))
    uses = {MATRIX: reads, FACTOR: factors, ADDEND[kind]: addend, MATRIX_EXEC: EXEC_PAIR}
    return Step(1, writes, tuple(_after_matrix(b, kind, passes, writes, addend)), uses, f"{kind} of {passes} passes",
                addend)


# ---- everything else

def _moved_within(b: Binding) -> bool:
    """Whether a vector instruction puts its result elsewhere than at bit 0."""
    name, family, fields = b.instruction.name, b.instruction.family, b.fields
    if "_SDWA" in family:
        return getattr(fields, "dst_sel", 6) != 6
    if not family.startswith("VOP3") or family.startswith("VOP3P"):
        return False
    if "fp4" in name and "_sr_" in name:
        return True
    return bool(getattr(fields, "opsel", 0) & (12 if re.search(r"_sr_[fb][pf]8|fp4", name) else 8))


def _after_vector(b: Binding, writes: frozenset[int]) -> Iterator[Window]:
    name = b.instruction.name
    scalars = frozenset(r for r in writes if r >= SCALAR)
    vectors = writes - scalars
    if vectors:
        yield Window(vectors, "writes it", DPP, 2)
        yield Window(vectors, "writes it", PERMLANE, 2)
        yield Window(vectors, "writes it", READLANE, 1)
        if name.startswith("v_dot"):
            yield Window(vectors, "writes it", ANY, 3, forwarded=True)
            yield Window(vectors, "writes it", DOT_FACTOR, 3)
        else:
            yield Window(vectors, "writes it", MATRIX, 2)
        if _TRANSCENDENTAL.match(name):
            yield Window(vectors, "writes it", NOT_TRANSCENDENTAL, 1)
        if _moved_within(b):
            yield Window(vectors, "writes a part of it", VALU_READ, 1)
    if scalars:
        yield Window(scalars, "writes it", VMEM_SCALAR, 5)
        yield Window(scalars, "writes it", LANE_SELECT, 4)
        yield Window(scalars & VCC_PAIR, "writes it", MASK_OF_DIVISION, 4)
        yield Window(scalars, "writes it", CONSTANT, 2)
        yield Window(scalars, "writes it", ZERO_FLAG, 5)
        for use, states in ((DPP_EXEC, 5), (LANE_EXEC, 4), (MATRIX_EXEC, 4), (PERMLANE_EXEC, 4)):
            yield Window(scalars & EXEC_PAIR, "writes it", use, states)


def _vector(b: Binding, reads: frozenset[int], writes: frozenset[int]) -> Step:
    """Any other vector instruction."""
    name, fields = b.instruction.name, b.fields
    scalars = [r for r in registers(b.reads) if r >= SCALAR]
    vectors = frozenset(r for r in reads if r < SCALAR)
    if getattr(fields, "dst_unused", 0) == 2:  # SDWA that keeps the rest of its destination
        vectors |= {r for r in writes if r < SCALAR}
    uses = {VALU_READ: vectors, VALU_WRITE: frozenset(r for r in writes if r < SCALAR)}
    if not _TRANSCENDENTAL.match(name):
        uses[NOT_TRANSCENDENTAL] = vectors
    if _CARRY.match(name):
        mask = frozenset(registers([r for r in b.reads if r[0] == "s"][-1:]))
        uses[CONSTANT] = frozenset(registers([r for r in b.reads if r[0] == "s"][:-1]))
        if name.startswith("v_div_fmas"):
            uses[MASK_OF_DIVISION] = mask
    else:
        uses[CONSTANT] = frozenset(scalars)
    flags = {getattr(getattr(fields, source, None), "offset", 0) for source in ("src0", "src1", "src2")}
    uses[ZERO_FLAG] = (VCC_PAIR if VCCZ in flags else NONE) | (EXEC_PAIR if EXECZ in flags else NONE)
    if b.instruction.family.endswith("_DPP16"):
        uses |= {DPP: vectors, DPP_EXEC: EXEC_PAIR}
    if name.startswith("v_permlane"):
        uses |= {PERMLANE: vectors, PERMLANE_EXEC: EXEC_PAIR}
    if name.startswith(("v_readlane", "v_writelane", "v_readfirstlane")):
        uses |= {LANE_EXEC: EXEC_PAIR, READLANE: vectors if "read" in name else NONE}
        if not name.startswith("v_readfirstlane"):
            uses[LANE_SELECT] = frozenset((SCALAR + fields.src1.offset,)) if fields.src1.offset < 128 else NONE
    addend = NONE
    if name.startswith("v_dot"):
        factors = (getattr(fields, source).offset for source in ("src0", "src1", "vsrc1") if hasattr(fields, source))
        uses[DOT_FACTOR] = frozenset(code - VGPR0 for code in factors if code >= VGPR0)
        addend = frozenset((fields.src2.offset - VGPR0,)) if hasattr(fields, "src2") else writes  # v_dot2c: vdst
    return Step(1, writes, tuple(_after_vector(b, writes)), uses, name, addend)


def _memory(b: Binding, reads: frozenset[int], writes: frozenset[int]) -> Step:
    """VMEM and LDS."""
    name, fields, family = b.instruction.name, b.fields, b.instruction.family
    uses = {MEMORY: frozenset(r for r in reads if r < SCALAR)}
    windows: tuple[Window, ...] = ()
    if family in _VMEM:
        uses[VMEM_SCALAR] = frozenset(r for r in reads if r >= SCALAR)
        if "load_lds" in name or getattr(fields, "lds", 0):
            uses[TO_LDS] = frozenset((SCALAR + M0,))
        wide = _WIDE.match(name)
        if wide and not (family == "MUBUF" and (fields.soffset.offset < 128)):
            first = b.number("vdata" if family == "MUBUF" else "data")
            first += b.machine.kernel.agpr_offset if fields.acc else 0
            data = frozenset(range(first, first + int(wide[3] or 4)))
            windows = (Window(data, "stores it", VALU_WRITE, 2),)
    return Step(1, writes, windows, uses)


def _scalar(b: Binding, writes: frozenset[int]) -> Step:
    """What remains: scalar memory among it, which brings no hazards."""
    name, uses, windows = b.instruction.name, {}, ()
    if name == "s_nop":
        return Step((b.fields.simm16 & 15) + 1, writes, windows, uses)
    if name.startswith(("s_setreg", "s_getreg")):
        register = frozenset((HARDWARE + (b.fields.simm16 & 63),))
        uses = {MODE: register}
        windows = (Window(register, "sets it", MODE, 2),) if name.startswith("s_setreg") else ()
    elif SCALAR + M0 in writes and b.instruction.family.startswith("SOP"):
        windows = (Window(frozenset((SCALAR + M0,)), "writes it", TO_LDS, 1),)
    return Step(1, writes, windows, uses)


def step_of(b: Binding) -> Step:
    """What a bound instruction opens and uses."""
    name, family = b.instruction.name, b.instruction.family
    reads, writes = frozenset(registers(b.reads)), frozenset(registers(b.writes))
    if _MATRIX.match(name):
        step = _matrix(b, reads, writes)
    elif name.startswith("v_"):
        step = _vector(b, reads, writes)
    elif family == "DS" or family in _VMEM:
        step = _memory(b, reads, writes)
    else:
        return _scalar(b, writes)
    step.uses[ANY] = frozenset(r for r in reads | writes if r < SCALAR)
    return replace(step, windows=tuple(w for w in step.windows if w.states and w.registers))


# ---- the check

@dataclass
class Taken:
    """The steps that were taken."""

    steps: dict[int, Step] = field(default_factory=dict)
    before: dict[int, set[int]] = field(default_factory=dict)
    after: dict[int, set[int]] = field(default_factory=dict)
    horizon: int = 0  # the longest window opened so far


class Hazards(Check):
    """Keeps the steps that were taken, as a graph of program counters, and looks back from every use along it. Machines
    of a kernel share the graph: what one has looked at is as right in another."""

    def __init__(self, machine):
        super().__init__(machine)
        self.taken: Taken = machine.program.lowered.setdefault(("hazards", machine.kernel.name), Taken())
        self.steps: dict[int, Step] = self.taken.steps
        self.before: dict[int, set[int]] = self.taken.before
        self.after: dict[int, set[int]] = self.taken.after

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        pc, following, name = b.pc, b.pc + b.instruction.words, b.instruction.name
        jumps = name.startswith(("s_branch", "s_cbranch", "s_setpc", "s_swappc"))
        if pc not in self.steps:
            step = self.steps[pc] = step_of(b)
            self.taken.horizon = max([self.taken.horizon, *(window.states for window in step.windows)])
            self._look_back(pc)
            if not jumps and not name.startswith(_ENDS):
                self._take(pc, following)
        elif b.instruction is not self.machine.program.at(pc):  # with registers relative to M0
            step = self.steps[pc].joined(step_of(b))
            if step != self.steps[pc]:
                self.steps[pc] = step
                self.taken.horizon = max([self.taken.horizon, *(window.states for window in step.windows)])
                self._look_back(pc)
                self._take(pc, following)
        if not jumps:
            return execute
        taken = self.after.setdefault(pc, set())

        def branch():
            outcome = execute()
            where = following if outcome is None else outcome
            if where.__class__ is not int:  # the waves part
                for each in set(np.asarray(where).tolist()) - taken:
                    self._take(pc, each)
            elif where not in taken:
                self._take(pc, where)
            return outcome
        return branch

    def _take(self, pc: int, target: int) -> None:
        """A step that was not taken before."""
        self.after.setdefault(pc, set()).add(target)
        self.before.setdefault(target, set()).add(pc)
        nearest: dict[int, int] = {}
        todo = [(target, 0)]
        while todo:
            at, distance = todo.pop()
            if at in self.steps and distance < nearest.get(at, self.taken.horizon):
                nearest[at] = distance
                todo += [(further, distance + self.steps[at].states) for further in self.after.get(at, set())]
        for at in nearest:
            self._look_back(at)

    def _look_back(self, pc: int) -> None:
        """Whether what stands at `pc` comes too early for something before it."""
        use = self.steps[pc]
        seen: dict[int, tuple[int, frozenset[int]]] = {}
        todo = [(pc, 0, use.touched)]
        while todo:
            at, between, sought = todo.pop()
            for earlier in self.before.get(at, ()):
                nearest, more = seen.get(earlier, (self.taken.horizon, NONE))
                if not sought or between >= self.taken.horizon or nearest <= between and more >= sought:
                    continue
                seen[earlier] = between, sought
                first = self.steps[earlier]
                for window in first.windows:
                    if window.states > between:
                        self._judge(window, earlier, pc, sought, between)
                # what it wrote anew is no longer what others before it left
                todo.append((earlier, between + first.states, sought - first.writes))

    def _judge(self, window: Window, earlier: int, pc: int, sought: frozenset[int], between: int) -> None:
        first, use = self.steps[earlier], self.steps[pc]
        touched = window.registers & use.uses.get(window.use, NONE) & sought
        forwards = window.forwarded and first.accumulates_as == use.accumulates_as
        if not touched or (forwards and window.registers == use.addend):
            return
        what = f"hardware register {min(touched) - HARDWARE}" if min(touched) >= HARDWARE else name_of(min(touched))
        self.machine.program.lowered.clear()  # who executes it again hears it again
        raise EmulationError(
            f"{what} too early: {self.machine.where(pc)} {window.use} {between} wait states after "
            f"{self.machine.where(earlier)} {window.did}; {window.states} must lie between")
