"""Single instructions on the emulator, random and awkward operands, against models of their own: exact fractions,
NumPy in higher precision, torch's conversions."""

import functools
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from assembled import assemble, run

F32, U32, U64 = np.float32, np.uint32, np.uint64
SOURCES, RESULTS = 8, 4  # registers v8 to v15 are read from memory, v16 to v19 written to it

_LOAD = """
s_load_dwordx4 s[0:3], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 5, v0
v_lshlrev_b32_e32 v2, 4, v0
s_waitcnt lgkmcnt(0)
global_load_dwordx4 v[8:11], v1, s[0:1]
global_load_dwordx4 v[12:15], v1, s[0:1] offset:16
v_mov_b32_e32 v16, 0
v_mov_b32_e32 v17, 0
v_mov_b32_e32 v18, 0
v_mov_b32_e32 v19, 0
s_waitcnt vmcnt(0)
"""
_STORE = """
s_nop 15
s_nop 15
global_store_dwordx4 v2, v[16:19], s[2:3]
"""


@functools.cache
def _code(arch, bodies):
    return assemble(arch, tuple((f"kernel{i}", _LOAD + body + _STORE) for i, body in enumerate(bodies)), lds=1024)


def executed(bodies, index, given, arch="gfx942"):
    """[lanes, 4] uint32: v16 to v19 after body `index`, with v8 to v15 from `given`, [lanes, 8] uint32."""
    result = np.zeros((len(given), RESULTS), U32)
    run(_code(arch, tuple(bodies)), f"kernel{index}", np.ascontiguousarray(given), result, block=len(given))
    return result


def operands(seed, lanes=256):
    """Random bits; in the first registers floats of all sizes, with zeros, infinities, NaN, denormals, equal ones."""
    random = np.random.default_rng(seed)
    given = random.integers(0, 2**32, (lanes, SOURCES), dtype=U32)
    numbers = random.standard_normal((lanes, 4)) * 2.0 ** random.integers(-20, 20, (lanes, 4))
    given[:, :4] = numbers.astype(F32).view(U32)
    awkward = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 0.5, 2.0**-126], F32)
    for column in range(3):
        given[:96, column] = random.choice(awkward, 96).view(U32)
    given[96:112, 1] = given[96:112, 0]
    return given


def floats(column):
    return column.view(F32).astype(np.float64)


def signed(column):
    return column.view(np.int32).astype(np.int64)


def _med3(a, b, c):
    ordered = np.sort(np.stack([a, b, c]), axis=0)
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.fmin(np.fmin(a, b), c), ordered[1])


def _perm(high, low, select):
    out = np.zeros(len(high), U32)
    for lane, (h, lo, s) in enumerate(zip(high.tolist(), low.tolist(), select.tolist(), strict=True)):
        data = (h << 32 | lo).to_bytes(8, "little")
        for i in range(4):
            pick = s >> 8 * i & 255
            byte = (data[pick] if pick < 8 else (data[2 * (pick - 8) + 1] >> 7) * 255 if pick < 12 else
                    0 if pick == 12 else 255)
            out[lane] |= U32(byte << 8 * i)
    return out


#: ds_swizzle_b32 for FFT, as the manual tables it: bits of the lane that are kept -> the lane that each reads, but for
#: the manual's counting from 1
FFT = {kept: [int(lane, 16) - 1 for lane in lanes.split(",")] for kept, lanes in {
    0x00: "1,11,9,19,5,15,d,1d,3,13,b,1b,7,17,f,1f,2,12,a,1a,6,16,e,1e,4,14,c,1c,8,18,10,20",
    0x10: "1,9,5,d,3,b,7,f,2,a,6,e,4,c,8,10,11,19,15,1d,13,1b,17,1f,12,1a,16,1e,14,1c,18,20"}.items()}
