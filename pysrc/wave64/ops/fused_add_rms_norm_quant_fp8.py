"""Residual add, root mean square normalization and quantization in one pass: the input of an FP8 product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.fused_add_rms_norm import check as check_norm
from wave64.ops.per_token_group_quant_fp8 import grouped
from wave64.ops.rms_norm import DTYPES

GROUP_SIZES = (32, 64, 128)
PER_TOKEN = -1  # in place of a group size: one scale for all columns


def _draw(tokens, hidden, dtype=torch.bfloat16, group_size=128, adds=True, scale_ue8m0=False):
    return dict(x=torch.randn(tokens, hidden, dtype=dtype),
                residual=torch.randn(tokens, hidden, dtype=dtype) if adds else None,
                weight=torch.randn(hidden, dtype=dtype), eps=1e-5, group_size=group_size, scale_ue8m0=scale_ue8m0)


def _strided():
    merged = torch.randn(2, 6, 3 * 256, dtype=torch.bfloat16)
    return dict(x=merged[0, :, 256:512], residual=merged[1, :, 8:264],
                weight=torch.randn(256, dtype=torch.bfloat16), eps=1e-6, group_size=128)


def _rows_of_zeros(group_size):
    x, residual = torch.randn(2, 4, 256, dtype=torch.bfloat16)
    x[1], residual[1] = 0, 0
    residual[2] = -x[2]
    x[3, 128:], residual[3, 128:] = 0, 0
    return _draw(4, 256, group_size=group_size) | dict(x=x.clone(), residual=residual.clone())


def cases():
    bf16, fp16, fp32 = DTYPES
    for dtype, group_size, adds in [(bf16, 128, True), (bf16, PER_TOKEN, True), (bf16, 128, False), (fp32, 128, True),
                                    (fp16, PER_TOKEN, False), (fp32, PER_TOKEN, True), (fp16, 32, True)]:
        yield Case(f"3x384-{dtype}-group{group_size}{'' if adds else '-alone'}",
                   lambda d=dtype, g=group_size, a=adds: _draw(3, 384, d, g, a))
    for tokens, hidden, group_size in [(2, 7168, 128), (1, 4096, PER_TOKEN), (0, 128, 128), (3, 320, 64),
                                       (5, 97, PER_TOKEN)]:
        yield Case(f"{tokens}x{hidden}-group{group_size}",
                   lambda t=tokens, h=hidden, g=group_size: _draw(t, h, group_size=g))
    yield Case("strided", _strided)
    yield Case("zeros", lambda: _rows_of_zeros(64))
    for group_size in (64, PER_TOKEN):
        yield Case(f"ue8m0-group{group_size}", lambda g=group_size: _draw(3, 256, group_size=g, scale_ue8m0=True))
    for tokens, hidden, group_size in [(1, 7168, 128), (128, 7168, 128), (4096, 7168, 128), (128, 4096, PER_TOKEN)]:
        yield Case(f"{tokens}x{hidden}-group{group_size}",
                   lambda t=tokens, h=hidden, g=group_size: _draw(t, h, group_size=g), large=True)


def check(x, residual, weight, eps, group_size, scale_ue8m0=False):
    check_norm(x, x if residual is None else residual, weight, eps)
    if group_size != PER_TOKEN and (group_size not in GROUP_SIZES or x.shape[1] % group_size):
        raise BadArgument("group_size", f"32, 64 or 128, a divisor of {x.shape[1]}, the columns of x, or -1 for one "
                          "scale a token", group_size)


def agree(args, result, exact) -> None:
    """Each number within the half step of FP8, 2^-4, of the exact one; the residual, and so the norm, may have been
    rounded to x's dtype before, by 2^-8 of bf16 each."""
    (q, scale), exact_scale, x = result, exact[1], args["x"]
    if scale.shape != exact_scale.shape or scale.dtype != torch.float32 or q.shape != x.shape:
        raise AssertionError(f"expected q {list(x.shape)} and scale fp32 {list(exact_scale.shape)}, got "
                             f"{list(q.shape)} and {scale.dtype} {list(scale.shape)}")
    next_power = args.get("scale_ue8m0", False)  # which rounding of the norm may reach
    torch.testing.assert_close(scale.double(), exact_scale.double(), rtol=1.0 if next_power else 2**-5, atol=0)
    normed = F.rms_norm(x if args["residual"] is None else args["residual"], args["weight"].shape, args["weight"],
                        args["eps"])
    size = x.shape[1] if args["group_size"] == PER_TOKEN else args["group_size"]
    got = quant.dequantize(q, scale, [1, size], torch.float64)
    amax = scale.double().repeat_interleave(size, 1) * quant.limit(q.dtype)
    wrong = ~((got - normed).abs() <= normed.abs() / 16 + amax / 64 + 1e-6)
    if wrong.any():
        raise AssertionError(f"{int(wrong.sum())} of {q.numel()} numbers: expected about {normed[wrong][:4].tolist()}, "
                             f"got {got[wrong][:4].tolist()}")


def cost(x, residual, weight, eps, group_size, scale_ue8m0=False) -> Cost:
    groups = x.shape[0] * (1 if group_size == PER_TOKEN else x.shape[1] // group_size)
    return Cost(bytes=(1 if residual is None else 3) * x.nbytes + x.numel() + 4 * groups + weight.nbytes)


@op(cases=cases, check=check, mutates=("residual",), agree=agree, cost=cost)
def fused_add_rms_norm_quant_fp8(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group_size: int,
                                 scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """What an FP8 product takes behind a residual add: residual += x, in place, rounded to its dtype; returns
    per_token_group_quant_fp8(rms_norm(residual), group_size, scale_ue8m0), of the norm as it is rounded to the dtype of
    x: the bits of fused_add_rms_norm and a quantizer one after another. Without a residual: of rms_norm(x).

    x            [num_tokens, hidden]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    residual     [num_tokens, hidden]  dtype of x; last dim contiguous, rows may be strided; written. Or None
    weight       [hidden]              dtype of x
    group_size   32, 64 or 128, which divides hidden; or -1: one scale for each token, as per_token_quant_fp8 has
    scale_ue8m0  round scales up to powers of two, stored as fp32
    returns      q [num_tokens, hidden]  the architecture's FP8, contiguous, and
                 scale [num_tokens, hidden / group_size, or 1]  fp32, contiguous
    raises       BadArgument (a ValueError) for other shapes, dtypes, strides or group sizes
    """
    if residual is not None:
        x = residual.add_(x)
    normed = F.rms_norm(x, weight.shape, weight, eps)
    wide = normed.to(torch.promote_types(x.dtype, torch.float32))
    if group_size == PER_TOKEN:
        return quant.quantize(wide, -1, ue8m0=scale_ue8m0)
    return grouped(wide, group_size, scale_ue8m0)
