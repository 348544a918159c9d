"""What vector instructions compute: tables of specifications and functions on arrays [waves, 64].

A specification reads "f=ff": result kind, "=", source kinds (letters of binding.py). Besides: m is a lane mask (of a
source: VOP3's third operand, else VCC; of a result: VOP3's scalar destination, else VCC), v is VCC whatever the
encoding, D the destination's old value, K the literal. "um" gives a value and a mask. After it, "+" keeps the half of
the destination register that a 16-bit result does not fill.
"""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import arithmetic as ar
from wave64.testing.emulator import bits

F16, F32, F64 = np.float16, np.float32, np.float64
I32, I64, U16, U32, U64 = np.int32, np.int64, np.uint16, np.uint32, np.uint64
Row = tuple[str, Callable]


def _copy(a):
    return a


def _reversed(function: Callable) -> Callable:
    return lambda a, b: function(b, a)


def _low24(a):
    """Of integers, the low 24 bits; signed ones extended."""
    return a & U32(0xFFFFFF) if a.dtype == U32 else (a << I32(8)) >> I32(8)


def _high(a, b, wide: type, narrow: type):
    return (a.astype(wide) * b >> wide(32)).astype(narrow)


def _carry(a, b):
    total = a + b
    return total, total < a


def _carry_in(a, b, carry):
    total = a.astype(U64) + b + carry
    return total.astype(U32), total >> U64(32) != 0


def _borrow(a, b):
    return a - b, b > a


def _borrow_in(a, b, borrow):
    return a - b - borrow.astype(U32), b.astype(U64) + borrow > a


def _mad64(wide: type):
    """A 32 x 32 bit product added to 64 bits, and bit 64 of the sum: the carry, or the sign."""
    def run(a, b, c):
        product = a.astype(wide) * b.astype(wide)
        total = product + c
        if wide is U64:
            return total, total < c
        return total, (total ^ (product ^ total) & (c ^ total)) < 0
    return run


def _fract(a):
    got = a - np.floor(a)
    return np.where(np.isfinite(a), np.minimum(got, np.nextafter(a.dtype.type(1), a.dtype.type(0))), got)


def _mbcnt(half: int) -> Callable:
    lanes = np.arange(64)
    below = np.array([(1 << int(i)) - 1 >> 32 * half & 0xFFFFFFFF for i in lanes], U32)
    return lambda a, b: np.bitwise_count(a & below).astype(U32) + b


def _sad(a, b, c):
    """Sum of absolute differences of bytes."""
    total = c
    for s in (0, 8, 16, 24):
        x, y = (v >> U32(s) & U32(255) for v in (a, b))
        total = total + np.where(x > y, x - y, y - x)
    return total


def _ldexp(a, b):
    return np.ldexp(a, np.clip(b, -2000, 2000)).astype(a.dtype)


def pk_f16(a, b):
    """Toward zero, as v_cvt_pkrtz_f16_f32 rounds."""
    def toward_zero(x):
        near = x.astype(F16)
        over = np.abs(near.astype(F32)) > np.abs(x)
        return np.where(over & np.isfinite(x), np.nextafter(near, F16(0)), near).view(U16).astype(U32)
    return toward_zero(a) | toward_zero(b) << U32(16)


def normalized(kind: type, scale: int):
    def one(x):
        return ar.integer(np.rint(np.clip(x.astype(F64), -1 if kind is np.int16 else 0, 1) * scale), kind)
    return lambda a, b: one(a).view(U16).astype(U32) | one(b).view(U16).astype(U32) << U32(16)


def _clamp_pair(kind: type):
    limits = np.iinfo(kind)

    def one(x):
        return np.clip(x, limits.min, limits.max).astype(kind).view(U16).astype(U32)
    return lambda a, b: one(a) | one(b) << U32(16)


