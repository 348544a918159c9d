"""Floating-point formats by their definition: bits to exact numbers, exact numbers to bits with one rounding.

A number is a Fraction or, where that cannot hold it, a float: NaN, infinities and zeros, which have a sign.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

Number = Fraction | float


@dataclass(frozen=True)
class Format:
    """IEEE 754's layout; of 8 bits and less also what OCP and AMD made of it."""

    exponent: int
    mantissa: int
    bias: int
    special: str = "ieee"  # ieee: infinities and NaNs; fn: one NaN, no infinity; fnuz: NaN is -0; none: finite only

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def nan(self) -> int:
        """A quiet one."""
        if self.special == "fnuz":
            return 1 << self.width - 1
        if self.special == "none":
            raise ValueError(f"{self} has no NaN")
        top = (1 << self.exponent) - 1 << self.mantissa
        return top | ((1 << self.mantissa) - 1 if self.special == "fn" else 1 << self.mantissa - 1)

    @property
    def largest(self) -> int:
        """The bits of the largest finite number."""
        if self.special == "ieee":
            return ((1 << self.exponent) - 1 << self.mantissa) - 1
        return (1 << self.width - 1) - 1 - (self.special == "fn")

    @property
    def overflow(self) -> int:
        """What is too large becomes: infinity, else NaN, else the largest number."""
        if self.special == "none":
            return self.largest
        return self.largest + 1 if self.special == "ieee" else self.nan

    def number(self, bits: int) -> Number:
        sign = -1 if bits >> self.width - 1 else 1
        size = bits & (1 << self.width - 1) - 1
        exponent, fraction = size >> self.mantissa, size & (1 << self.mantissa) - 1
        if self.special == "fnuz" and bits == self.nan or size > self.largest and (fraction or self.special == "fn"):
            return math.nan
        if size > self.largest:
            return sign * math.inf
        if size == 0:
            return sign * 0.0
        if exponent:
            fraction |= 1 << self.mantissa
        return sign * Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa)

    def bits(self, number: Number, toward_zero: bool = False, saturate: bool = False) -> int:
        """To nearest, ties to even, or toward zero. saturate: what is too large becomes the largest number."""
        if number != number:
            return self.nan
        negative = number < 0 or (number == 0 and math.copysign(1, number) < 0)
        sign = int(negative) << self.width - 1
        if number == 0:
            return 0 if self.special == "fnuz" else sign
        over = self.largest if saturate else self.overflow
        if isinstance(number, float):  # infinity
            return over | sign
        size = abs(number)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        exponent = max(exponent - (Fraction(2) ** exponent > size), 1 - self.bias)
        units = size / Fraction(2) ** (exponent - self.mantissa)
        whole = math.floor(units) if toward_zero else round(units)
        code = whole + (exponent + self.bias - 1 << self.mantissa)  # an implicit one adds 1 to the exponent
        if code > self.largest:
            code = self.largest if toward_zero else over
        return sign | code if code or self.special != "fnuz" else 0


F16, BF16, F32, F64 = Format(5, 10, 15), Format(8, 7, 127), Format(8, 23, 127), Format(11, 52, 1023)
#: of 8 bits, by architecture; of 6 and 4 bits, which gfx950's matrix instructions take
FP8 = {"gfx942": Format(4, 3, 8, "fnuz"), "gfx950": Format(4, 3, 7, "fn")}
BF8 = {"gfx942": Format(5, 2, 16, "fnuz"), "gfx950": Format(5, 2, 15)}
FP6, BF6, FP4 = Format(2, 3, 1, "none"), Format(3, 2, 3, "none"), Format(2, 1, 1, "none")
BY_WIDTH = {16: F16, 32: F32, 64: F64}


def plus(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b or 0.0
    if isinstance(a, Fraction) or isinstance(b, Fraction):
        special, other = (b, a) if isinstance(a, Fraction) else (a, b)
        return other if special == 0 else special
    return a + b


def times(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    signs = [x if isinstance(x, float) else 1.0 if x > 0 else -1.0 for x in (a, b)]
    return signs[0] * signs[1]


def over(a: Number, b: Number) -> Number:
    if isinstance(b, Fraction):
        return times(a, 1 / b)
    if b != b or a != a or (math.isinf(b) and a in (math.inf, -math.inf)) or (b == 0 and a == 0):
        return math.nan
    return times(a if isinstance(a, float) else 1.0 if a > 0 else -1.0, math.copysign(0.0 if b else math.inf, b))
