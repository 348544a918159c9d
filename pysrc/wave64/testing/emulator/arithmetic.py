"""Arithmetic as the vector unit does it, where NumPy's differs: fused, clamped, small floating-point formats."""

import functools

import numpy as np

F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp32, rounded once.

    The product of two fp32 numbers is exact in fp64. The sum is not, and is rounded again to fp32: which goes wrong
    only where the first rounding lands on a midpoint of fp32. There the sum is rounded to odd, which keeps on which
    side of the midpoint it was.
    """
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    bits = total.view(U64)
    hard = (bits & U64(0x1FFFFFFF)) == U64(0x10000000)
    hard |= np.abs(total) < 2.0**-125  # fp32 has fewer bits there, so its midpoints lie elsewhere
    if hard.any():
        addend = np.broadcast_to(c, total.shape).astype(F64)
        other = total - product
        error = (product - (total - other)) + (addend - other)
        odd = hard & (error != 0) & (bits & U64(1) == 0)
        toward = np.where((error > 0) == (total > 0), bits + U64(1), bits - U64(1))
        total = np.where(odd & (total != 0), toward, bits).view(F64)
    return total.astype(F32)


def fma16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp16, rounded once: of fp16 numbers, fp64 holds every bit that matters."""
    return (np.multiply(a, b, dtype=F64) + c).astype(np.float16)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp64, in the platform's long double, whose 64 bits round a product of two 53-bit numbers."""
    return (a.astype(np.longdouble) * b + c).astype(F64)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number where one is NaN; +0 over -0."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.where(a == b, (a.view(bits) & b.view(bits)).view(a.dtype), _quiet(a, b, np.fmax(a, b)))


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number where one is NaN; -0 under +0."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.where(a == b, (a.view(bits) | b.view(bits)).view(a.dtype), _quiet(a, b, np.fmin(a, b)))