MOVES: dict[str, Row] = {
    "v_mov_b32": ("u=u", _copy), "v_mov_b64": ("U=U", _copy), "v_not_b32": ("u=u", np.invert),
    "v_bfrev_b32": ("u=u", bits.reverse), "v_ffbh_u32": ("u=u", bits.leading_zeros),
    "v_ffbl_b32": ("u=u", bits.first_one), "v_ffbh_i32": ("u=i", bits.sign_bits),
    "v_cndmask_b32": ("u=uum", lambda a, b, m: np.where(m, b, a)),
    "v_mbcnt_lo_u32_b32": ("u=uu", _mbcnt(0)), "v_mbcnt_hi_u32_b32": ("u=uu", _mbcnt(1)),
    "v_bcnt_u32_b32": ("u=uu", lambda a, b: np.bitwise_count(a).astype(U32) + b),
    "v_perm_b32": ("u=uuu", lambda a, b, s: bits.permute(a.astype(U64) << U64(32) | b, s)),
    "v_alignbit_b32": ("u=uuu", lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> (c & U32(31))).astype(U32)),
    "v_alignbyte_b32": ("u=uuu", lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> (c & U32(3)) * U32(8)).astype(U32)),
    "v_bfe_u32": ("u=uuu", lambda a, b, c: bits.field(a, b & U32(31), c & U32(31))),
    "v_bfe_i32": ("i=iuu", lambda a, b, c: bits.field(a, b & U32(31), c & U32(31))),
    "v_bfi_b32": ("u=uuu", lambda a, b, c: a & b | ~a & c),
    "v_bfm_b32": ("u=uu", lambda a, b: bits.mask(a & U32(31), U32) << (b & U32(31))),
    "v_pack_b32_f16": ("u=ww", lambda a, b: a.astype(U32) | b.astype(U32) << U32(16)),
}

INTEGERS: dict[str, Row] = {
    "v_add_u32": ("u=uu", np.add), "v_sub_u32": ("u=uu", np.subtract), "v_subrev_u32": ("u=uu", _reversed(np.subtract)),
    "v_add_i32": ("i=ii", np.add), "v_sub_i32": ("i=ii", np.subtract),
    "v_add_co_u32": ("um=uu", _carry), "v_sub_co_u32": ("um=uu", _borrow),
    "v_subrev_co_u32": ("um=uu", _reversed(_borrow)),
    "v_addc_co_u32": ("um=uum", _carry_in), "v_subb_co_u32": ("um=uum", _borrow_in),
    "v_subbrev_co_u32": ("um=uum", lambda a, b, c: _borrow_in(b, a, c)),
    "v_and_b32": ("u=uu", np.bitwise_and), "v_or_b32": ("u=uu", np.bitwise_or), "v_xor_b32": ("u=uu", np.bitwise_xor),
    "v_xnor_b32": ("u=uu", lambda a, b: ~(a ^ b)),
    "v_min_u32": ("u=uu", np.minimum), "v_max_u32": ("u=uu", np.maximum),
    "v_min_i32": ("i=ii", np.minimum), "v_max_i32": ("i=ii", np.maximum),
    "v_lshlrev_b32": ("u=uu", _reversed(bits.shift_left)), "v_lshrrev_b32": ("u=uu", _reversed(bits.shift_right)),
    "v_ashrrev_i32": ("i=ui", _reversed(bits.shift_right)),
    "v_lshlrev_b64": ("U=uU", _reversed(bits.shift_left)), "v_lshrrev_b64": ("U=uU", _reversed(bits.shift_right)),
    "v_ashrrev_i64": ("I=uI", _reversed(bits.shift_right)),
    "v_mul_lo_u32": ("u=uu", np.multiply), "v_mul_hi_u32": ("u=uu", lambda a, b: _high(a, b, U64, U32)),
    "v_mul_hi_i32": ("i=ii", lambda a, b: _high(a, b, I64, I32)),
    "v_mul_u32_u24": ("u=uu", lambda a, b: _low24(a) * _low24(b)),
    "v_mul_i32_i24": ("i=ii", lambda a, b: _low24(a) * _low24(b)),
    "v_mul_hi_u32_u24": ("u=uu", lambda a, b: _high(_low24(a), _low24(b), U64, U32)),
    "v_mul_hi_i32_i24": ("i=ii", lambda a, b: _high(_low24(a), _low24(b), I64, I32)),
    "v_mad_u32_u24": ("u=uuu", lambda a, b, c: _low24(a) * _low24(b) + c),
    "v_mad_i32_i24": ("i=iii", lambda a, b, c: _low24(a) * _low24(b) + c),
    "v_mad_u64_u32": ("Um=uuU", _mad64(U64)), "v_mad_i64_i32": ("Im=iiI", _mad64(I64)),
    "v_add3_u32": ("u=uuu", lambda a, b, c: a + b + c), "v_or3_b32": ("u=uuu", lambda a, b, c: a | b | c),
    "v_xad_u32": ("u=uuu", lambda a, b, c: (a ^ b) + c), "v_and_or_b32": ("u=uuu", lambda a, b, c: a & b | c),
    "v_lshl_add_u32": ("u=uuu", lambda a, b, c: bits.shift_left(a, b) + c),
    "v_lshl_add_u64": ("U=UuU", lambda a, b, c: (a << (b & U32(7)).astype(U64)) + c),
    "v_add_lshl_u32": ("u=uuu", lambda a, b, c: bits.shift_left(a + b, c)),
    "v_lshl_or_b32": ("u=uuu", lambda a, b, c: bits.shift_left(a, b) | c),
    "v_sad_u8": ("u=uuu", _sad),
    "v_cvt_pk_u16_u32": ("u=uu", _clamp_pair(np.uint16)), "v_cvt_pk_i16_i32": ("u=ii", _clamp_pair(np.int16)),
}
for _name, _kind in (("u32", "u"), ("i32", "i")):
    INTEGERS |= {
        f"v_min3_{_name}": (f"{_kind}={_kind * 3}", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
        f"v_max3_{_name}": (f"{_kind}={_kind * 3}", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
        f"v_med3_{_name}": (f"{_kind}={_kind * 3}",
                            lambda a, b, c: np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))),
    }


