"""VOP3P instructions besides the matrix ones: two 16-bit or 32-bit operations at once, mixed-precision fused
multiply-adds, and dot products. op_sel and op_sel_hi say which half of each source the low and the high result take.
"""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import arithmetic as ar
from wave64.testing.emulator import bits
from wave64.testing.emulator.binding import FLOATS, KINDS, Binding, Source, inline_constant
from wave64.testing.emulator.decode import VGPR0

F16, F32, U16, U32, U64 = np.float16, np.float32, np.uint16, np.uint32, np.uint64


def _sources(b: Binding, count: int) -> list[int]:
    return [getattr(b.fields, f"src{i}").offset for i in range(count)]


def _halves(b: Binding, kind: str, high_result: bool, count: int) -> list[Source]:
    """The sources of the low or the high result. kind: as in binding.py, or b: bf16, as its bits."""
    fields = b.fields
    select = fields.opsel_hi | fields.opsel_hi2 << 2 if high_result else fields.opsel
    negate = fields.neg_hi if high_result else fields.neg
    gets = []
    for i, code in enumerate(_sources(b, count)):
        high, negative = bool(select >> i & 1), bool(negate >> i & 1)
        if kind == "f":
            get = _word(b, code, high)
        elif 128 <= code <= 248:
            half = np.array([[half_of_constant(code, kind, high)]], U16)
            get = _always(half.view(KINDS["w" if kind == "b" else kind]))
        else:
            get = b.source(code, "w" if kind == "b" else kind, high=high)
        if negative and kind not in FLOATS:
            raise NotImplementedError("a sign modifier on an integer")
        get = b.canonical(get, kind)
        gets.append((lambda get=get: np.negative(get())) if negative else get)
    return gets


def _always(value: np.ndarray) -> Source:
    return lambda: value


def half_of_constant(code: int, kind: str, high: bool) -> int:
    """The bits of half an inline constant, which is 32 bits wide (so says LLVM's getInlineEncodingV216 of hardware, and
    calls AMD's manual misleading): integers are extended by their sign; a float is of the operand's format in the low
    half, zero in the high one; where integers are wanted it is fp32."""
    if code <= 208:
        word = inline_constant(code, "u")
    elif kind == "h":
        word = U32(inline_constant(code, "w"))
    else:
        word = inline_constant(code, "f").view(U32)
        word = word >> U32(16) if kind == "b" else word
    return int(word >> U32(16) if high else word & U32(0xFFFF))


def _word(b: Binding, code: int, high: bool, kind: str = "f") -> Source:
    """One register of a pair. A constant is the low one; of a scalar pair the operand names the even register."""
    if 128 <= code < VGPR0:
        if high:
            raise NotImplementedError("the high half of an inline constant")
        return b.source(code, kind)
    return b.source(code + int(high), kind)


def _pair(kind: str, function: Callable, count: int = 2) -> Callable:
    """Two results of 16 bits in a register."""
    def bind(b: Binding) -> Callable:
        if b.fields.clmp and kind not in FLOATS:
            raise NotImplementedError("clamping of an integer result")
        low, high = (_halves(b, kind, i, count) for i in (False, True))
        write, clamp = b.sink(b.number("vdst"), "u"), bool(b.fields.clmp)

        def result(gets: list[Source]) -> np.ndarray:
            value = function(*[get() for get in gets])
            if clamp:
                value = np.minimum(np.fmax(value, KINDS[kind](0)), KINDS[kind](1))
            return np.ascontiguousarray(value).view(U16).astype(U32)

        return lambda: write(result(low) | result(high) << U32(16))
    return bind


def _pair32(function: Callable, count: int) -> Callable:
    """Two results of 32 bits in a pair of registers."""
    def bind(b: Binding) -> Callable:
        low, clamp = _halves(b, "f", False, count), bool(b.fields.clmp)
        between = len(b.reads)
        high = _halves(b, "f", True, count)
        write_low, write_high = _sinks(b, "f", between)

        def run() -> None:
            first, second = function(*[get() for get in low]), function(*[get() for get in high])
            if clamp:
                first, second = (np.minimum(np.fmax(x, F32(0)), F32(1)) for x in (first, second))
            write_low(first)
            write_high(second)
        return run
    return bind


def _sinks(b: Binding, kind: str, between: int) -> tuple[Callable, Callable]:
    """What writes the two results, each of which depends on its own sources: those read before `between`, or after."""
    register = b.number("vdst")
    sinks = b.flushing(b.sink(register, kind), kind), b.flushing(b.sink(register + 1, kind), kind)
    b.parts = [(b.reads[:between], b.writes[:1]), (b.reads[between:], b.writes[1:])]
    return sinks


def _move(b: Binding) -> Callable:
    one, other = _sources(b, 2)
    low = _word(b, one, bool(b.fields.opsel & 1), "u")
    between = len(b.reads)
    high = _word(b, other, bool(b.fields.opsel & 2), "u")
    write_low, write_high = _sinks(b, "u", between)

    def run() -> None:
        first, second = low().copy(), high().copy()
        write_low(first)
        write_high(second)
    return run


