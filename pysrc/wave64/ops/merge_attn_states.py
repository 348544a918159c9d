"""Merges attention over two sets of keys into attention over both."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES


def _draw(tokens, heads, head_dim, dtype=torch.bfloat16, spread=2.0):
    """Two states; `spread` is the standard deviation of the logarithms."""
    side = [(torch.randn(tokens, heads, head_dim, dtype=dtype), torch.randn(tokens, heads) * spread) for _ in range(2)]
    return dict(out_a=side[0][0], lse_a=side[0][1], out_b=side[1][0], lse_b=side[1][1])


def _absent(dtype):
    """Every pairing of a present, an absent (-inf) and a +inf side; what absent ones hold is no number."""
    args = _draw(9, 3, 64, dtype)
    for t, (a, b) in enumerate(itertools.product((0.0, -math.inf, math.inf), repeat=2)):
        for side, lse in (("a", a), ("b", b)):
            if lse:
                args[f"lse_{side}"][t] = lse
                args[f"out_{side}"][t] = torch.tensor([math.nan, math.inf] * 32)
    return args


def _strided():
    """Heads of fused tensors, rows cut from wider ones (values padded to the keys' width), lse stored heads first."""
    args = _draw(6, 5, 128)
    padded = torch.randn(6, 9, 192, dtype=torch.bfloat16)
    headwise = torch.randn(5, 7, 128, dtype=torch.bfloat16)
    return args | dict(out_a=padded[:, 2:7, 64:], out_b=headwise.transpose(0, 1)[1:], lse_b=torch.randn(5, 6).t())


def _unaligned():
    flat = torch.randn(2 * 24 * 33 + 1, dtype=torch.float16)[1:].view(2, 8, 3, 33)
    return _draw(8, 3, 33, torch.float16) | dict(out_a=flat[0], out_b=flat[1])


def cases():
    shapes = [(1, 16, 128), (7, 3, 96), (5, 2, 33), (3, 1, 1), (2, 7, 512), (0, 4, 64), (3, 0, 64), (3, 2, 0)]
    for (tokens, heads, head_dim), dtype in itertools.product(shapes, DTYPES):
        yield Case(f"{tokens}x{heads}x{head_dim}-{dtype}",
                   lambda t=tokens, h=heads, d=head_dim, dt=dtype: _draw(t, h, d, dt))
    for dtype in DTYPES:
        yield Case(f"absent-{dtype}", lambda d=dtype: _absent(d))
        yield Case(f"far-{dtype}", lambda d=dtype: _draw(6, 4, 64, d, spread=1e4))
    yield Case("2x128x128", lambda: _draw(2, 128, 128))
    yield Case("strided", _strided)
    yield Case("unaligned", _unaligned)
    for tokens, heads, head_dim in [(1, 128, 512), (128, 128, 512), (8192, 16, 128), (8192, 128, 128),
                                    (100000, 16, 128)]:
        yield Case(f"{tokens}x{heads}x{head_dim}",
                   lambda t=tokens, h=heads, d=head_dim: _draw(t, h, d), large=True)
    yield Case("8192x16x128-fp32", lambda: _draw(8192, 16, 128, torch.float32), large=True)


def check(out_a, lse_a, out_b, lse_b):
    if out_a.ndim != 3 or out_a.stride(2) != 1 and out_a.shape[2] > 1:
        raise BadArgument("out_a", "[num_tokens, num_heads, head_dim] with a contiguous last dimension", out_a)
    if out_a.dtype not in DTYPES:
        raise BadArgument("out_a", "bf16, fp16 or fp32", out_a)
    shape = list(out_a.shape)
    if out_b.shape != out_a.shape or out_b.stride(2) != 1 and out_b.shape[2] > 1:
        raise BadArgument("out_b", f"{shape}, as out_a, with a contiguous last dimension", out_b)
    if out_b.dtype != out_a.dtype:
        raise BadArgument("out_b", f"dtype {out_a.dtype}, that of out_a", out_b)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.dtype != torch.float32 or lse.shape != out_a.shape[:2]:
            hint = "FlashAttention's is heads first: transpose it" if list(lse.shape) == shape[1::-1] else ""
            raise BadArgument(name, f"fp32 {shape[:2]}, a natural logarithm per token and head", lse, hint)


def cost(out_a, lse_a, out_b, lse_b) -> Cost:
    return Cost(bytes=3 * (out_a.nbytes + lse_a.nbytes), flops=3 * out_a.numel())


@op(cases=cases, check=check, cost=cost)
def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results of attention over two disjoint sets of keys, such as a shared prefix and the rest, into the
    result of attention over both, computed in fp32 and rounded once:

        out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b),  lse = log(e^lse_a + e^lse_b)

    Exponents are relative to the larger lse, so that none overflows.
    (Milakov & Gimelshein 2018; Ye et al. 2024, Cascade Inference)

    out_*    [num_tokens, num_heads, head_dim]  bf16, fp16 or fp32, both the same; last dim contiguous, others may be
             strided
    lse_*    [num_tokens, num_heads]  fp32, natural logarithm, any strides. -inf: this side has no keys and contributes
             nothing, even if its out is NaN. +inf, which other libraries write in that case, counts as -inf. NaN gives
             NaN
    returns  out [num_tokens, num_heads, head_dim] of out_a's dtype and lse [num_tokens, num_heads] fp32, contiguous;
             zeros and -inf where neither side has keys
    raises   BadArgument (a ValueError) for other shapes, dtypes, strides or devices
    """
    lse_a, lse_b = (lse.masked_fill(lse == math.inf, -math.inf) for lse in (lse_a, lse_b))
    row_max = torch.maximum(lse_a, lse_b)
    base = row_max.masked_fill(row_max == -math.inf, 0)  # neither side: exp(-inf - 0) = 0, not NaN
    weights = [(lse - base).exp() for lse in (lse_a, lse_b)]
    row_sum = weights[0] + weights[1]
    divisor = row_sum.masked_fill(row_sum == 0, 1)
    acc: Any = 0
    for out, lse, weight in zip((out_a, out_b), (lse_a, lse_b), weights, strict=True):
        acc = acc + out.masked_fill((lse == -math.inf)[..., None], 0) * (weight / divisor)[..., None]
    return acc.to(out_a.dtype).contiguous(), (row_max + row_sum.log()).contiguous()
