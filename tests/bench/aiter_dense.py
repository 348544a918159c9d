"""AITER's products and norms as pieces of work."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from aiter_work import Arrays, Launch, Ours, Work, bf16, distance, fp8, preshuffled, slots, wide

from wave64.ops.fp8_block_scaled_mm import make_case as our_blocks
from wave64.ops.fp8_scaled_mm import make_case as our_product

# ---- products: int8 on gfx942, a scale a row and a column; FP8 by blocks of 128 on gfx950


def _int8(m: int, n: int, k: int) -> Launch:
    random, mem = np.random.default_rng(1), Arrays()
    a, b = (random.integers(-127, 128, shape).astype(np.int8) for shape in ((m, k), (n, k)))
    scales = [(random.random(shape) * 1e-2).astype(np.float32) for shape in ((m, 1), (1, n))]
    bias = (random.random((1, n)) * 10).astype(np.float32)
    out = mem.new("out", (m, n), np.uint16, 0xFFFF)
    given = [mem.put(name, value) for name, value in (
        ("A", a), ("B", preshuffled(b, 32)), ("A_scale", scales[0]), ("B_scale", scales[1]), ("bias", bias))]
    args = slots(out, *given, m, n, k, k, k, n * 2, 1)

    def error() -> float:
        return distance(wide(out), a.astype(np.float64) @ b.T.astype(np.float64) * scales[0] * scales[1] + bias)
    return Launch((n // 128, -(-m // 128), 1), 256, args, mem, error)


BLOCK = 128
#: rows of AITER's tile, and the product, on gfx942: the last takes the emulator minutes
PRODUCTS = ((32, 16, 1536, 7168), (64, 64, 512, 1024), (128, 1024, 1536, 7168))


def _blocks(arch: str, tile: tuple[int, int], m: int, n: int, k: int) -> Launch:
    """tile: rows and columns of a workgroup."""
    random, mem = np.random.default_rng(1), Arrays()
    a, a_wide = fp8(random.standard_normal((m, k)) * 20, arch)
    b, b_wide = fp8(random.standard_normal((n, k)) * 20, arch)
    a_scale = (random.random((k // BLOCK, m)) * 1e-2).astype(np.float32)
    b_scale = (random.random((n // BLOCK, k // BLOCK)) * 1e-2).astype(np.float32)
    out = mem.new("out", (m, n), np.uint16, 0xFFFF)
    given = [mem.put(name, value) for name, value in (("XQ", a), ("WQ", preshuffled(b)))]
    by_block = [mem.put(name, value) for name, value in (("x_scale", a_scale), ("w_scale", b_scale))]
    if arch == "gfx942":
        bias = mem.new("bias", (1, n), np.float32, 0)
        args = slots(out, *given, *by_block, bias, m, n, k, k, k, n * 2, 1, m, n // BLOCK, k // BLOCK)
    else:
        args = slots(out, *given, None, *by_block, None, None, None, k, n, m, 1, k, k, n * 2, 0, 0, 0, 0, 0, 0, None)

    def error() -> float:
        left = a_wide * np.repeat(a_scale.T.astype(np.float64), BLOCK, 1)
        right = b_wide * np.repeat(np.repeat(b_scale.astype(np.float64), BLOCK, 0), BLOCK, 1)
        return distance(wide(out), left @ right.T)
    return Launch((-(-n // tile[1]), -(-m // tile[0]), 1), 256, args, mem, error)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GROUP = 32  # numbers of 4 bits that have a scale, a power of two


def _fp4(m: int, n: int, k: int) -> Launch:
    random, mem = np.random.default_rng(8), Arrays()
    given, factors = [], []
    for name, rows in (("A", m), ("B", n)):
        codes = random.integers(0, 16, (rows, k)).astype(np.uint8)
        exponents = random.integers(120, 134, (rows, k // GROUP)).astype(np.uint8)
        factors.append(E2M1[codes & 7] * np.where(codes & 8, -1, 1) * np.repeat(2.0 ** (exponents - 127.0), GROUP, 1))
        given.append(mem.put(name, codes[:, ::2] | codes[:, 1::2] << 4))
        # 32 rows of 8 scales lie together: by row in 16 and column in 4, then the two halves of either
        shuffled = exponents.reshape(rows // 32, 2, 16, k // GROUP // 8, 2, 4).transpose(0, 3, 5, 2, 4, 1)
        given.append(mem.put(f"{name}_scale", np.ascontiguousarray(shuffled).reshape(exponents.shape)))
    a, a_scale, b, b_scale = given
    out = mem.new("out", (m, n), np.uint16, 0xFFFF)
    args = slots(out, None, a, b, 1.0, 0.0, 0, 0, n, 0, k, 0, k, 0, m, n, k, a_scale, b_scale, k // GROUP, 0,
                 k // GROUP, 0, 0)
    return Launch((n // 256, m // 256, 1), 256, args, mem, lambda: distance(wide(out), factors[0] @ factors[1].T))


def gemm(arch: str, small: bool) -> Iterator[Work]:
    if arch == "gfx942":
        for m, n, k in [(128, 128, 256)] if small else [(128, 128, 256), (128, 256, 1024)]:
            yield Work("gemm", f"int8 product {m} x {n} x {k}",
                       "gfx942/i8gemm/I8gemm_bf16_perTokenI8_BpreShuffle_128x128.co", functools.partial(_int8, m, n, k),
                       1e-2, Ours("fp8_scaled_mm", functools.partial(our_product, m, n, k, bias=True)),
                       "ours is of FP8, as many bytes and multiply-adds")
        for rows, m, n, k in [(64, 64, 512, 1024)] if small else PRODUCTS:
            name = f"gfx942/fp8gemm_blockscale/fp8gemm_bf16_blockscale_BpreShuffle_{rows}x{BLOCK}.co"
            yield Work("gemm", f"FP8 product by blocks {m} x {n} x {k}", name,
                       functools.partial(_blocks, arch, (rows, BLOCK), m, n, k), 1e-2,
                       Ours("fp8_block_scaled_mm", functools.partial(our_blocks, m, n, k, [BLOCK] * 2)))
        return
    for m, n, k in [(32, 256, 512)] if small else [(32, 256, 512), (32, 512, 1024)]:
        yield Work("gemm", f"FP8 product by blocks {m} x {n} x {k}", "gfx950/f8_block_scale_mi350_x32.co",
                   functools.partial(_blocks, arch, (32, 256), m, n, k), 1e-2,
                   Ours("fp8_block_scaled_mm", functools.partial(our_blocks, m, n, k, [BLOCK] * 2)))
    m, n, k = 256, 256, 512
    yield Work("gemm", f"FP4 product by groups {m} x {n} x {k}",
               "gfx950/f4gemm/f4gemm_bf16_per1x32Fp4_noBpreShuffle_256x256.co", functools.partial(_fp4, m, n, k), 1e-2,
               Ours("fp8_block_scaled_mm", functools.partial(our_blocks, m, n, k, [BLOCK] * 2)),
               "ours is of FP8, twice the bytes")


# ---- layer norm of a sum, which is written, too

COLUMNS = 8192


def _norm(rows: int) -> Launch:
    random, mem = np.random.default_rng(6), Arrays()
    out, total = (mem.new(name, (rows, COLUMNS), np.uint16, 0xFFFF) for name in ("out", "residual_out"))
    x, residual = (mem.put(name, bf16(random.standard_normal((rows, COLUMNS)))) for name in ("input", "residual_in"))
    weight, bias = (mem.put(name, bf16(random.standard_normal(COLUMNS))) for name in ("weight", "bias"))
    args = slots(out, x, weight, bias, 1e-5, rows, COLUMNS, total, residual, None, None)

    def error() -> float:
        summed = wide(bf16(wide(x) + wide(residual)))
        centered = summed - summed.mean(1, keepdims=True)
        want = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5) * wide(weight) + wide(bias)
        return max(distance(wide(out), want), distance(wide(total), summed))
    return Launch((rows // 2, 1, 1), 256, args, mem, error)


def norm(arch: str, small: bool) -> Iterator[Work]:
    if arch != "gfx942":
        return
    for rows in [2] if small else [2, 16]:
        yield Work("norm", f"layer norm of a sum, {rows} x {COLUMNS}", "gfx942/layer_norm.co",
                   functools.partial(_norm, rows), 2e-2, Ours("fused_add_rms_norm", functools.partial(_sum, rows)),
                   "ours is an RMS norm: no mean, no bias")


def _sum(rows: int) -> dict:
    x, residual = (torch.randn(rows, COLUMNS, dtype=torch.bfloat16) for _ in range(2))
    return dict(x=x, residual=residual, weight=torch.randn(COLUMNS, dtype=torch.bfloat16))
