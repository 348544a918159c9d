"""Vector instructions: VOP1, VOP2, VOPC and VOP3, with their modifiers, DPP and SDWA, around the tables of
operations.py and conversions.py; and those that move between lanes, or between lanes and scalars.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wave64.testing.emulator import arithmetic, conversions, operations
from wave64.testing.emulator.binding import FLOATS, KINDS, SIZES, Binding, Follow, Known, Source
from wave64.testing.emulator.decode import EXEC, VCC, VGPR0
from wave64.testing.emulator.memory import EmulationError

U16, U32 = np.uint16, np.uint32
LANES = np.arange(64)


def alu(specification: str, function: Callable) -> Callable:
    """A form for any encoding of a row of a table."""
    keep = specification.endswith("+")
    results, sources = specification.rstrip("+").split("=")

    def bind(b: Binding) -> Callable:
        gets, moved, ends = _sources(b, sources, results[0])
        enabled = moved.enabled if moved else None
        chooses = gets[2] if b.instruction.name == "v_cndmask_b32" else None
        if moved or chooses:
            b.follow = _follow(b, ends, moved, chooses)
        value = _call(_saturating(b) or function, gets)
        if results == "m":
            write_mask = _mask_result(b)
            return lambda: write_mask(value())
        write = _result(b, results[0], keep, enabled)
        if results == results[0]:
            return lambda: write(value())
        write_mask = _mask_result(b)

        def run() -> None:
            number, mask = value()
            write(number)
            write_mask(mask)
        return run
    return bind


def _saturating(b: Binding) -> Callable | None:
    """What an integer addition or subtraction computes with the clamp bit set: clamped to the type, not wrapped."""
    if not getattr(b.fields, "clmp", 0) or b.instruction.family != "VOP3":
        return None
    return operations.SATURATING.get(b.instruction.name)


def _call(function: Callable, gets: list[Source]) -> Callable:
    if len(gets) == 1:
        one, = gets
        return lambda: function(one())
    if len(gets) == 2:
        one, two = gets
        return lambda: function(one(), two())
    if len(gets) == 3:
        one, two, three = gets
        return lambda: function(one(), two(), three())
    return lambda: function(*[get() for get in gets])


# ---- sources

class Moved(NamedTuple):
    """The first source of DPP: what it gives; which lanes are written, None: those of EXEC; and, from what is known of
    a register, what is known of what lanes get of it."""

    get: Source
    enabled: Callable | None
    known: Callable[[np.ndarray], np.ndarray]


def _follow(b: Binding, ends: list[int], moved: Moved | None, chooses: Source | None) -> Follow:
    """Of the sources that end at `ends` in the binding's reads, with DPP's lanes of the first. chooses: the mask that
    takes the second or the first, of which the other does not matter. A mask that is not known as a whole is let pass:
    compilers merge masks in whose bits, of lanes that are off, nothing was written."""
    def follow(known: Known) -> list:
        sources = []
        for start, end in zip([0, *ends], ends, strict=False):
            each = [register for i in range(start, end) for register in known(i)]
            sources.append(functools.reduce(np.logical_and, each, np.ones((b.party.count, 64), bool)))
        if moved:
            sources[0] = moved.known(sources[0])
        if chooses:
            first, second, mask = sources
            sources = [np.where(mask, np.where(chooses(), second, first), first & second)]
        new = functools.reduce(np.logical_and, sources)
        lanes = moved.enabled() & b.party.mask if moved and moved.enabled else None
        return [(i, new, lanes) for i in range(len(b.writes))]
    return follow


def _sources(b: Binding, kinds: str, result: str) -> tuple[list[Source], Moved | None, list[int]]:
    """A function per source; with DPP what it moves; and up to where each source's registers are in the binding's
    reads."""
    fields, family = b.fields, b.instruction.family
    dpp, sdwa = family.endswith("_DPP16"), "_SDWA" in family
    three = family.startswith("VOP3") and not family.startswith("VOP3P")
    neg = fields.neg if three else 0
    absolute = getattr(fields, "abs", 0) if three else 0
    opsel = getattr(fields, "opsel", 0) if three else 0
    if dpp or sdwa:
        neg = fields.src0_neg | fields.src1_neg << 1
        absolute = fields.src0_abs | fields.src1_abs << 1
    names = ["src0", "src1" if hasattr(fields, "src1") else "vsrc1", "src2"]
    gets, ends, moved, position = [], [], None, 0
    for kind in kinds:
        if kind == "K":
            gets.append(b.canonical(b.source(255, result), result))
        elif kind == "v":
            gets.append(b.lane_mask(VCC))
        elif kind == "m":
            gets.append(b.lane_mask(fields.src2.offset if hasattr(fields, "src2") else VCC))
        elif kind == "D":
            gets.append(b.canonical(b.vector(b.number("vdst"), result), result))
        else:
            negative, positive = bool(neg >> position & 1), bool(absolute >> position & 1)
            bits_only = (negative or positive) and kind == "u"  # v_cndmask_b32, whose operands may be floats
            plain = "f" if bits_only else kind
            if sdwa:
                get = _selected(b, position, plain)
            elif dpp and position == 0:
                moved = _moved(b, plain)
                get = moved.get
            else:
                get = b.source(getattr(fields, names[position]).offset, plain, high=bool(opsel >> position & 1))
            get = b.canonical(get, kind)
            if positive:
                get = _then(np.abs, get)
            if negative:
                get = _then(np.negative, get)
            gets.append(_then(lambda x: x.view(U32), get) if bits_only else get)
            position += 1
        ends.append(len(b.reads))
    return gets, moved, ends


def _then(function: Callable, get: Source) -> Source:
    return lambda: function(get())


def _selected(b: Binding, position: int, kind: str) -> Source:
    """A source of SDWA: a byte, a word or all of a register, extended."""
    fields = b.fields
    code = fields.vsrc0.offset if position == 0 else fields.vsrc1.offset
    if getattr(fields, f"s{position}"):
        code -= VGPR0
    select, extend = getattr(fields, f"src{position}_sel"), getattr(fields, f"src{position}_sext")
    if select == 6 and SIZES[kind] == 4:
        return b.source(code, kind)
    get, dtype = b.source(code, "u"), KINDS[kind]
    shift, width = (8 * select, 8) if select < 4 else (16 * (select - 4), 16) if select < 6 else (0, 32)
    signed = {8: np.int8, 16: np.int16, 32: np.int32}[width]

    def run() -> np.ndarray:
        value = get() >> U32(shift)
        value = value.astype(signed).astype(np.int32).view(U32) if extend else value & U32(2**width - 1)
        return value.astype(U16).view(dtype) if SIZES[kind] == 2 else value.view(dtype)
    return run


def dpp_lanes(control: int) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads, and whether there is one."""
    row, inner, count, everywhere = LANES & ~15, LANES & 15, control & 15, np.ones(64, bool)
    if control < 0x100:
        return LANES & ~3 | (control >> 2 * (LANES & 3) & 3), everywhere
    if 0x101 <= control <= 0x10F:
        return row | (inner + count & 15), inner + count < 16
    if 0x111 <= control <= 0x11F:
        return row | (inner - count & 15), inner >= count
    if 0x121 <= control <= 0x12F:
        return row | (inner - count & 15), everywhere
    if 0x150 <= control <= 0x15F:
        return row | count, everywhere
    known = {0x130: (LANES + 1 & 63, LANES < 63), 0x134: (LANES + 1 & 63, everywhere),
             0x138: (LANES - 1 & 63, LANES > 0), 0x13C: (LANES - 1 & 63, everywhere),
             0x140: (row | 15 - inner, everywhere), 0x141: (LANES & ~7 | 7 - (LANES & 7), everywhere),
             0x142: (row - 1 & 63, LANES >= 16), 0x143: (np.full(64, 31), LANES >= 32)}
    if control not in known:
        raise NotImplementedError(f"DPP control 0x{control:x}")
    return known[control]


