"""Vector instructions for the core: VOP1, VOP2, VOPC, VOP3 and VOP3P but for matrices, with their modifiers."""

import numpy as np

from wave64.testing.emulator import operations, packed, vector
from wave64.testing.emulator.binding import FLOATS, SIZES
from wave64.testing.emulator.decode import EXEC, LITERAL, VCC, VGPR0
from wave64.testing.emulator.lowered import (
    ABSOLUTE,
    BY_ALL,
    CHOSEN,
    CMPX,
    CONSTANT,
    DPP,
    HIGH,
    HIGH_KEPT,
    LOW_KEPT,
    NEGATE,
    NO_SOURCE,
    ONE,
    OWN,
    PLAIN,
    SDWA,
    VECTOR,
    Lowered,
    Unknown,
)

# ---- vector instructions

def any_encoding(low: Lowered, specification: str) -> str:
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
    return name + low.suffix


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
    low.src[-1] = (last[0], modifiers | low.by_mode(kind), *last[2:])


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
    fields, family = low.fields, low.instruction.family
    low.omod, low.clamp = (fields.omod, fields.clmp) if three or sdwa else (0, 0)
    low.flush = int(kind == "f" and low.kernel.flushes)
    if low.clamp and not low.omod and low.instruction.name in operations.SATURATING and family == "VOP3":
        low.clamp, low.suffix = 0, "_clamped"
    if (low.omod or low.clamp) and kind not in FLOATS or low.clamp and not low.kernel.dx10_clamp:
        raise Unknown
    if sdwa:
        low.select, low.unused = fields.dst_sel, fields.dst_unused
        if SIZES[kind] == 8 and low.select != 6:
            raise Unknown
    elif SIZES[kind] == 2:
        low.half = HIGH_KEPT if three and getattr(fields, "opsel", 0) & 8 else LOW_KEPT if keep else PLAIN
    low.vector_result(low.number("vdst"), max(1, SIZES[kind] // 4))
    if low.exchange is not None and not (low.exchange[3] and low.exchange[2].all()):
        low.note(low.reads, low.number("vdst"), 1)


def bitop3(low: Lowered, kind: str) -> str:
    fields = low.fields
    low.imm = fields.omod << 6 | fields.abs << 3 | fields.neg
    opsel = fields.opsel if kind == "w" else 0
    for i in range(3):
        low.source(getattr(fields, f"src{i}").offset, kind, HIGH * (opsel >> i & 1))
    if kind == "w":
        low.half = HIGH_KEPT if opsel & 8 else LOW_KEPT
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
        word = packed.half_of_constant(code, kind, bool(high))
        low.src.append((CONSTANT, NEGATE * negative, 0, 0, 0, 0, 0, word, 0))
    else:
        low.source(code, "w" if kind == "b" else kind, NEGATE * negative | HIGH * high)


def pair(low: Lowered, kind: str, count: int) -> str:
    low.clamp = low.fields.clmp
    if low.clamp and kind not in FLOATS:
        raise Unknown
    for high in (False, True):
        for i in range(count):
            _half(low, i, kind, high)
        low.src += [NO_SOURCE] * (3 - count)
    if kind == "f":
        low.flush = int(low.kernel.flushes)
        register = low.number("vdst")
        low.vector_result(register + 1)
        low.vector_result(register)
        low.writes.reverse()
    else:
        low.vector_result(low.number("vdst"))
    return low.instruction.name


def pk_mov(low: Lowered) -> str:
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


def mix(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name
    low.imm, low.clamp = fields.opsel_hi | fields.opsel_hi2 << 2, fields.clmp
    for i in range(3):
        small = low.imm >> i & 1
        modifiers = ABSOLUTE * (fields.neg_hi >> i & 1) | NEGATE * (fields.neg >> i & 1)
        low.source(getattr(fields, f"src{i}").offset, "h" if small else "f",
                   modifiers | (HIGH * (fields.opsel >> i & 1) if small else 0))
    low.half = LOW_KEPT if "mixlo" in name else HIGH_KEPT if "mixhi" in name else PLAIN
    low.flush = int(low.half == PLAIN and low.kernel.flushes)
    low.vector_result(low.number("vdst"))
    return name


def dot2(low: Lowered, kind: str) -> str:
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


def dot4(low: Lowered) -> str:
    if low.fields.clmp:
        raise Unknown
    for i in range(3):
        low.source(getattr(low.fields, f"src{i}").offset, "u")
    low.vector_result(low.number("vdst"))
    return low.instruction.name


# ---- between lanes and scalars

def to_scalar(low: Lowered) -> str:
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


def write_lane(low: Lowered) -> str:
    low.rule = OWN
    low.source(low.fields.src0.offset, "u")
    low.source(low.fields.src1.offset, "u")
    low.vector_result(low.number("vdst"))
    return low.instruction.name


def accumulators(low: Lowered) -> str:
    name = low.instruction.name
    low.source(low.fields.src0.offset, "u", agpr="_write" not in name)
    low.vector_result(low.number("vdst"), agpr="_read" not in name)
    return name


def swap(low: Lowered) -> str:
    one, other = low.number("vdst"), low.fields.src0.offset - VGPR0
    low.note(low.reads, one, 1)
    low.mask = low.note(low.reads, other, 1)
    low.vector_result(one)
    low.note(low.writes, other, 1)
    if low.instruction.name != "v_swap_b32":
        low.rule = BY_ALL
    return low.instruction.name