def _quiet(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """IEEE mode: a signalling NaN makes a quiet one. Kernels start in it, and compilers count on it."""
    for x in (b, a):
        if np.isnan(x).any():
            chosen = np.where(is_signalling(x), x + x, chosen)
    return chosen


def without_denormals(x: np.ndarray) -> np.ndarray:
    """fp32 denormals as zeros of their sign."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def quieted(x: np.ndarray) -> np.ndarray:
    """Signalling NaNs made quiet ones."""
    return np.where(is_signalling(x), x + x, x) if np.isnan(x).any() else x


def is_signalling(x: np.ndarray) -> np.ndarray:
    quiet = {2: 1 << 9, 4: 1 << 22, 8: 1 << 51}[x.dtype.itemsize]
    bits = x.view(f"u{x.dtype.itemsize}")
    return np.isnan(x) & (bits & bits.dtype.type(quiet) == 0)


def median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The middle of three; the smallest where one is NaN."""
    if np.isnan(a).any() or np.isnan(b).any() or np.isnan(c).any():
        unordered = np.isnan(a) | np.isnan(b) | np.isnan(c)
        return np.where(unordered, minimum(minimum(a, b), c), maximum(minimum(a, b), minimum(maximum(a, b), c)))
    return maximum(minimum(a, b), minimum(maximum(a, b), c))


def flushed(function):
    """A transcendental of fp32, computed in fp64 and rounded once, better than hardware's last bit. It takes
    denormal arguments, and gives denormal results, as zeros of their sign: the compilers' expansions allow for it."""
    def run(x: np.ndarray) -> np.ndarray:
        x = without_denormals(x)
        return without_denormals(function(x.astype(F64)).astype(F32))
    return run


def integer(x: np.ndarray, kind: type) -> np.ndarray:
    """Toward zero, clamped to the integer type; NaN gives 0."""
    limits = np.iinfo(kind)
    wide = np.trunc(np.nan_to_num(x.astype(F64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.clip(wide, limits.min, limits.max).astype(np.int64 if limits.min < 0 else U64).astype(kind)


def classes(x: np.ndarray) -> np.ndarray:
    """The bit that v_cmp_class tests: signalling NaN, quiet NaN, -inf, -normal, -denormal, -0, +0, +denormal, ..."""
    tiny = np.finfo(x.dtype).tiny
    size, negative = np.abs(x), np.signbit(x)
    magnitude = np.where(size == 0, 0, np.where(size < tiny, 1, np.where(np.isinf(x), 3, 2)))
    kind = np.where(negative, 5 - magnitude, 6 + magnitude)
    kind = np.where(np.isnan(x), np.where(is_signalling(x), 0, 1), kind)
    return U32(1) << kind.astype(U32)


def exponents(x: np.ndarray) -> np.ndarray:
    """The biased exponents of fp32 numbers."""
    return (x.view(U32) >> U32(23) & U32(0xFF)).astype(np.int32)


def div_scale32(a: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v_div_scale_f32: `a`, which is one of the two, scaled so that the division's steps stay in range; and a lane
    mask of where v_div_fmas has to undo it.

    As published, but that where both 1 / d and n / d are denormal, d is scaled down: up, as printed, it would
    overflow, and the compilers' division would be wrong."""
    a, d, n = np.broadcast_arrays(a, denominator, numerator)
    is_d, is_n = a.view(U32) == d.view(U32), a.view(U32) == n.view(U32)
    up, down = np.ldexp(a, 64), np.ldexp(a, -64)
    denormal_d = (exponents(d) == 0) & (d != 0)
    tiny_reciprocal = (exponents(d) >= 253) & np.isfinite(d)
    ratio = np.abs(n / d)
    with_n = (ratio < 2.0**-126) & (ratio != 0)
    cases = [
        ((n == 0) | (d == 0), F32(np.nan), False),
        (exponents(n) - exponents(d) >= 96, np.where(is_d, up, a), True),
        (denormal_d, up, False),
        (tiny_reciprocal & with_n, np.where(is_d, down, a), True),
        (tiny_reciprocal, down, False),
        (with_n, np.where(is_n, up, a), True),
        (exponents(n) <= 23, up, False),
    ]
    conditions = [case for case, _, _ in cases]
    scaled = np.select(conditions, [np.broadcast_to(value, a.shape) for _, value, _ in cases], a)
    return scaled.astype(F32), np.select(conditions, [np.full(a.shape, flag) for _, _, flag in cases], False)


def div_fmas32(a: np.ndarray, b: np.ndarray, c: np.ndarray, undo: np.ndarray) -> np.ndarray:
    """v_div_fmas_f32: a * b + c, the division's last step, with the scale of v_div_scale_f32 taken back: that was
    2^64 on the denominator of a large quotient, or on the numerator of a small one. One rounding, also to denormal."""
    exact = np.multiply(a, b, dtype=F64) + c
    scaled = np.where(np.abs(exact) >= 1, exact * 2.0**64, exact * 2.0**-64).astype(F32)
    return np.where(undo, scaled, fma32(a, b, c))


def div_fixup32(quotient: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """v_div_fixup_f32: the quotient, but for NaN, infinities, zeros and what is too small or too large by far. (The
    published condition for the last can never hold; this one makes the compilers' division right, as it is.)"""
    q, d, n = np.broadcast_arrays(quotient, denominator, numerator)
    negative = np.signbit(d) ^ np.signbit(n)

    def signed(value: float) -> np.ndarray:
        return np.where(negative, F32(-value), F32(value))

    invalid = np.full(q.shape, 0xFFC00000, U32).view(F32)
    return np.select(
        [np.isnan(n), np.isnan(d), (d == 0) & (n == 0), np.isinf(d) & np.isinf(n), (d == 0) | np.isinf(n),
         np.isinf(d) | (n == 0), exponents(n) - exponents(d) < -150, exponents(n) - exponents(d) > 128],
        [n + n, d + d, invalid, invalid, signed(np.inf), signed(0.0), signed(0.0), signed(np.inf)],
        np.copysign(np.abs(q), signed(1.0)))


class Small:
    """A floating-point format of 8 bits: its values, and how fp32 rounds to it."""

    def __init__(self, mantissa: int, bias: int, finite_codes: int, fnuz: bool):
        codes = np.arange(128)
        exponent, fraction = codes >> mantissa, (codes & (1 << mantissa) - 1) / (1 << mantissa)
        values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
        self.mantissa, self.smallest, self.fnuz = mantissa, 1 - bias, fnuz
        self.finite = values[:finite_codes]
        self.nan = 0x80 if fnuz else 0x7F
        positive = np.where(codes < finite_codes, values, np.nan)
        if not fnuz and mantissa == 2:
            positive[finite_codes] = np.inf
        self.decoded = np.concatenate([positive, -positive]).astype(F32)
        if fnuz:
            self.decoded[128] = np.nan

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.decoded[codes]

    def encode(self, x: np.ndarray, saturate: np.ndarray) -> np.ndarray:
        """To nearest, ties to even; what is too large becomes NaN (infinity in e5m2), or, where `saturate`, the largest
        number."""
        size = np.abs(x).astype(F64)
        _, exponent = np.frexp(np.where(np.isfinite(size), size, 1.0))
        unit = np.ldexp(1.0, np.maximum(exponent - 1, self.smallest) - self.mantissa)
        rounded = np.rint(np.where(np.isfinite(size), size, 0.0) / unit) * unit
        codes = np.searchsorted(self.finite, np.minimum(rounded, self.finite[-1])).astype(U32)
        over = (rounded > self.finite[-1]) | np.isinf(size)
        beyond = self.nan if self.fnuz or self.mantissa == 3 else len(self.finite)
        codes = np.where(over, np.where(saturate, U32(len(self.finite) - 1), U32(beyond)), codes)
        codes = np.where(np.isnan(x), U32(self.nan), codes)
        signed = codes | np.signbit(x).astype(U32) << U32(7)
        return np.where((codes == 0) | (codes == 0x80), codes, signed).astype(U32) if self.fnuz else signed


@functools.cache
def small(name: str, arch: str) -> Small:
    """"fp8" or "bf8", of the flavor that the architecture's conversions and matrix cores take."""
    fnuz = arch == "gfx942"
    if name == "fp8":
        return Small(3, 8, 128, True) if fnuz else Small(3, 7, 127, False)
    return Small(2, 16, 128, True) if fnuz else Small(2, 15, 124, False)


#: by code, from where on a size is nearer to the next one of e2m1's 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to even codes
_E2M1_MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def e2m1(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """The codes of x / 2 ** (exponent - 127), to nearest, as uint32. There is neither infinity nor NaN: both, and what
    is too large, give the largest number, as AMD's libraries have it."""
    size = np.ldexp(np.abs(x).astype(F64), 127 - exponent.astype(np.int32))
    below = np.where(np.arange(7) % 2, np.nextafter(_E2M1_MIDDLES, 0), _E2M1_MIDDLES)
    codes = np.searchsorted(below, size)  # NaN lies behind all
    return codes.astype(U32) | np.signbit(x).astype(U32) << U32(3)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; NaN stays quiet NaN. As uint32."""
    bits = np.ascontiguousarray(x).view(U32)
    rounded = bits + U32(0x7FFF) + (bits >> U32(16) & U32(1)) >> U32(16)
    return np.where(np.isnan(x), bits >> U32(16) | U32(0x40), rounded)