def _moved(b: Binding, kind: str) -> Moved:
    """Written are the rows and banks that the masks have and, unless bound_ctrl makes it 0, only where the lane read is
    there and on."""
    fields, party = b.fields, b.party
    data = b.vector(fields.vsrc0.offset - VGPR0, kind)
    source, there = dpp_lanes(fields.dpp)
    written = (fields.row_mask >> (LANES >> 4) & fields.bank_mask >> (LANES >> 2 & 3) & 1).astype(bool)
    zero = KINDS[kind](0)
    if there.all():
        there = None

    def valid() -> np.ndarray | None:
        if party.full:
            return there
        on = party.mask[:, source]
        return on if there is None else on & there

    def get() -> np.ndarray:
        value, ok = data()[:, source], valid()
        return value if ok is None else np.where(ok, value, zero)

    def known(register: np.ndarray) -> np.ndarray:
        ok = valid()
        return register[:, source] if ok is None else register[:, source] | ~ok

    if fields.bc and written.all():
        return Moved(get, None, known)
    if fields.bc:
        return Moved(get, lambda: written, known)

    def enabled() -> np.ndarray:
        ok = valid()
        return written if ok is None else written & ok
    return Moved(get, enabled, known)


# ---- results

def _result(b: Binding, kind: str, keep: bool, enabled: Callable | None) -> Callable[[np.ndarray], None]:
    fields, family = b.fields, b.instruction.family
    three = family.startswith("VOP3") and not family.startswith("VOP3P")
    omod = fields.omod if three or "_SDWA" in family else 0
    clamp = fields.clmp if three or "_SDWA" in family else 0
    if (omod or clamp) and kind not in FLOATS:
        if omod or _saturating(b) is None:
            raise NotImplementedError("clamping of an integer result")
        clamp = 0
    if "_SDWA" in family:
        write = _placed(b, kind)
    else:
        high = None
        if SIZES[kind] == 2 and three and getattr(fields, "opsel", 0) & 8:
            high = True
        elif keep:
            high = False
        write = b.sink(b.number("vdst"), kind, high=high)
    if enabled is None:
        write = b.flushing(write, kind)
    if omod or clamp:
        scale = KINDS[kind]((1, 2, 4, 0.5)[omod])
        plain, one = write, KINDS[kind](1)
        low = np.fmax if b.machine.kernel.dx10_clamp else np.maximum

        def scaled(value: np.ndarray) -> None:
            value = value * scale
            plain(np.minimum(low(value, KINDS[kind](0)), one) if clamp else value)
        write = scaled
    if kind == "h":
        write = _no_overflow(b, write)
    if enabled is None:
        return write
    if SIZES[kind] != 4:
        raise NotImplementedError("DPP with a result of other than 32 bits")
    old, inner = b.vector(b.number("vdst"), kind)(), write
    return b.flushing(lambda value: inner(np.where(enabled(), value, old)), kind)