def _saturated(function: Callable):
    """In 64 bits, and clamped to the operands' type."""
    def run(a, b):
        limits = np.iinfo(a.dtype)
        return np.clip(function(a.astype(I64), b.astype(I64)), limits.min, limits.max).astype(a.dtype)
    return run


SATURATING = {f"v_{name}_{kind}": _saturated(function) for kind in ("u32", "i32", "u16", "i16")
              for name, function in (("add", np.add), ("sub", np.subtract), ("subrev", _reversed(np.subtract)))}

SHORTS: dict[str, Row] = {
    "v_add_u16": ("w=ww", np.add), "v_sub_u16": ("w=ww", np.subtract), "v_subrev_u16": ("w=ww", _reversed(np.subtract)),
    "v_mul_lo_u16": ("w=ww", np.multiply), "v_mad_u16": ("w=www+", lambda a, b, c: a * b + c),
    "v_mad_legacy_u16": ("w=www", lambda a, b, c: a * b + c), "v_mad_i16": ("s=sss+", lambda a, b, c: a * b + c),
    "v_add_i16": ("s=ss+", np.add), "v_sub_i16": ("s=ss+", np.subtract),
    "v_min_u16": ("w=ww", np.minimum), "v_max_u16": ("w=ww", np.maximum),
    "v_min_i16": ("s=ss", np.minimum), "v_max_i16": ("s=ss", np.maximum),
    "v_lshlrev_b16": ("w=ww", _reversed(bits.shift_left)), "v_lshrrev_b16": ("w=ww", _reversed(bits.shift_right)),
    "v_ashrrev_i16": ("s=ws", _reversed(bits.shift_right)),
    "v_mad_u32_u16": ("u=wwu", lambda a, b, c: a.astype(U32) * b + c),
    "v_mad_i32_i16": ("i=ssi", lambda a, b, c: a.astype(I32) * b + c),
}