def _mix(half: int | None) -> Callable:
    """fma in fp32 of sources that are fp32, or the half of a register as fp16; neg_hi means the absolute value.
    half: where the result goes as fp16, the other half kept."""
    def bind(b: Binding) -> Callable:
        fields = b.fields
        small = fields.opsel_hi | fields.opsel_hi2 << 2
        gets = []
        for i, code in enumerate(_sources(b, 3)):
            kind = "h" if small >> i & 1 else "f"
            get = b.source(code, kind, high=kind == "h" and bool(fields.opsel >> i & 1),
                           absolute=bool(fields.neg_hi >> i & 1), negative=bool(fields.neg >> i & 1))
            get = b.canonical(get, kind)
            gets.append((lambda get=get: get().astype(F32)) if kind == "h" else get)
        one, two, three = gets
        clamp = bool(fields.clmp)
        kind = "f" if half is None else "h"
        write = b.flushing(b.sink(b.number("vdst"), kind, high=None if half is None else bool(half)), kind)

        def run() -> None:
            value = ar.fma32(one(), two(), three())
            if clamp:
                value = np.minimum(np.fmax(value, F32(0)), F32(1))
            write(value if half is None else value.astype(F16))
        return run
    return bind


def _dot2(kind: str) -> Callable:
    """Two products of 16-bit floats and an fp32 addend, summed in fp64 and rounded once."""
    widen = (lambda x: ar.bf16_to_f32(x)) if kind == "b" else (lambda x: x.astype(F32))

    def bind(b: Binding) -> Callable:
        low, high = (_halves(b, kind, i, 2) for i in (False, True))
        if b.fields.neg & 3 or b.fields.neg_hi & 3 or b.fields.clmp:
            raise NotImplementedError("modifiers of a dot product")
        addend = b.canonical(b.source(b.fields.src2.offset, "f", negative=bool(b.fields.neg & 4)), "f")
        write = b.sink(b.number("vdst"), "f")

        def run() -> None:
            products = [np.multiply(*(widen(get()) for get in gets), dtype=np.float64) for gets in (low, high)]
            write((products[0] + products[1] + addend()).astype(F32))
        return run
    return bind


def _dot4(signed: bool) -> Callable:
    octet, wide, kind = (np.int8, np.int32, "i") if signed else (np.uint8, U32, "u")

    def bind(b: Binding) -> Callable:
        if b.fields.clmp:
            raise NotImplementedError("a saturating dot product")
        one, two = (b.source(code, "u") for code in _sources(b, 2))
        addend, write = b.source(b.fields.src2.offset, kind), b.sink(b.number("vdst"), kind)

        def run() -> None:
            total = addend()
            for shift in (0, 8, 16, 24):
                x, y = ((get() >> U32(shift)).astype(np.uint8).view(octet).astype(wide) for get in (one, two))
                total = total + x * y
            write(total)
        return run
    return bind


FORMS: dict[str, Callable] = {
    "v_pk_add_f16": _pair("h", np.add), "v_pk_mul_f16": _pair("h", np.multiply),
    "v_pk_fma_f16": _pair("h", ar.fma16, 3),
    "v_pk_max_f16": _pair("h", ar.maximum), "v_pk_min_f16": _pair("h", ar.minimum),
    "v_pk_add_u16": _pair("w", np.add), "v_pk_sub_u16": _pair("w", np.subtract),
    "v_pk_add_i16": _pair("s", np.add), "v_pk_sub_i16": _pair("s", np.subtract),
    "v_pk_mul_lo_u16": _pair("w", np.multiply), "v_pk_mad_u16": _pair("w", lambda a, b, c: a * b + c, 3),
    "v_pk_mad_i16": _pair("s", lambda a, b, c: a * b + c, 3),
    "v_pk_max_u16": _pair("w", np.maximum), "v_pk_min_u16": _pair("w", np.minimum),
    "v_pk_max_i16": _pair("s", np.maximum), "v_pk_min_i16": _pair("s", np.minimum),
    "v_pk_lshlrev_b16": _pair("w", lambda a, b: bits.shift_left(b, a)),
    "v_pk_lshrrev_b16": _pair("w", lambda a, b: bits.shift_right(b, a)),
    "v_pk_ashrrev_i16": _pair("s", lambda a, b: bits.shift_right(b, a)),
    "v_pk_add_f32": _pair32(np.add, 2), "v_pk_mul_f32": _pair32(np.multiply, 2), "v_pk_fma_f32": _pair32(ar.fma32, 3),
    "v_pk_mov_b32": _move,
    "v_mad_mix_f32": _mix(None), "v_mad_mixlo_f16": _mix(0), "v_mad_mixhi_f16": _mix(1),
    "v_dot2_f32_f16": _dot2("h"), "v_dot2_f32_bf16": _dot2("b"),
    "v_dot4_i32_i8": _dot4(True), "v_dot4_u32_u8": _dot4(False),
}