def _no_overflow(b: Binding, write: Callable) -> Callable[[np.ndarray], None]:
    saturates = b.machine.fp16_overflow[b.party.waves]

    def checked(value: np.ndarray) -> None:
        if saturates.any() and np.isinf(value).any():
            raise NotImplementedError("an infinite fp16 result while FP16_OVFL is set")
        write(value)
    return checked


def _placed(b: Binding, kind: str) -> Callable[[np.ndarray], None]:
    """SDWA's destination: a byte, a word or all of a register; the rest zero, sign or kept."""
    select, unused, register = b.fields.dst_sel, b.fields.dst_unused, b.number("vdst")
    if SIZES[kind] == 8:
        if select != 6:
            raise NotImplementedError("SDWA that places a 64-bit result")
        return b.sink(register, kind)
    write = b.sink(register, "u")
    unsigned = U32 if SIZES[kind] == 4 else U16

    def bits(value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(value).view(unsigned).astype(U32)

    if select == 6:
        return lambda value: write(bits(value))
    shift, width = (8 * select, 8) if select < 4 else (16 * (select - 4), 16)
    limit, old = U32(2**width - 1), b.party.V[register]
    if unused == 2:
        return lambda value: write(old & ~(limit << U32(shift)) | (bits(value) & limit) << U32(shift))
    if unused == 1:
        signed = {8: np.int8, 16: np.int16}[width]
        return lambda value: write(bits(value).astype(signed).astype(np.int32).view(U32) << U32(shift))
    return lambda value: write((bits(value) & limit) << U32(shift))


def _mask_result(b: Binding) -> Callable[[np.ndarray], None]:
    fields, register = b.fields, VCC
    if hasattr(fields, "sdst") and not ("_SDWA" in b.instruction.family and not fields.sd):
        register = fields.sdst.offset
    elif b.instruction.family.startswith("VOP3"):
        register = b.number("vdst")
    write = b.lane_mask_sink(register)
    if not b.instruction.name.startswith("v_cmpx"):
        return write
    party = b.party
    b.writes.append(("s", EXEC, 2))

    def write_both(value: np.ndarray) -> None:
        write(value)
        party.exec[...] = party.S64[:, register // 2]
        party.exec_changed()
    return write_both


# ---- between lanes and scalars

def _first_lanes(b: Binding) -> np.ndarray:
    """The first lane that EXEC has, lane 0 where it is empty."""
    return np.argmax(b.party.mask, axis=1)


def _read_first_lane(b: Binding) -> Callable:
    get, write = b.source(b.fields.src0.offset, "u"), b.scalar_sink(b.number("vdst"), "u")
    waves = np.arange(b.party.count)
    if b.reads[0][0] == "v":
        b.follow = lambda known: [(0, known(0)[0][waves, _first_lanes(b)][:, None], None)]

    def run() -> None:
        value = get()
        write(value[waves, _first_lanes(b)] if value.shape[1] == 64 else value[:, 0])
    return run


def _read_lane(b: Binding) -> Callable:
    get, lane = b.source(b.fields.src0.offset, "u"), b.scalar(b.fields.src1.offset, "u")
    write, waves = b.scalar_sink(b.number("vdst"), "u"), np.arange(b.party.count)
    b.follow = lambda known: [(0, (known(0)[0][waves, lane() & U32(63)] & _of_scalars(b, known, 1))[:, None], None)]
    return lambda: write(get()[waves, lane() & U32(63)])


def _of_scalars(b: Binding, known: Known, first: int) -> np.ndarray:
    """[waves]: where all the scalar sources are known that the binding reads from `first` on."""
    each = [register[:, 0] for i in range(first, len(b.reads)) for register in known(i)]
    return functools.reduce(np.logical_and, each, np.ones(b.party.count, bool))


def _write_lane(b: Binding) -> Callable:
    get, lane = b.scalar(b.fields.src0.offset, "u"), b.scalar(b.fields.src1.offset, "u")
    register = b.number("vdst")
    b.note(b.writes, register, 1)
    to, waves = b.party.V[register], np.arange(b.party.count)

    def follow(known: Known) -> list:
        written = np.zeros((b.party.count, 64), bool)
        written[waves, lane() & U32(63)] = True
        return [(0, np.broadcast_to(_of_scalars(b, known, 0)[:, None], written.shape), written)]
    b.follow = follow

    def run() -> None:
        to[waves, lane() & U32(63)] = get()
    return run


def _acc_read(b: Binding) -> Callable:
    get, write = b.source(b.fields.src0.offset, "u", agpr=True), b.sink(b.number("vdst"), "u")
    return lambda: write(get())


def _acc_write(b: Binding) -> Callable:
    get, write = b.source(b.fields.src0.offset, "u"), b.sink(b.number("vdst"), "u", agpr=True)
    return lambda: write(get())


def _acc_move(b: Binding) -> Callable:
    get, write = b.source(b.fields.src0.offset, "u", agpr=True), b.sink(b.number("vdst"), "u", agpr=True)
    return lambda: write(get())


def _swap(b: Binding) -> Callable:
    one, other = b.number("vdst"), b.fields.src0.offset - VGPR0
    get_one, get_other = b.vector(one, "u")(), b.vector(other, "u")()
    write_one, write_other = b.sink(one, "u"), b.sink(other, "u")
    b.parts = [(b.reads[1:], b.writes[:1]), (b.reads[:1], b.writes[1:])]

    def run() -> None:
        kept = get_one.copy()
        write_one(get_other)
        write_other(kept)
    return run


def _permlane_swap(width: int) -> Callable:
    """gfx950: rows of `width` lanes of the destination, every second from 1 on, change place with the source's rows
    before them."""
    def bind(b: Binding) -> Callable:
        party, one, other = b.party, b.number("vdst"), b.fields.src0.offset - VGPR0
        b.note(b.reads, one, 1)
        b.note(b.reads, other, 1)
        b.writes += b.reads
        shape = (party.count, 32 // width, 2, width)

        def swapped(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            first, second = first.copy().reshape(shape), second.copy().reshape(shape)
            kept = first[:, :, 1].copy()
            first[:, :, 1], second[:, :, 0] = second[:, :, 0], kept
            return first.reshape(-1, 64), second.reshape(-1, 64)

        b.follow = lambda known: [(i, new, None) for i, new in enumerate(swapped(known(0)[0], known(1)[0]))]

        def run() -> None:
            if not party.full:
                raise EmulationError("a lane swap with lanes off")
            party.V[one][...], party.V[other][...] = swapped(party.V[one], party.V[other])
        return run
    return bind


def _for_arch(specification: str, function: Callable) -> Callable:
    def bind(b: Binding) -> Callable:
        arch, saturate = b.machine.arch, b.machine.fp16_overflow[b.party.waves][:, None]
        return alu(specification, lambda *values: function(arch, saturate, *values))(b)
    return bind


def _gfx950(form: Callable) -> Callable:
    def bind(b: Binding) -> Callable:
        if b.machine.arch != "gfx950":
            raise NotImplementedError(f"{b.instruction.name} is an instruction of gfx950")
        return form(b)
    return bind


def _bitop3(kind: str) -> Callable:
    """Any function of three bits: its truth table, by bit 4a + 2b + c, lies in the modifiers' bits."""
    def bind(b: Binding) -> Callable:
        table = b.fields.omod << 6 | b.fields.abs << 3 | b.fields.neg
        opsel = b.fields.opsel if kind == "w" else 0
        gets = [b.source(getattr(b.fields, f"src{i}").offset, kind, high=bool(opsel >> i & 1)) for i in range(3)]
        write = b.sink(b.number("vdst"), kind, high=bool(opsel & 8))
        rows = [i for i in range(8) if table >> i & 1]

        def run() -> None:
            x, y, z = (get() for get in gets)
            total = KINDS[kind](0)
            for i in rows:
                total = total | (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
            write(total)
        return run
    return bind


def _to_e2m1(b: Binding) -> Callable:
    """Two floats over a power of two, to a byte of the destination, the others kept."""
    gets, _, _ = _sources(b, "fff", "u")
    register, shift = b.number("vdst"), U32(8 * (b.fields.opsel >> 2))
    write, old = b.sink(register, "u"), b.party.V[register]

    def run() -> None:
        low, high, scale = (get() for get in gets)
        exponent = arithmetic.exponents(scale)
        if (np.broadcast_to(exponent == 255, b.party.mask.shape) & b.party.mask).any():
            raise NotImplementedError("a conversion with a scale of infinity or NaN")
        codes = arithmetic.e2m1(low, exponent) | arithmetic.e2m1(high, exponent) << U32(4)
        write(old & ~(U32(255) << shift) | codes << shift)
    return run


TABLES = (operations.MOVES, operations.INTEGERS, operations.SHORTS, operations.FLOATS, conversions.CONVERSIONS,
          conversions.COMPARISONS)
FORMS: dict[str, Callable] = {name: alu(*row) for table in TABLES for name, row in table.items()}
FORMS |= {name: _for_arch(*row) for name, row in conversions.FOR_ARCH.items()}
FORMS |= {name: _gfx950(_for_arch(*row)) for name, row in conversions.FOR_GFX950.items()}
FORMS |= {name: _gfx950(alu(*row)) for name, row in conversions.GFX950.items()}
FORMS |= {
    "v_nop": lambda b: lambda: None, "v_readfirstlane_b32": _read_first_lane, "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane, "v_accvgpr_read": _acc_read, "v_accvgpr_write": _acc_write,
    "v_accvgpr_read_b32": _acc_read, "v_accvgpr_write_b32": _acc_write, "v_swap_b32": _swap,
    "v_accvgpr_mov_b32": _acc_move,
    "v_cvt_scalef32_pk_fp4_f32": _gfx950(_to_e2m1),
    "v_bitop3_b32": _gfx950(_bitop3("u")), "v_bitop3_b16": _gfx950(_bitop3("w")),
    "v_permlane16_swap_b32": _gfx950(_permlane_swap(16)), "v_permlane32_swap_b32": _gfx950(_permlane_swap(32)),
}
