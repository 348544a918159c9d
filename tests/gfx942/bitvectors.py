"""Values of AMD's pseudo-code: bits with a width and a kind, conversions, operators, functions it calls.

Integers wrap to their width. Floating-point arithmetic is exact and rounded once, but for the transcendental functions,
which are the platform's fp64.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import formats
from formats import BY_WIDTH, FP4, Format, Number, over, plus, times

TYPE = re.compile(r"(u|i|b|f|bf|fp)(\d+)$")


class Value(NamedTuple):
    bits: int
    width: int
    kind: str  # u, i: integers; b: bits; f, bf, fp: floating point (fp8; bf8 is bf of width 8); denormal: any such


def format_of(kind: str, width: int, arch: str = "") -> Format:
    if width == 8:
        return (formats.FP8 if kind == "fp" else formats.BF8)[arch]
    return formats.BF16 if kind == "bf" else BY_WIDTH[width]


def real(value: Value) -> Number:
    if value.kind in ("f", "bf"):
        return format_of(value.kind, value.width).number(value.bits)
    return Fraction(integer(value)) or 0.0


def integer(value: Value) -> int:
    if value.kind in ("f", "bf"):
        number = real(value)
        return 0 if number != number else int(number)
    return value.bits - (value.bits >> value.width - 1 << value.width) if value.kind == "i" else value.bits


def floating(number: Number, width: int, kind: str = "f") -> Value:
    return Value(format_of(kind, width).bits(number), width, kind)


def whole(number: int, width: int, kind: str) -> Value:
    return Value(number & (1 << width) - 1, width, kind)


def convert(value: Value, kind: str, width: int) -> Value:
    """As casts and assignments do: numbers between integer and floating-point types, bits where one side is bits."""
    if (kind, width) == (value.kind, value.width):
        return value
    if kind in ("f", "bf"):
        if value.kind in ("f", "bf"):
            return _between(value, kind, width)
        return Value(value.bits & (1 << width) - 1, width, kind) if value.kind == "b" or value.width == width else (
            floating(real(value), width, kind))
    if value.kind in ("f", "bf") and kind == "b":
        return Value(value.bits, width, kind)
    if value.kind in ("f", "bf") and value.width == width:
        return Value(value.bits, width, kind)
    return whole(integer(value), width, kind)


def _between(value: Value, kind: str, width: int) -> Value:
    number = real(value)
    if number == number:
        return floating(number, width, kind)
    one, other = format_of(value.kind, value.width), format_of(kind, width)  # a NaN keeps its payload's top
    payload = value.bits & (1 << one.mantissa) - 1
    shift = other.mantissa - one.mantissa
    payload = payload << shift if shift >= 0 else payload >> -shift
    top = (1 << other.exponent) - 1 << other.mantissa
    return Value(value.bits >> value.width - 1 << width - 1 | top | (payload or 1), width, kind)


def is_nan(value: Value) -> bool:
    return real(value) != real(value)


def is_quiet(value: Value) -> bool:
    return is_nan(value) and bool(value.bits >> format_of(value.kind, value.width).mantissa - 1 & 1)


def _quieted(value: Value) -> Value:
    return value._replace(bits=value.bits | 1 << format_of(value.kind, value.width).mantissa - 1)


def is_denormal(value: Value) -> bool:
    form = format_of(value.kind, value.width)
    size = value.bits & (1 << value.width - 1) - 1
    return 0 < size < 1 << form.mantissa


def truth(condition: bool) -> Value:
    return Value(int(condition), 1, "u")


def binary(sign: str, a: Value, b: Value) -> Value:
    if "denormal" in (a.kind, b.kind):
        return truth(is_denormal(a if b.kind == "denormal" else b))
    if sign in ("<<", ">>"):
        count = integer(b)
        return whole(integer(a) << count if sign == "<<" else integer(a) >> count, a.width, a.kind)
    if a.kind in ("f", "bf") or b.kind in ("f", "bf"):
        return _floats(sign, a, b)
    width = max(a.width, b.width)
    kind = "u" if "u" in (a.kind, b.kind) else "i" if "i" in (a.kind, b.kind) else "b"
    x, y = (integer(convert(v, kind, width)) for v in (a, b))
    if sign in _COMPARE:
        return truth(_COMPARE[sign](x, y))
    return whole(_INTEGER[sign](x, y), width, kind)


_COMPARE: dict[str, Callable] = {
    "==": lambda x, y: x == y, "!=": lambda x, y: x != y, "<>": lambda x, y: x < y or x > y, "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y, ">": lambda x, y: x > y, ">=": lambda x, y: x >= y}
_INTEGER: dict[str, Callable] = {
    "+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x // y,
    "%": lambda x, y: x % y, "&": lambda x, y: x & y, "|": lambda x, y: x | y, "^": lambda x, y: x ^ y}


def _floats(sign: str, a: Value, b: Value) -> Value:
    kind, width = max((v.kind, v.width) for v in (a, b) if v.kind in ("f", "bf"))
    width = max(v.width for v in (a, b) if v.kind in ("f", "bf"))
    x, y = real(a), real(b)
    if sign in _COMPARE:
        return truth(_COMPARE[sign](x, y))
    if sign == "-":
        sign, y = "+", times(y, Fraction(-1))
    if sign == "**":
        got: Number = Fraction(x) ** max(-5000, min(5000, int(y)))
    else:
        got = {"+": plus, "*": times, "/": over}[sign](x, y)
    return floating(got, width, kind)


def approximate(function: Callable[[float], float], x: Number) -> Number:
    """A function of the platform's fp64 as a number; NaN and infinities where mathematics has none."""
    try:
        got = function(float(x))
    except (ValueError, OverflowError):
        return math.nan if x < 0 and function is not exp2 else math.inf if x > 0 else -math.inf
    return got if got != got or math.isinf(got) or got == 0 else Fraction(got)