FFT[0x1F] = list(range(32))
#: instruction -> (what v16 is, from the columns v8 ..., as integers; or as floats, which are compared after rounding)
INTEGER = {
    "v_add_u32_e32 v16, v12, v13": lambda g: g[4] + g[5],
    "v_sub_u32_e64 v16, v12, v13 clamp": lambda g: np.where(g[4] > g[5], g[4] - g[5], 0),
    "v_mul_hi_u32 v16, v12, v13": lambda g: (g[4].astype(U64) * g[5]) >> U64(32),
    "v_mul_hi_i32 v16, v12, v13": lambda g: (signed(g[4]) * signed(g[5])) >> 32,
    "v_mul_lo_u32 v16, v12, v13": lambda g: g[4].astype(U64) * g[5],
    "v_bfe_u32 v16, v12, 5, 11": lambda g: g[4] >> 5 & 0x7FF,
    "v_bfe_i32 v16, v12, 20, 12": lambda g: signed(g[4]) >> 20,
    "v_bfi_b32 v16, v12, v13, v14": lambda g: (g[4] & g[5]) | (~g[4] & g[6]),
    "v_alignbit_b32 v16, v12, v13, 7": lambda g: ((g[4].astype(U64) << U64(32)) | g[5]) >> U64(7),
    "v_add3_u32 v16, v12, v13, v14": lambda g: g[4] + g[5] + g[6],
    "v_lshl_add_u32 v16, v12, 3, v13": lambda g: (g[4] << 3) + g[5],
    "v_lshl_or_b32 v16, v12, 3, v13": lambda g: (g[4] << 3) | g[5],
    "v_ashrrev_i32_e32 v16, 9, v12": lambda g: signed(g[4]) >> 9,
    "v_bfrev_b32_e32 v16, v12": lambda g: np.array([int(f"{x:032b}"[::-1], 2) for x in g[4].tolist()]),
    "v_ffbh_u32_e32 v16, v12": lambda g: np.array([32 - x.bit_length() if x else -1 for x in g[4].tolist()]),
    "v_and_b32_e32 v3, 0x0f0f0f0f, v14\nv_perm_b32 v16, v12, v13, v3": lambda g: _perm(g[4], g[5], g[6] & 0x0F0F0F0F),
    "s_mov_b32 s4, 0x0d070c09\nv_perm_b32 v16, v12, v13, s4":
        lambda g: _perm(g[4], g[5], np.full(len(g[4]), 0x0D070C09, U32)),
    "v_mbcnt_lo_u32_b32 v16, -1, v12": lambda g: g[4] + np.minimum(np.arange(len(g[4])) % 64, 32).astype(U32),
    "v_cvt_u32_f32_e32 v16, v8": lambda g: np.clip(np.nan_to_num(np.trunc(floats(g[0]))), 0, 2**32 - 1),
    "v_cvt_i32_f32_e32 v16, v8": lambda g: np.clip(np.nan_to_num(np.trunc(floats(g[0]))), -2**31, 2**31 - 1),
    "v_and_b32_sdwa v16, v12, v13 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:BYTE_2":
        lambda g: g[4] >> 16 & g[5] >> 16 & 0xFF,
    "v_cmp_lt_i32_e32 vcc, v12, v13\nv_cndmask_b32_e32 v16, v14, v15, vcc":
        lambda g: np.where(signed(g[4]) < signed(g[5]), g[7], g[6]),
    "v_add_co_u32_e32 v16, vcc, v12, v13\nv_addc_co_u32_e32 v16, vcc, 0, v14, vcc":
        lambda g: g[6] + (g[4].astype(U64) + g[5] >> U64(32)).astype(U32),
    "v_mov_b32_dpp v16, v12 row_shr:3 row_mask:0xf bank_mask:0xf bound_ctrl:0":
        lambda g: np.array([g[4][i - 3] if i % 16 >= 3 else 0 for i in range(len(g[4]))]),
    "v_mov_b32_dpp v16, v12 quad_perm:[3,0,2,1] row_mask:0xf bank_mask:0xf":
        lambda g: np.array([g[4][i & ~3 | (3, 0, 2, 1)[i & 3]] for i in range(len(g[4]))]),
    "v_mov_b32_dpp v16, v12 row_bcast:15 row_mask:0xa bank_mask:0xf":
        lambda g: np.array([g[4][(i & ~15) - 1] if i >> 4 & 1 else 0 for i in range(len(g[4]))]),
    "ds_swizzle_b32 v16, v12 offset:swizzle(BITMASK_PERM, \"01pip\")\ns_waitcnt lgkmcnt(0)":
        lambda g: np.array([g[4][i & ~31 | ((i & 31 & 0b00111 | 0b01000) ^ 0b00010)] for i in range(len(g[4]))]),
    "ds_swizzle_b32 v16, v12 offset:swizzle(QUAD_PERM,3,0,2,1)\ns_waitcnt lgkmcnt(0)":
        lambda g: np.array([g[4][i & ~3 | (3, 0, 2, 1)[i & 3]] for i in range(len(g[4]))]),
    **{f"ds_swizzle_b32 v16, v12 offset:{0xE000 + kept}\ns_waitcnt lgkmcnt(0)":
       lambda g, order=order: np.array([g[4][i & ~31 | order[i & 31]] for i in range(len(g[4]))])
       for kept, order in FFT.items()},
    "v_and_b32_e32 v3, 0xfc, v13\nds_bpermute_b32 v16, v3, v12\ns_waitcnt lgkmcnt(0)":
        lambda g: np.array([g[4][i & ~63 | (int(g[5][i]) & 0xFC) >> 2] for i in range(len(g[4]))]),
    "v_readfirstlane_b32 s4, v12\ns_nop 1\nv_mov_b32_e32 v16, s4": lambda g: np.repeat(g[4][::64], 64),
    "v_cmp_class_f32_e64 vcc, v8, 3\nv_cndmask_b32_e64 v16, 0, 1, vcc": lambda g: np.isnan(floats(g[0])),
}
FLOAT = {
    "v_add_f32_e32 v16, v8, v9": lambda g: floats(g[0]) + floats(g[1]),
    "v_sub_f32_e64 v16, |v8|, -v9": lambda g: np.abs(floats(g[0])) + floats(g[1]),
    "v_mul_f32_e64 v16, v8, v9 mul:2": lambda g: (floats(g[0]) * floats(g[1])).astype(F32) * F32(2),
    "v_add_f32_e64 v16, v8, v9 clamp": lambda g: np.clip(np.nan_to_num(floats(g[0]) + floats(g[1]), nan=0.0), 0, 1),
    "v_max_f32_e32 v16, v8, v9": lambda g: np.fmax(floats(g[0]), floats(g[1])),
    "v_min3_f32 v16, v8, v9, v10": lambda g: np.fmin(np.fmin(floats(g[0]), floats(g[1])), floats(g[2])),
    "v_med3_f32 v16, v8, v9, v10": lambda g: _med3(*(floats(g[i]) for i in range(3))),
    "v_rndne_f32_e32 v16, v8": lambda g: np.rint(floats(g[0])),
    "v_cvt_f32_f16_e32 v16, v12": lambda g: (g[4] & 0xFFFF).astype(np.uint16).view(np.float16),
    "v_cvt_f32_f16_sdwa v16, v12 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1":
        lambda g: (g[4] >> 16).astype(np.uint16).view(np.float16),
    "v_cvt_f32_u32_e32 v16, v12": lambda g: g[4].astype(np.float64),
    "v_ldexp_f32 v16, v8, 5": lambda g: floats(g[0]) * 32,
    "v_pk_mul_f32 v[16:17], v[8:9], v[10:11] op_sel:[0,1] op_sel_hi:[1,0]": lambda g: floats(g[0]) * floats(g[3]),
    "v_rcp_f32_e32 v16, v11": lambda g: 1 / floats(g[3]),
    "v_rsq_f32_e64 v16, |v11|": lambda g: 1 / np.sqrt(np.abs(floats(g[3]))),
    "v_exp_f32_e32 v16, v11": lambda g: np.where(np.abs(np.exp2(floats(g[3]))) < 2.0**-126, 0, np.exp2(floats(g[3]))),
    "v_log_f32_e64 v16, |v11|": lambda g: np.log2(np.abs(floats(g[3]))),
}
#: the compilers' division of fp32, v8 / v9
DIVISION = """
v_div_scale_f32 v3, s[4:5], v9, v9, v8
v_rcp_f32_e32 v4, v3
v_div_scale_f32 v5, vcc, v8, v9, v8
v_fma_f32 v6, -v3, v4, 1.0
v_fmac_f32_e32 v4, v6, v4
v_mul_f32_e32 v6, v5, v4
v_fma_f32 v7, -v3, v6, v5
v_fmac_f32_e32 v6, v7, v4
v_fma_f32 v3, -v3, v6, v5
v_div_fmas_f32 v3, v3, v4, v6
v_div_fixup_f32 v16, v3, v9, v8
"""
FUSED = ("v_fma_f32 v16, v8, v9, v10", "v_mov_b32_e32 v16, v10\nv_fmac_f32_e32 v16, v8, v9",
         "v_pk_fma_f32 v[16:17], v[8:9], v[10:11], v[12:13] op_sel:[0,0,0] op_sel_hi:[1,1,1]")


