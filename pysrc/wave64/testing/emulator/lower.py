"""From an instruction to what the core executes: a handler of core/ by its name, and operands as plain numbers.

What is read and written is noted as a binding notes it, so that the checks need no binding of what the core executes.
`lower` gives an instruction without a handler where the core has none, or not for these modifiers: NumPy executes it.
"""

import functools
import struct
from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import conversions, lds, packed, scalar, vector, vmem
from wave64.testing.emulator.binding import FLOATS, KINDS, SIZES, Binding
from wave64.testing.emulator.code_object import Kernel
from wave64.testing.emulator.decode import EXEC, EXECZ, LITERAL, M0, SCC, VCC, VCCZ, VGPR0, Instruction
from wave64.testing.emulator.lanes import HALF_LOADS, LOADS, STORES
from wave64.testing.emulator.waits import Waits
from wave64.testing.emulator.watch import SCALAR, registers

# as core.h has them
NONE, VECTOR, ONE, CONSTANT, SCC_BIT, VCCZ_BIT, EXECZ_BIT = range(7)
NEGATE, ABSOLUTE, HIGH = 1, 2, 4
PLAIN, LOW_KEPT, HIGH_KEPT = range(3)
DPP, SDWA, CMPX = 1, 2, 4
BY_LANE, BY_ALL, MATTERS, FROM_MEMORY, CHOSEN, OWN, UNSEEN = range(7)
VM, LGKM, UNORDERED = 1, 2, 4
SIGNED, LOW_HALF, HIGH_HALF = 32, 64, 128
SOURCES, READS, WRITES, WATCHED = 6, 8, 3, 9
LAYOUT = struct.Struct("<Q3i2H13B3x" + SOURCES * "2BH4B2I" + (READS + WRITES + WATCHED) * "2H")
NO_SOURCE = (0,) * 9
#: where each half of a result depends on its own sources
IN_PARTS = ("v_mad_u64_u32", "v_mad_i64_i32", "v_lshl_add_u64", "v_lshlrev_b64", "s_lshl_b64", "v_pk_add_f32",
            "v_pk_mul_f32", "v_pk_fma_f32", "v_pk_mov_b32", "v_swap_b32")


class Unknown(Exception):
    """The core has no handler for this."""


@functools.cache
def _inline(code: int, kind: str) -> int:
    return int(_bits(Binding.constant(None, code, kind)))  # type: ignore[arg-type]  # only literals need a binding


def _bits(value: np.generic) -> int:
    return int(np.asarray(value).view(f"u{value.dtype.itemsize}"))