def exp2(x: float) -> float:
    return 2.0 ** x


# ---- what pseudo-code may call

def builtin(name: str, values: list[Value], arch: str) -> Value:
    first = values[0]
    x = real(first) if first.kind in ("f", "bf") else None
    if found := re.fullmatch(r"(\w+?)_to_(\w+?)(?:_scale)?", name):
        return _conversion(found[1], found[2], values, arch)
    match name:
        case "fma":
            return floating(plus(times(real(values[0]), real(values[1])), real(values[2])), first.width)
        case "toward_zero":  # a half, of fp32
            return Value(format_of("f", 16).bits(x, toward_zero=True), 16, "f")
        case "abs":
            return first._replace(bits=first.bits & (1 << first.width - 1) - 1)
        case "sqrt":
            exact = x == x and x not in (math.inf,) and x > 0
            return floating(_root(x) if exact else approximate(math.sqrt, x), first.width)
        case "log2":
            return floating(-math.inf if x == 0 else approximate(math.log2, x), first.width)
        case "pow":
            return floating(approximate(exp2, real(values[1])), first.width)
        case "sin" | "cos":
            return floating(approximate(getattr(math, name), x) if not math.isinf(x) else math.nan, first.width)
        case "floor" | "trunc":
            if isinstance(x, float):
                return first
            sign = math.copysign(0.0, x)
            return floating(Fraction(getattr(math, name)(x)) or sign, first.width)
        case "fract":
            return floating(plus(x, -Fraction(math.floor(x))) if isinstance(x, Fraction) else 0.0, first.width)
        case "isEven":
            return truth(isinstance(x, Fraction) and x % 2 == 0 or x == 0)
        case "isNAN":
            return truth(is_nan(first))
        case "isSignalNAN":
            return truth(is_nan(first) and not is_quiet(first))
        case "isQuietNAN":
            return truth(is_quiet(first))
        case "cvtToQuietNAN":
            return _quieted(first)
        case "sign":
            return truth(bool(first.bits >> first.width - 1))
        case "exponent":
            form = format_of(first.kind, first.width)
            return whole(first.bits >> form.mantissa & (1 << form.exponent) - 1, 32, "i")
        case "mantissa":  # a half to one
            return floating(x if isinstance(x, float) else x / Fraction(2) ** _exponent(x), first.width)
        case "ldexp":
            return floating(times(x, Fraction(2) ** max(-5000, min(5000, integer(values[1])))), first.width)
        case "signext":
            return whole(integer(first._replace(kind="i")), 64, "i")
        case "signext_from_bit":
            count = min(integer(values[1]), first.width)
            low = first.bits & (1 << count) - 1
            return whole(low - (low >> count - 1 << count) if count else 0, first.width, "i")
    raise NotImplementedError(f"pseudo-code calls {name}")


def _exponent(x: Fraction) -> int:
    """Of 2 in x, whose mantissa is at least a half and less than one."""
    exponent = abs(x).numerator.bit_length() - x.denominator.bit_length()
    return exponent + 1 if abs(x) >= Fraction(2) ** exponent else exponent


def _root(x: Fraction) -> Fraction:
    """With 80 bits and a last one that keeps it off midpoints."""
    shift = 160 - (_exponent(x) // 2) * 2
    scaled = x * Fraction(2) ** shift
    root = math.isqrt(math.floor(scaled))
    return (Fraction(root) + (Fraction(1, 2) if root * root != scaled else 0)) / Fraction(2) ** (shift // 2)


def _conversion(source: str, target: str, values: list[Value], arch: str) -> Value:
    value = values[0]
    if source in ("fp8", "bf8"):
        number = format_of("fp" if source == "fp8" else "bf", 8, arch).number(value.bits)
    else:
        number = real(value)
    if len(values) > 1:  # scaled by a power of two: of what is read, up; of what is written, down
        power = Fraction(2) ** (integer(values[1]) - 127)
        number = times(number, power if source in ("fp8", "bf8") else 1 / power)
    if target in ("fp8", "bf8"):
        form = format_of("fp" if target == "fp8" else "bf", 8, arch)
        return Value(form.bits(number), 8, "b")
    if target == "fp4":  # which has neither infinity nor NaN
        size = FP4.largest if number != number else FP4.bits(number) & FP4.largest
        return Value(size | value.bits >> value.width - 1 << 3, 4, "b")
    if target in ("snorm", "unorm"):
        limit = 32767 if target == "snorm" else 65535
        number = 0.0 if number != number else max(-1 if target == "snorm" else 0, min(1, number))
        return whole(round(Fraction(number) * limit), 16, "i" if target == "snorm" else "u")
    kind, width = TYPE.match(target).groups()
    if kind in ("f", "bf"):
        if value.kind in ("f", "bf") and number != number:
            return _between(_quieted(value), kind, int(width))
        return floating(number, int(width), kind)
    low, high = (0, 2**int(width) - 1) if kind == "u" else (-2**(int(width) - 1), 2**(int(width) - 1) - 1)
    return whole(0 if number != number else int(max(low, min(high, number))), int(width), kind)