@pytest.mark.parametrize("text", INTEGER)
def test_integer_instructions(text):
    given = operands(1)
    got = executed(INTEGER, list(INTEGER).index(text), given)[:, 0]
    want = np.asarray(INTEGER[text](given.T))
    assert (got == (want.astype(np.int64).astype(U32) if want.dtype.kind != "u" else want.astype(U32))).all()


@pytest.mark.parametrize("text", FLOAT)
def test_float_instructions(text):
    given = operands(2)
    got = executed(FLOAT, list(FLOAT).index(text), given)[:, 0].view(F32)
    with np.errstate(all="ignore"):
        want = np.asarray(FLOAT[text](given.T)).astype(F32)
    np.testing.assert_array_equal(got, want)


def nearest(exact: Fraction) -> np.float32:
    """A fraction as fp32: to nearest, ties to even; denormals included."""
    if exact == 0:
        return F32(0)
    size = abs(exact)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, -126)
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    number = float(round(size / unit) * unit) if exponent < 128 else np.inf
    return F32(number if exact > 0 else -number)


@pytest.mark.parametrize("text", FUSED)
def test_fused_multiply_add_rounds_once(text):
    random = np.random.default_rng(3)
    given = operands(3)
    given[:, :6] = random.standard_normal((256, 6)).astype(F32).view(U32)
    # products that end just next to a midpoint of the sum, and sums that cancel or are denormal
    one = (1 + random.integers(0, 2**12, 64) * 2.0**-12).astype(F32)
    given[:64, 0], given[:64, 1] = one.view(U32), (1 + random.integers(0, 2**12, 64) * 2.0**-12).astype(F32).view(U32)
    given[:64, 2] = (random.choice([2.0**-30, -(2.0**-30), 2.0**-60, 0.0], 64)).astype(F32).view(U32)
    given[64:96, 0] = (random.standard_normal(32) * 2.0**-75).astype(F32).view(U32)
    given[64:96, 1] = (random.standard_normal(32) * 2.0**-70).astype(F32).view(U32)
    given[64:96, 2] = (random.standard_normal(32) * 2.0**-140).astype(F32).view(U32)
    got = executed(FUSED, FUSED.index(text), given)[:, 0].view(F32)
    columns = (0, 2, 4) if text.startswith("v_pk") else (0, 1, 2)
    for lane in range(len(given)):
        a, b, c = (Fraction(float(given[lane, i:i + 1].view(F32)[0])) for i in columns)
        assert got[lane] == nearest(a * b + c), lane