FLOATS: dict[str, Row] = {
    "v_fma_f32": ("f=fff", ar.fma32), "v_fmac_f32": ("f=ffD", ar.fma32), "v_fmamk_f32": ("f=fKf", ar.fma32),
    "v_fmaak_f32": ("f=ffK", ar.fma32), "v_fma_f64": ("d=ddd", ar.fma64), "v_fmac_f64": ("d=ddD", ar.fma64),
    "v_fma_f16": ("h=hhh+", ar.fma16), "v_fma_legacy_f16": ("h=hhh", ar.fma16), "v_fmac_f16": ("h=hhD", ar.fma16),
    "v_mul_legacy_f32": ("f=ff", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b)),
    "v_rcp_f32": ("f=f", ar.flushed(lambda x: 1 / x)), "v_rcp_iflag_f32": ("f=f", ar.flushed(lambda x: 1 / x)),
    "v_rsq_f32": ("f=f", ar.flushed(lambda x: 1 / np.sqrt(x))), "v_sqrt_f32": ("f=f", ar.flushed(np.sqrt)),
    "v_exp_f32": ("f=f", ar.flushed(np.exp2)), "v_log_f32": ("f=f", ar.flushed(np.log2)),
    "v_sin_f32": ("f=f", ar.flushed(lambda x: np.sin(x * (2 * np.pi)))),
    "v_cos_f32": ("f=f", ar.flushed(lambda x: np.cos(x * (2 * np.pi)))),
    "v_rcp_f64": ("d=d", lambda x: 1 / x), "v_rsq_f64": ("d=d", lambda x: 1 / np.sqrt(x)),
    "v_sqrt_f64": ("d=d", np.sqrt),
    "v_rcp_f16": ("h=h", lambda x: (1 / x.astype(F32)).astype(F16)), "v_sqrt_f16": ("h=h", np.sqrt),
    "v_rsq_f16": ("h=h", lambda x: (1 / np.sqrt(x.astype(F32))).astype(F16)),
    "v_exp_f16": ("h=h", lambda x: np.exp2(x.astype(F32)).astype(F16)),
    "v_log_f16": ("h=h", lambda x: np.log2(x.astype(F32)).astype(F16)),
    "v_ldexp_f32": ("f=fi", _ldexp), "v_ldexp_f64": ("d=di", _ldexp), "v_ldexp_f16": ("h=hs", _ldexp),
    "v_div_scale_f32": ("fm=fff", ar.div_scale32), "v_div_fmas_f32": ("f=fffv", ar.div_fmas32),
    "v_div_fixup_f32": ("f=fff", ar.div_fixup32),
    "v_frexp_mant_f32": ("f=f", lambda x: np.frexp(x)[0]), "v_frexp_mant_f64": ("d=d", lambda x: np.frexp(x)[0]),
    "v_frexp_exp_i32_f32": ("i=f", lambda x: np.where(np.isfinite(x), np.frexp(x)[1], 0)),
    "v_frexp_exp_i32_f64": ("i=d", lambda x: np.where(np.isfinite(x), np.frexp(x)[1], 0)),
}
for _name, _kind in (("f32", "f"), ("f64", "d"), ("f16", "h")):
    _one, _two, _three = f"{_kind}={_kind}", f"{_kind}={_kind * 2}", f"{_kind}={_kind * 3}"
    _kept = "+" if _kind == "h" else ""
    FLOATS |= {
        f"v_add_{_name}": (_two, np.add), f"v_sub_{_name}": (_two, np.subtract),
        f"v_subrev_{_name}": (_two, _reversed(np.subtract)), f"v_mul_{_name}": (_two, np.multiply),
        f"v_max_{_name}": (_two, ar.maximum), f"v_min_{_name}": (_two, ar.minimum),
        f"v_max3_{_name}": (_three + _kept, lambda a, b, c: ar.maximum(ar.maximum(a, b), c)),
        f"v_min3_{_name}": (_three + _kept, lambda a, b, c: ar.minimum(ar.minimum(a, b), c)),
        f"v_med3_{_name}": (_three + _kept, ar.median),
        f"v_trunc_{_name}": (_one, np.trunc), f"v_ceil_{_name}": (_one, np.ceil), f"v_floor_{_name}": (_one, np.floor),
        f"v_rndne_{_name}": (_one, np.rint), f"v_fract_{_name}": (_one, _fract),
    }
