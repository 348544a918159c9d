"""Product of FP8 activations and FP8 weights, both scaled in blocks: DeepSeek-V3's linear layers."""

import torch
from torch import Tensor

from wave64 import platform, quant
from wave64.op import BadArgument, Case, Cost, op

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: (N, K) of DeepSeek-V3's layers on one of 8 GPUs, and the numbers of tokens that are of interest.
LAYERS = ((1536, 7168), (4608, 7168), (7168, 256))
TOKENS = (1, 16, 64, 128, 256, 1024, 6144)


def fp8(rows: int, columns: int, dtype: torch.dtype | None = None, padded: int = 0) -> Tensor:
    """Random numbers in FP8; the row stride is `padded` more than the number of columns."""
    return torch.randn(rows, columns + padded, dtype=torch.bfloat16).to(dtype or quant.fp8_dtype())[:, :columns]


def whole(rows: int, columns: int) -> Tensor:
    """Random integers in FP8, so that every sum of products is exact."""
    return torch.randint(-4, 5, (rows, columns)).to(torch.float32).to(quant.fp8_dtype())


def make_case(m: int, n: int, k: int, block_shape: list[int] | None = None, out_dtype: torch.dtype = torch.bfloat16,
              dtype: torch.dtype | None = None, padded: int = 0) -> dict:
    bn, bk = block_shape = block_shape or [128, 128]
    groups = -(-k // bk)
    return dict(a=fp8(m, k, dtype, padded), b=fp8(n, k, dtype, padded), a_scale=torch.rand(m, groups) + 0.5,
                b_scale=(torch.rand(-(-n // bn), groups) + 0.5) * k**-0.5, block_shape=block_shape, out_dtype=out_dtype)


def _exact() -> dict:
    return make_case(5, 40, 192, [32, 32], torch.float32) | dict(
        a=whole(5, 192), b=whole(40, 192), a_scale=torch.ones(5, 6), b_scale=torch.full((2, 6), 0.5))


def _by_columns(args: dict) -> dict:
    """Scales of a column side by side, as other kernels want them."""
    return args | dict(a_scale=args["a_scale"].t().contiguous().t(), b_scale=args["b_scale"].t().contiguous().t())


def cases():
    drawn = {
        "one-token": dict(m=1, n=64, k=256),
        "batch": dict(m=19, n=96, k=128, block_shape=[32, 32]),
        "tall": dict(m=67, n=32, k=64, block_shape=[32, 32]),
        "split": dict(m=3, n=16, k=700, block_shape=[16, 64]),
        "fp16": dict(m=7, n=64, k=128, out_dtype=torch.float16),
        "edges": dict(m=5, n=97, k=150, block_shape=[32, 64]),
        "prime": dict(m=17, n=37, k=97, block_shape=[64, 32]),
        "rows": dict(m=33, n=50, k=64, block_shape=[1, 32]),
        "padded": dict(m=9, n=40, k=128, padded=64),
        # of blocks of 128: what HIP's kernels for few and for many tokens tell apart
        "ragged": dict(m=21, n=37, k=400, out_dtype=torch.float32),
        "two-tiles": dict(m=70, n=17, k=144),
        "splits": dict(m=257, n=16, k=1040),
        "many-tokens": dict(m=2049, n=8, k=16, out_dtype=torch.float16),
        "no-tokens": dict(m=0, n=64, k=128),
        "no-columns": dict(m=4, n=0, k=128),
    }
    if platform.arch() is None:  # elsewhere only the architecture's own flavor is served
        drawn["fnuz"] = dict(m=7, n=64, k=128, dtype=torch.float8_e4m3fnuz)
    for name, settings in drawn.items():
        yield Case(name, lambda settings=settings: make_case(**settings))
    yield Case("exact", _exact)
    yield Case("scales-by-columns", lambda: _by_columns(make_case(20, 64, 256, [64, 64])))
    for n, k in LAYERS:
        for m in TOKENS:
            yield Case(f"{m}x{n}x{k}", lambda m=m, n=n, k=k: make_case(m, n, k), large=True)


def check_factors(a, b, out_dtype):
    """Checks that the FP8 products share."""
    for name, factor, shape in (("a", a, "[M, K]"), ("b", b, "[N, K]")):
        if factor.ndim != 2 or factor.shape[1] == 0 or factor.stride(1) != 1 and factor.shape[1] > 1:
            raise BadArgument(name, f"{shape} with a contiguous last dimension, not empty", factor)
    if a.dtype not in quant.FP8.values():
        raise BadArgument("a", "float8_e4m3fn or float8_e4m3fnuz", a)
    arch = platform.arch() if a.device.type != "cpu" else None
    if arch and arch.fp8 and a.dtype != quant.FP8[arch.fp8]:
        raise BadArgument("a", f"{quant.FP8[arch.fp8]}, the FP8 type of {arch.name}", a, "see quant.fp8_dtype")
    if b.dtype != a.dtype:
        raise BadArgument("b", f"dtype {a.dtype}, that of a", b, "quant.fn_to_fnuz converts a checkpoint's weights")
    if b.shape[1] != a.shape[1]:
        raise BadArgument("b", f"[N, {a.shape[1]}], rows as long as those of a", b)
    if out_dtype not in OUT_DTYPES:
        raise BadArgument("out_dtype", "bf16, fp16 or fp32", out_dtype)


def check(a, b, a_scale, b_scale, block_shape, out_dtype):
    check_factors(a, b, out_dtype)
    if len(block_shape) != 2 or min(block_shape) < 1:
        raise BadArgument("block_shape", "two positive numbers, rows and columns of a block of b", block_shape)
    (m, k), n, (bn, bk) = a.shape, b.shape[0], block_shape
    groups = -(-k // bk)
    for name, scale, shape in (("a_scale", a_scale, (m, groups)), ("b_scale", b_scale, (-(-n // bn), groups))):
        if scale.shape != shape or scale.dtype != torch.float32:
            raise BadArgument(name, f"fp32 {list(shape)} for blocks of {list(block_shape)}", scale)


def cost(a, b, a_scale, b_scale, block_shape, out_dtype) -> Cost:
    (m, k), n = a.shape, b.shape[0]
    return Cost(bytes=m * k + n * k + a_scale.nbytes + b_scale.nbytes + m * n * out_dtype.itemsize, flops=2 * m * n * k)


@op(cases=cases, check=check, cost=cost)
def fp8_block_scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
                        out_dtype: torch.dtype) -> Tensor:
    """FP8 GEMM with block scales, y = a @ b.T: y[m, n] = sum over groups g of a_scale[m, g] b_scale[n // bn, g] sum
    over k in g of a[m, k] b[n, k], where block_shape = [bn, bk] and group g has columns g bk to (g + 1) bk.
    (DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2)

    a            [M, K]  the architecture's FP8; last dim contiguous, rows may be strided
    b            [N, K]  dtype of a; last dim contiguous, rows may be strided; N and K need not be multiples of a block
    a_scale      [M, ceil(K / bk)]  fp32, any strides: a = stored * scale
    b_scale      [ceil(N / bn), ceil(K / bk)]  fp32, any strides: b = stored * scale
    block_shape  [rows, columns] of a block of b
    out_dtype    bf16, fp16 or fp32
    returns      [M, N]  out_dtype, contiguous
    raises       BadArgument (a ValueError) for other dtypes, shapes or strides, or two FP8 dtypes

    Error bound, with S the sum of |a_scale b_scale a b| over the products of y and u the unit roundoff of out_dtype
    (bf16 2^-8, fp16 2^-11, fp32 2^-24):
      |error| <= (K + 6) 2^-23 S + u |y|, plus half the smallest step where fp16 is subnormal.
    A product of two FP8 values has 8 significant bits, so it is exact in fp32. It goes through at most K additions,
    within groups, between them and between splits of K, two multiplications by scales, and the product of the scales;
    each has a relative error of at most 2^-23, also where matrix cores truncate, and S bounds its result.
    Hopper's matrix cores add 32 products and the sum so far at a time with 14 bits: each of these 33 is truncated by up
    to 2^-13 of the largest, hence of S. A step of at most 128 columns starts at 0 and has 4 such additions, which adds
    an error of at most 4 * 33 * 2^-13 S < 2^-5.9 S. Most errors are far smaller, since truncations differ in sign.
    """
    wide = torch.promote_types(a_scale.dtype, torch.float32)
    bn, bk = block_shape
    y = quant.dequantize(a, a_scale, [1, bk], wide) @ quant.dequantize(b, b_scale, [bn, bk], wide).t()
    return y if wide == torch.float64 else y.to(out_dtype)