def test_division_is_rounded_correctly():
    given = operands(4)
    random = np.random.default_rng(4)
    large = np.array([3.4e38, 1e38, 2.0**126, 2.0**127, 1e-38, 1e-40, 2.0**-149, 240.0, 3.0], F32)
    given[:128, 0], given[:128, 1] = (random.choice(large, 128).view(U32) for _ in range(2))
    got = executed((DIVISION,), 0, given)[:, 0].view(F32)
    with np.errstate(all="ignore"):
        want = given[:, 0].view(F32) / given[:, 1].view(F32)
    np.testing.assert_array_equal(got, want)


CONVERSIONS = ("v_mov_b32_e32 v16, 0\nv_cvt_pk_fp8_f32 v16, v8, v9\nv_cvt_pk_bf8_f32 v16, v8, v9 op_sel:[0,0,1]",
               "v_cvt_f32_fp8_e32 v16, v12\nv_cvt_f32_bf8_e32 v17, v12\nv_cvt_pk_f32_fp8_e32 v[18:19], v13")
FP8 = {"gfx942": (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz), "gfx950": (torch.float8_e4m3fn, torch.float8_e5m2)}


@pytest.mark.parametrize("arch", FP8)
def test_fp8_is_the_architectures(arch):
    random = np.random.default_rng(5)
    given = operands(5)
    limit = torch.finfo(FP8[arch][0]).max
    numbers = random.standard_normal((256, 2)) * 2.0 ** random.integers(-12, 6, (256, 2))
    numbers = numbers.clip(-limit, limit).astype(F32)
    given[:, :2] = numbers.view(U32)
    got = executed(CONVERSIONS, 0, given, arch)[:, 0]
    for half, kind in enumerate(FP8[arch]):
        for i in range(2):
            code = torch.from_numpy(numbers[:, i].copy()).to(kind).view(torch.uint8).numpy()
            assert (got >> U32(16 * half + 8 * i) & U32(255) == code).all()
    given[:, 4] = np.arange(256)
    given[:, 5] = np.arange(256) << 8
    got = executed(CONVERSIONS, 1, given, arch).view(F32)
    codes = torch.arange(256, dtype=torch.uint8)
    for column, kind in ((0, FP8[arch][0]), (1, FP8[arch][1]), (3, FP8[arch][0])):
        np.testing.assert_array_equal(got[:, column], codes.view(kind).float().numpy())


def test_the_clock_counts_at_100_mhz():
    body = """
s_memrealtime s[4:5]
s_waitcnt lgkmcnt(0)
v_mov_b32_e32 v16, s4
v_mov_b32_e32 v17, s5
"""
    def now():
        words = executed((body,), 0, np.zeros((64, SOURCES), U32))[:, :2]
        assert (words == words[0]).all()
        return int(words[0, 0]) | int(words[0, 1]) << 32

    before, first = time.monotonic(), now()
    second, after = now(), time.monotonic()
    assert before * 1e8 - 1 <= first < second <= after * 1e8 + 1