class Lowered:
    """One instruction, lowered. reads, writes: as a binding has them."""

    def __init__(self, instruction: Instruction, kernel: Kernel, arch: str):
        self.instruction, self.fields, self.kernel, self.arch = instruction, instruction.fields, kernel, arch
        self.reads: list[tuple[str, int, int]] = []
        self.writes: list[tuple[str, int, int]] = []
        self.src: list[tuple] = []
        self.handler = ""
        self.imm = self.more = self.jump = self.dst = self.mask = self.modifier = self.place = self.omod = 0
        self.clamp = self.select = self.unused = self.matrix = 0
        self.rule = BY_LANE
        self.unheeded = 0   # of the reads, how many at the end the handler itself looks at
        self.exchange: tuple[np.ndarray, np.ndarray, np.ndarray, bool] | None = None  # lanes, there, written, zero

    def number(self, field: str) -> int:
        return self.instruction.number(field)

    def literal(self) -> int:
        assert self.instruction.literal is not None
        return self.instruction.literal

    # ---- operands, each of which is noted

    def note(self, into: list, register: int, count: int, agpr: bool = False) -> int:
        register += self.kernel.agpr_offset if agpr else 0
        if register + count > self.kernel.vgprs:
            raise Unknown
        into.append(("v", register, count))
        return register

    def source(self, code: int, kind: str, modifiers: int = 0, agpr: bool = False, select: tuple = (0, 0, 0)) -> None:
        size = SIZES[kind]
        if modifiers & (NEGATE | ABSOLUTE) and kind not in FLOATS:
            raise Unknown
        if code >= VGPR0:
            register = self.note(self.reads, code - VGPR0, max(1, size // 4), agpr)
            self.src.append((VECTOR, modifiers, register, *select, 0, 0, 0))
        elif code == LITERAL or 128 <= code <= 248:
            self.src.append(self._constant(code, kind, modifiers, select))
        elif code in (SCC, VCCZ, EXECZ):
            self.src.append(({SCC: SCC_BIT, VCCZ: VCCZ_BIT, EXECZ: EXECZ_BIT}[code], modifiers, 0, *select, 0, 0, 0))
        elif (code < 124 or code in (M0, EXEC, EXEC + 1)) and not (size == 8 and code & 1):
            self.reads.append(("s", code, max(1, size // 4)))
            self.src.append((ONE, modifiers, code, *select, 0, 0, 0))
        else:
            raise Unknown

    constant = Binding.constant

    def _constant(self, code: int, kind: str, modifiers: int, select: tuple) -> tuple:
        size = SIZES[kind]
        if code == LITERAL:
            if kind == "U" and self.literal() >> 31:
                raise Unknown
            value = _bits(self.constant(code, kind))
            if modifiers & HIGH and size == 2:
                value = self.literal() >> 16
        elif code in (*range(128, 209), *range(240, 249)):
            value = _inline(code, kind)
        else:
            raise Unknown
        return CONSTANT, modifiers, 0, *select, 0, value & 0xFFFFFFFF, value >> 32

    def immediate(self, value: int) -> None:
        self.src.append((CONSTANT, 0, 0, 0, 0, 0, 0, value & 0xFFFFFFFF, 0xFFFFFFFF if value < 0 else 0))

    def nothing(self) -> None:
        self.src.append(NO_SOURCE)

    def vector_result(self, register: int, words: int = 1, agpr: bool = False) -> None:
        self.dst = self.note(self.writes, register, words, agpr)

    def scalar_result(self, register: int, words: int) -> None:
        if words == 2 and register & 1:
            raise Unknown
        self.writes.append(("s", register, words))
        self.dst = register

    def mask_result(self, register: int) -> None:
        if register & 1:
            raise Unknown
        self.writes.append(("s", register, 2))
        self.mask = register

    # ---- to bytes

    def pack(self, address: int, exchange: int) -> bytes:
        """address: of the handler; exchange: number of the lanes that it exchanges."""
        name, family = self.instruction.name, self.instruction.family
        counters = Waits._counters(name, family)
        counter = sum({"vm": VM, "lgkm": LGKM}[c] for c in counters)
        if counters and family in ("SMEM", "FLAT"):
            counter |= UNORDERED
        reads, writes = _ranges(self.reads[:len(self.reads) - self.unheeded]), _ranges(self.writes)
        if counters:
            written = set(registers(self.writes))
            all_read = [r for r in registers(self.reads) if r not in written]
            watched = _joined(all_read + (list(written) if len(counters) > 1 else []))
        else:
            watched = reads + writes
        if len(reads) > READS or len(writes) > WRITES or len(watched) > WATCHED:
            watched = _joined(registers(self.reads + self.writes)) if not counters else watched
            reads, writes = _joined(registers(self.reads)), _joined(registers(self.writes))
            if len(reads) > READS or len(writes) > WRITES or len(watched) > WATCHED:
                address = 0
                reads = writes = watched = []
        more = exchange if self.exchange is not None else self.more
        flat: list[int] = []
        for each in self.src + [NO_SOURCE] * (SOURCES - len(self.src)):
            flat += each
        for ranges, room in ((reads, READS), (writes, WRITES), (watched, WATCHED)):
            for each in ranges:
                flat += each
            flat += [0] * (2 * (room - len(ranges)))
        return LAYOUT.pack(address, self.imm, more, self.jump, self.dst, self.mask, self.instruction.words, self.rule,
                           counter, self.modifier, self.place, self.omod, self.clamp, self.select, self.unused,
                           self.matrix, len(reads), len(writes), len(watched), *flat)


def _ranges(noted: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((first + SCALAR if kind == "s" else first, count) for kind, first, count in noted))


def _joined(numbers: list[int]) -> list[tuple[int, int]]:
    """Registers as ranges (first, count)."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found


# ---- scalar instructions

def _scalar(low: Lowered, specification: str) -> str:
    result, sources = specification.rstrip("!,").split("=")
    fields = low.fields
    operands = iter([getattr(fields, name).offset for name in ("ssrc0", "ssrc1") if hasattr(fields, name)])
    immediate = (fields.simm16 ^ 0x8000) - 0x8000 if hasattr(fields, "simm16") else 0
    for kind in sources:
        if kind in "kK":
            low.immediate(immediate if kind == "k" else immediate & 0xFFFF)
        elif kind == "D":
            low.source(fields.sdst.offset, result)
        elif kind != "c":
            low.source(fields.sdst.offset if "k" in sources.lower() else next(operands), kind)
    if "c" in sources:
        low.reads.append(("s", SCC, 1))
    if result:
        low.scalar_result(fields.sdst.offset, SIZES[result] // 4)
    if specification[-1] in "!," or not result:
        low.writes.append(("s", SCC, 1))
    return low.instruction.name


def _save_exec(low: Lowered) -> str:
    low.source(low.fields.ssrc0.offset, "U")
    low.scalar_result(low.fields.sdst.offset, 2)
    low.writes += [("s", SCC, 1), ("s", EXEC, 2)]
    return low.instruction.name


def _branch(low: Lowered) -> str:
    low.jump, low.rule = 1 + (low.fields.simm16 ^ 0x8000) - 0x8000, MATTERS
    for ending, register in (("scc", SCC), ("vcc", VCC), ("exec", EXEC)):
        if f"cbranch_{ending}" in low.instruction.name:
            low.reads.append(("s", register, 1 if register == SCC else 2))
    return low.instruction.name


def _waits(low: Lowered) -> str:
    low.rule, low.imm = UNSEEN, low.fields.simm16
    return low.instruction.name


def _unseen(handler: str) -> Callable[[Lowered], str]:
    def form(low: Lowered) -> str:
        low.rule = UNSEEN
        return handler
    return form


# ---- vector instructions

def _vector(low: Lowered, specification: str) -> str:
    fields, family, name = low.fields, low.instruction.family, low.instruction.name
    keep = specification.endswith("+")
    results, sources = specification.rstrip("+").split("=")
    dpp, sdwa = family.endswith("_DPP16"), "_SDWA" in family
    three = family.startswith("VOP3") and not family.startswith("VOP3P")
    neg, absolute = (fields.neg, getattr(fields, "abs", 0)) if three else (0, 0)
    opsel = getattr(fields, "opsel", 0) if three else 0
    if dpp or sdwa:
        neg = fields.src0_neg | fields.src1_neg << 1
        absolute = fields.src0_abs | fields.src1_abs << 1
    low.modifier = DPP if dpp else SDWA if sdwa else 0
    position = 0
    for kind in sources:
        if kind == "K":
            low.source(LITERAL, results[0])
        elif kind in "vm":
            low.source(fields.src2.offset if kind == "m" and hasattr(fields, "src2") else VCC, "U")
        elif kind == "D":
            low.source(low.number("vdst") + VGPR0, results[0])
        else:
            modifiers = NEGATE * (neg >> position & 1) | ABSOLUTE * (absolute >> position & 1)
            plain = "f" if modifiers and kind == "u" else kind  # v_cndmask_b32, whose operands may be floats
            if sdwa:
                _selected(low, position, plain, modifiers)
            elif dpp and position == 0:
                _moved(low, plain, modifiers)
            else:
                field = ("src0", "src1" if hasattr(fields, "src1") else "vsrc1", "src2")[position]
                high = HIGH * (opsel >> position & 1) if SIZES[kind] == 2 else 0
                low.source(getattr(fields, field).offset, plain, modifiers | high)
            position += 1
    if results != "m":
        _result(low, results[0], keep, three, sdwa)
    if "m" in results:
        register = VCC
        if hasattr(fields, "sdst") and not (sdwa and not fields.sd):
            register = fields.sdst.offset
        elif family.startswith("VOP3"):
            register = low.number("vdst")
        low.mask_result(register)
        if name.startswith("v_cmpx"):
            low.writes.append(("s", EXEC, 2))
            low.modifier |= CMPX
    if dpp:
        if any(SIZES.get(kind, 4) != 4 for kind in results[0] + sources):
            raise Unknown
        low.rule = BY_ALL
    elif name == "v_cndmask_b32":
        low.rule = CHOSEN
    return name


def _selected(low: Lowered, position: int, kind: str, modifiers: int) -> None:
    fields = low.fields
    code = fields.vsrc1.offset if position else fields.vsrc0.offset
    if getattr(fields, f"s{position}"):
        code -= VGPR0
    select, extend = getattr(fields, f"src{position}_sel"), getattr(fields, f"src{position}_sext")
    if select == 6 and SIZES[kind] == 4:
        low.source(code, kind, modifiers)
        return
    if SIZES[kind] == 8:
        raise Unknown
    shift, width = (8 * select, 8) if select < 4 else (16 * (select - 4), 16) if select < 6 else (0, 32)
    low.source(code, "u", 0, select=(shift, width, extend))
    last = low.src[-1]
    low.src[-1] = (last[0], modifiers, *last[2:])


def _moved(low: Lowered, kind: str, modifiers: int) -> None:
    fields = low.fields
    low.source(fields.vsrc0.offset, kind, modifiers)
    try:
        source, there = vector.dpp_lanes(fields.dpp)
    except NotImplementedError:
        raise Unknown from None
    lanes = np.arange(64)
    written = (fields.row_mask >> (lanes >> 4) & fields.bank_mask >> (lanes >> 2 & 3) & 1).astype(bool)
    low.exchange = source, there, written, bool(fields.bc)


def _result(low: Lowered, kind: str, keep: bool, three: bool, sdwa: bool) -> None:
    fields = low.fields
    low.omod, low.clamp = (fields.omod, fields.clmp) if three or sdwa else (0, 0)
    if (low.omod or low.clamp) and kind not in FLOATS or low.clamp and not low.kernel.dx10_clamp:
        raise Unknown
    if sdwa:
        low.select, low.unused = fields.dst_sel, fields.dst_unused
        if SIZES[kind] == 8 and low.select != 6:
            raise Unknown
    elif SIZES[kind] == 2:
        low.place = HIGH_KEPT if three and getattr(fields, "opsel", 0) & 8 else LOW_KEPT if keep else PLAIN
    low.vector_result(low.number("vdst"), max(1, SIZES[kind] // 4))
    if low.exchange is not None and not (low.exchange[3] and low.exchange[2].all()):
        low.note(low.reads, low.number("vdst"), 1)


def _bitop3(low: Lowered, kind: str) -> str:
    fields = low.fields
    low.imm = fields.omod << 6 | fields.abs << 3 | fields.neg
    opsel = fields.opsel if kind == "w" else 0
    for i in range(3):
        low.source(getattr(fields, f"src{i}").offset, kind, HIGH * (opsel >> i & 1))
    if kind == "w":
        low.place = HIGH_KEPT if opsel & 8 else LOW_KEPT
    low.vector_result(low.number("vdst"))
    return low.instruction.name


# ---- packed instructions

def _half(low: Lowered, i: int, kind: str, high_result: bool) -> None:
    """Source i of the low or the high result."""
    fields = low.fields
    select = fields.opsel_hi | fields.opsel_hi2 << 2 if high_result else fields.opsel
    negative = (fields.neg_hi if high_result else fields.neg) >> i & 1
    code, high = getattr(fields, f"src{i}").offset, select >> i & 1
    if negative and kind not in FLOATS:
        raise Unknown
    if kind == "f":
        if 128 <= code < VGPR0 and high:
            raise Unknown
        low.source(code + (high if code >= VGPR0 or code < 128 else 0), "f", NEGATE * negative)
    elif 128 <= code <= 248:
        word = int(packed._half_of_constant(low, code, kind, bool(high))().view(np.uint16)[0, 0])  # type: ignore
        low.src.append((CONSTANT, NEGATE * negative, 0, 0, 0, 0, 0, word, 0))
    else:
        low.source(code, "w" if kind == "b" else kind, NEGATE * negative | HIGH * high)


def _pair(low: Lowered, kind: str, count: int) -> str:
    low.clamp = low.fields.clmp
    if low.clamp and kind not in FLOATS:
        raise Unknown
    for high in (False, True):
        for i in range(count):
            _half(low, i, kind, high)
        low.src += [NO_SOURCE] * (3 - count)
    if kind == "f":
        register = low.number("vdst")
        low.vector_result(register + 1)
        low.vector_result(register)
        low.writes.reverse()
    else:
        low.vector_result(low.number("vdst"))
    return low.instruction.name


def _pk_mov(low: Lowered) -> str:
    for i in range(2):
        code, high = getattr(low.fields, f"src{i}").offset, low.fields.opsel >> i & 1
        if 128 <= code < VGPR0 and high:
            raise Unknown
        low.source(code + (high if code >= VGPR0 or code < 128 else 0), "u")
        low.src += [NO_SOURCE] * 2
    register = low.number("vdst")
    low.vector_result(register + 1)
    low.vector_result(register)
    low.writes.reverse()
    return low.instruction.name


def _mix(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name
    low.imm, low.clamp = fields.opsel_hi | fields.opsel_hi2 << 2, fields.clmp
    for i in range(3):
        small = low.imm >> i & 1
        modifiers = ABSOLUTE * (fields.neg_hi >> i & 1) | NEGATE * (fields.neg >> i & 1)
        low.source(getattr(fields, f"src{i}").offset, "h" if small else "f",
                   modifiers | (HIGH * (fields.opsel >> i & 1) if small else 0))
    low.place = LOW_KEPT if "mixlo" in name else HIGH_KEPT if "mixhi" in name else PLAIN
    low.vector_result(low.number("vdst"))
    return name


def _dot2(low: Lowered, kind: str) -> str:
    fields = low.fields
    if fields.neg & 3 or fields.neg_hi & 3 or fields.clmp:
        raise Unknown
    for high in (False, True):
        for i in range(2):
            _half(low, i, kind, high)
        if not high:
            low.nothing()
    low.source(fields.src2.offset, "f", NEGATE * (fields.neg >> 2 & 1))
    low.vector_result(low.number("vdst"))
    return low.instruction.name


def _dot4(low: Lowered) -> str:
    if low.fields.clmp:
        raise Unknown
    for i in range(3):
        low.source(getattr(low.fields, f"src{i}").offset, "u")
    low.vector_result(low.number("vdst"))
    return low.instruction.name


# ---- between lanes and scalars

def _to_scalar(low: Lowered) -> str:
    low.rule = OWN
    low.source(low.fields.src0.offset, "u")
    if low.instruction.name == "v_readlane_b32":
        if low.src[0][0] != VECTOR:
            raise Unknown
        low.source(low.fields.src1.offset, "u")
    if any(each[0] not in (VECTOR, ONE, CONSTANT) for each in low.src):
        raise Unknown
    low.scalar_result(low.number("vdst"), 1)
    return low.instruction.name


def _write_lane(low: Lowered) -> str:
    low.rule = OWN
    low.source(low.fields.src0.offset, "u")
    low.source(low.fields.src1.offset, "u")
    low.vector_result(low.number("vdst"))
    return low.instruction.name


def _accumulators(low: Lowered) -> str:
    name = low.instruction.name
    low.source(low.fields.src0.offset, "u", agpr="_write" not in name)
    low.vector_result(low.number("vdst"), agpr="_read" not in name)
    return name


def _swap(low: Lowered) -> str:
    one, other = low.number("vdst"), low.fields.src0.offset - VGPR0
    low.note(low.reads, one, 1)
    low.mask = low.note(low.reads, other, 1)
    low.vector_result(one)
    low.note(low.writes, other, 1)
    if low.instruction.name != "v_swap_b32":
        low.rule = BY_ALL
    return low.instruction.name


# ---- memory

def _scalar_load(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name
    buffer, size = "buffer" in name, name.rpartition("dword")[2]
    low.imm, low.more, low.rule = (fields.offset ^ 0x100000) - 0x100000 if fields.imm else 0, int(size[1:] or 1), FROM_MEMORY
    low.src.append((ONE, 0, fields.sbase.offset, 0, 0, 0, 0, 0, 0))
    if fields.soffset_en:
        low.source(fields.soffset.offset, "u")
    elif not fields.imm:
        low.source(fields.offset & 0x7F, "u")
    low.reads.append(("s", fields.sbase.offset, 4 if buffer else 2))
    low.writes.append(("s", fields.sdata.offset, low.more))
    low.dst = fields.sdata.offset
    return "scalar_buffer_load" if buffer else "scalar_load"


def _access(name: str) -> tuple[bool, int] | None:
    """(whether it stores, `more`) of load_<type> and store_<type>."""
    action, _, what = name.partition("_")
    high = HIGH_HALF if what.endswith("_hi") else 0
    what = what.removesuffix("_hi")
    if action == "load" and what in LOADS and not high:
        width, signed = LOADS[what]
        return False, width | SIGNED * bool(signed)
    if action == "load" and what in HALF_LOADS:
        width, signed = HALF_LOADS[what]
        return False, width | SIGNED * bool(signed) | (high or LOW_HALF)
    if action == "store" and what.removesuffix("_d16") in STORES:
        return True, STORES[what.removesuffix("_d16")] | high
    return None


def _memory(low: Lowered) -> str:
    fields, family = low.fields, low.instruction.family
    space, _, rest = low.instruction.name.partition("_")
    access = _access(rest)
    if access is None or family == "MUBUF" and fields.lds:
        raise Unknown
    stores, low.more = access
    low.rule = FROM_MEMORY
    if family == "MUBUF":
        register = low.number("vaddr")
        low.source(register + VGPR0, "u") if fields.idxen else low.nothing()
        low.source(register + fields.idxen + VGPR0, "u") if fields.offen else low.nothing()
        low.source(fields.soffset.offset, "u")
        low.reads.append(("s", fields.srsrc.offset, 4))
        low.src.append((ONE, 0, fields.srsrc.offset, 0, 0, 0, 0, 0, 0))
        low.imm = fields.offset
    elif space == "scratch":
        low.imm = (fields.offset ^ 0x1000) - 0x1000
        low.source(low.number("addr") + VGPR0, "u") if fields.sve else low.nothing()
        low.source(fields.saddr.offset, "u") if fields.saddr.offset != vmem.NO_SADDR else low.nothing()
    else:
        flat = family == "FLAT"
        alone = flat or fields.saddr.offset == vmem.NO_SADDR
        low.imm = fields.offset if flat else (fields.offset ^ 0x1000) - 0x1000
        low.source(low.number("addr") + VGPR0, "U" if alone else "u")
        low.nothing() if alone else low.source(fields.saddr.offset, "U")
        space = "global"
    words, data = max(1, (low.more & 31) // 4), "vdata" if family == "MUBUF" else "data" if stores else "vdst"
    low.dst = low.note(low.reads if stores else low.writes, low.number(data), words, bool(fields.acc))
    low.unheeded = int(stores and space == "buffer")
    return f"{space}_{'store' if stores else 'load'}"


def _lds(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name.removeprefix("ds_")
    if fields.gds:
        raise Unknown
    low.rule, acc = FROM_MEMORY, bool(fields.acc)
    twice = "2_" in name or "2st64_" in name
    kind = name.partition("_")[2]
    for _ in range(1 + twice):
        low.source(low.number("addr") + VGPR0, "u")
    del low.src[1:]
    low.imm = fields.offset0 | fields.offset1 << 8
    if twice:
        size = int(kind[1:]) // 8
        unit = size * (64 if "st64" in name else 1)
        low.imm, low.more = fields.offset0 * unit | fields.offset1 * unit << 16, size
        if max(fields.offset0, fields.offset1) * unit > 0xFFFF:
            raise Unknown
        if low.imm >= 1 << 31:
            low.imm -= 1 << 32
    if name.startswith("read"):
        half, plain = 0, kind
        if "_d16" in kind:
            half, plain = HIGH_HALF if kind.endswith("_hi") else LOW_HALF, kind.partition("_")[0]
        width, signed = (2 * low.more, None) if twice else lds.READS.get(plain, (0, None))
        if not width:
            raise Unknown
        if not twice:
            low.more = width | SIGNED * bool(signed) | half
        low.vector_result(low.number("vdst"), max(1, width // 4), acc)
        return "lds_read2" if twice else "lds_read"
    if name.startswith("write"):
        if not twice:
            plain = kind.removesuffix("_d16_hi")
            if plain not in lds.WRITES:
                raise Unknown
            low.more = lds.WRITES[plain] | (HIGH_HALF if kind != plain else 0)
        words = max(1, (low.more & 31) // 4)
        low.dst = low.note(low.reads, low.number("data0"), words, acc)
        if twice:
            low.mask = low.note(low.reads, low.number("data1"), words, acc)
        return "lds_write2" if twice else "lds_write"
    raise Unknown


def _exchange(low: Lowered) -> str:
    low.rule, low.imm = BY_ALL, low.fields.offset0 | low.fields.offset1 << 8
    low.source(low.number("addr") + VGPR0, "u")
    if low.instruction.name == "ds_swizzle_b32":
        everywhere = np.ones(64, bool)
        low.exchange = lds.swizzle(low.imm), everywhere, everywhere, False
    else:
        low.source(low.number("data0") + VGPR0, "u")
    low.vector_result(low.number("vdst"))
    return low.instruction.name


# ---- by mnemonic

def _forms() -> dict[str, Callable[[Lowered], str]]:
    forms: dict[str, Callable[[Lowered], str]] = {}
    for table in (scalar.SOP1, scalar.SOP2, scalar.SOPC, scalar.SOPK):
        forms |= {name: functools.partial(_scalar, specification=row[0]) for name, row in table.items()}
    forms |= {name: _save_exec for name in scalar.FORMS if "_saveexec_" in name or "_wrexec_" in name}
    forms |= {name: _branch for name in scalar.FORMS if name.startswith(("s_cbranch", "s_branch"))}
    forms |= {name: _unseen("nothing") for name, form in scalar.FORMS.items() if form is scalar._nothing}
    forms |= {"s_waitcnt": _waits, "s_endpgm": _unseen("s_endpgm"), "s_barrier": _unseen("s_barrier"),
              "v_nop": _unseen("v_nop")}
    for table in (*vector.TABLES, conversions.FOR_ARCH, conversions.GFX950):
        forms |= {name: functools.partial(_vector, specification=row[0]) for name, row in table.items()}
    forms |= {"v_bitop3_b32": functools.partial(_bitop3, kind="u"), "v_bitop3_b16": functools.partial(_bitop3, kind="w"),
              "v_readfirstlane_b32": _to_scalar, "v_readlane_b32": _to_scalar, "v_writelane_b32": _write_lane,
              "v_swap_b32": _swap, "v_permlane16_swap_b32": _swap, "v_permlane32_swap_b32": _swap,
              "v_pk_mov_b32": _pk_mov, "v_dot2_f32_f16": functools.partial(_dot2, kind="h"),
              "v_dot2_f32_bf16": functools.partial(_dot2, kind="b"), "v_dot4_i32_i8": _dot4, "v_dot4_u32_u8": _dot4}
    forms |= {name: _accumulators for name in vector.FORMS if name.startswith("v_accvgpr")}
    forms |= {name: _mix for name in packed.FORMS if name.startswith("v_mad_mix")}
    for name in (name for name in packed.FORMS if name.startswith("v_pk_") and name != "v_pk_mov_b32"):
        kind = {"f16": "h", "f32": "f", "i16": "s"}.get(name.rpartition("_")[2], "w")
        count = 3 if "_fma_" in name or "_mad_" in name else 2
        forms[name] = functools.partial(_pair, kind=kind, count=count)
    forms |= {f"ds_{name}": _exchange for name in ("bpermute_b32", "permute_b32", "swizzle_b32")}
    forms |= {name: _unseen("nothing") for name, form in (vmem.FORMS | {"ds_nop": vmem._nothing}).items()
              if form is vmem._nothing}
    return forms


FORMS = _forms()
GFX950_ONLY = frozenset(conversions.GFX950) | {"v_bitop3_b32", "v_bitop3_b16", "v_permlane16_swap_b32",
                                               "v_permlane32_swap_b32"}


def lower(instruction: Instruction, kernel: Kernel, arch: str) -> Lowered:
    """Its `handler` is empty where NumPy has to execute the instruction."""
    low, name, family = Lowered(instruction, kernel, arch), instruction.name, instruction.family
    try:
        form = FORMS.get(name)
        if form is None:
            form = {"SMEM": _scalar_load if "_load_" in name else None, "DS": _lds, "GLOBAL": _memory, "FLAT": _memory,
                    "SCRATCH": _memory, "MUBUF": _memory}.get(family)
        if form is None or name in GFX950_ONLY and arch != "gfx950":
            return low
        handler = form(low)
    except Unknown:
        return low
    if ("s", EXEC) in {(kind, first) for kind, first, _ in low.writes} or ("s", EXEC + 1, 1) in low.writes \
            or name in IN_PARTS:
        low.rule = MATTERS
    low.handler = handler
    return low
