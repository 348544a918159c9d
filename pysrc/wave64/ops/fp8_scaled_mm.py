"""Product of FP8 activations and FP8 weights, scaled per tensor, token or output channel."""

import torch
from torch import Tensor

from wave64 import platform
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.fp8_block_scaled_mm import LAYERS, TOKENS, check_factors, fp8, whole


def make_case(m: int, n: int, k: int, per: str = "channel", bias: bool = False,
              out_dtype: torch.dtype = torch.bfloat16, dtype: torch.dtype | None = None, padded: int = 0) -> dict:
    """per: "tensor", or "channel": a scale per token and output channel."""
    each = per == "channel"
    drawn = dict(a=fp8(m, k, dtype, padded), b=fp8(n, k, dtype, padded),
                 a_scale=torch.rand(*((m, 1) if each else (1,))) + 0.5,
                 b_scale=(torch.rand(*((n, 1) if each else (1,))) + 0.5) * k**-0.5, out_dtype=out_dtype)
    return drawn | dict(bias=torch.randn(n).to(out_dtype)) if bias else drawn


def _exact() -> dict:
    return dict(a=whole(5, 192), b=whole(40, 192), a_scale=torch.full((1,), 2.0), b_scale=torch.full((40,), 0.5),
                out_dtype=torch.float32, bias=torch.ones(40))


def cases():
    drawn = {
        "one-token": dict(m=1, n=64, k=256),
        "tensor": dict(m=19, n=96, k=128, per="tensor"),
        "tall": dict(m=67, n=32, k=64, bias=True),
        "split": dict(m=3, n=16, k=700, bias=True),
        "fp16": dict(m=7, n=64, k=128, out_dtype=torch.float16, bias=True),
        "edges": dict(m=5, n=97, k=150, bias=True),
        "prime": dict(m=17, n=37, k=97, per="tensor"),
        "padded": dict(m=9, n=40, k=128, padded=64),
        "no-tokens": dict(m=0, n=64, k=128),
        "no-columns": dict(m=4, n=0, k=128),
    }
    if platform.arch() is None:  # elsewhere only the architecture's own flavor is served
        drawn["fnuz"] = dict(m=7, n=64, k=128, dtype=torch.float8_e4m3fnuz)
    for name, settings in drawn.items():
        yield Case(name, lambda settings=settings: make_case(**settings))
    yield Case("exact", _exact)
    for n, k in LAYERS:
        for m in TOKENS:
            yield Case(f"{m}x{n}x{k}", lambda m=m, n=n, k=k: make_case(m, n, k), large=True)


def check(a, b, a_scale, b_scale, out_dtype, bias=None):
    check_factors(a, b, out_dtype)
    m, n = a.shape[0], b.shape[0]
    for name, scale, shapes in (("a_scale", a_scale, ((1,), (m, 1))), ("b_scale", b_scale, ((1,), (n, 1), (n,)))):
        if scale.shape not in shapes or scale.dtype != torch.float32:
            raise BadArgument(name, f"fp32 of shape {' or '.join(str(list(shape)) for shape in shapes)}", scale)
    if bias is not None and (bias.shape != (n,) or bias.dtype != out_dtype or not bias.is_contiguous()):
        raise BadArgument("bias", f"contiguous {out_dtype} [{n}], a number per row of b", bias)


def cost(a, b, a_scale, b_scale, out_dtype, bias=None) -> Cost:
    (m, k), n = a.shape, b.shape[0]
    return Cost(bytes=m * k + n * k + a_scale.nbytes + b_scale.nbytes + m * n * out_dtype.itemsize, flops=2 * m * n * k)


@op(cases=cases, check=check, cost=cost)
def fp8_scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype,
                  bias: Tensor | None = None) -> Tensor:
    """FP8 GEMM with scales per tensor, row of a or row of b, y = a @ b.T: y[m, n] = a_scale[m] b_scale[n] sum over k of
    a[m, k] b[n, k], plus bias[n]; rounded once.
    (Micikevicius et al. 2022, FP8 formats)

    a          [M, K]  the architecture's FP8; last dim contiguous, rows may be strided
    b          [N, K]  dtype of a; last dim contiguous, rows may be strided
    a_scale    [1] or [M, 1]  fp32: a = stored * scale
    b_scale    [1], [N, 1] or [N]  fp32: b = stored * scale
    out_dtype  bf16, fp16 or fp32
    bias       [N]  out_dtype
    returns    [M, N]  out_dtype, contiguous
    raises     BadArgument (a ValueError) for other dtypes, shapes or strides, or two FP8 dtypes

    Error bound, with S the sum of |a_scale b_scale a b| over the products of y and u the unit roundoff of out_dtype:
    |error| <= (K + 6) 2^-23 (S + |bias|) + u |y|, plus 2^-5.9 S on Hopper, as fp8_block_scaled_mm derives: here, too,
    sums of 14 bits are added to fp32 at least every 128 columns.
    """
    wide = torch.promote_types(a_scale.dtype, torch.float32)
    y = (a.to(wide) @ b.to(wide).t()) * a_scale * b_scale.reshape(-1)
    if bias is not None:
        y = y + bias
    return y if wide == torch.float64 else y.to(out_dtype)
