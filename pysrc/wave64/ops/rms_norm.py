"""Root mean square normalization."""

import itertools

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cases():
    shapes = [(1, 4096), (7, 768), (5, 97), (0, 128), (3, 1), (2, 8192)]
    for (tokens, hidden), dtype in itertools.product(shapes, DTYPES):
        yield Case(f"{tokens}x{hidden}-{dtype}", lambda t=tokens, h=hidden, d=dtype: dict(
            x=torch.randn(t, h, dtype=d), weight=torch.randn(h, dtype=d), eps=1e-6))
    yield Case("strided", lambda: dict(
        x=torch.randn(6, 3 * 256, dtype=torch.bfloat16)[:, 256:512], weight=torch.randn(256, dtype=torch.bfloat16)))
    yield Case("unaligned", lambda: dict(
        x=torch.randn(4, 131, dtype=torch.float16)[:, 1:130], weight=torch.randn(130, dtype=torch.float16)[1:]))
    yield Case("heads", lambda: dict(x=torch.randn(3, 4, 128, dtype=torch.bfloat16),
                                     weight=torch.randn(128, dtype=torch.bfloat16)))
    for dtype in DTYPES:
        yield Case(f"heads-of-qkv-{dtype}", lambda d=dtype: dict(x=_heads_of_qkv(5, 6, 2, 64, d), weight=torch.randn(
            64, dtype=d)))
    yield Case("odd-heads-of-qkv", lambda: dict(x=_heads_of_qkv(4, 3, 1, 37, torch.float16), weight=torch.randn(
        37, dtype=torch.float16)))
    yield Case("16-heads-of-qkv", lambda: dict(x=_heads_of_qkv(3, 16, 2, 128, torch.bfloat16), weight=torch.randn(
        128, dtype=torch.bfloat16)))
    yield Case("no-tokens-of-qkv", lambda: dict(x=_heads_of_qkv(0, 6, 2, 64, torch.bfloat16), weight=torch.randn(
        64, dtype=torch.bfloat16)))
    for tokens, hidden in [(128, 7168), (4096, 7168), (4096, 4096)]:
        yield Case(f"{tokens}x{hidden}", lambda t=tokens, h=hidden: dict(
            x=torch.randn(t, h, dtype=torch.bfloat16), weight=torch.randn(h, dtype=torch.bfloat16)), large=True)
    yield Case("4096x32-heads-of-qkv", lambda: dict(
        x=_heads_of_qkv(4096, 32, 8, 128, torch.bfloat16), weight=torch.randn(
        128, dtype=torch.bfloat16)), large=True)


def _heads_of_qkv(tokens, heads, kv_heads, head_dim, dtype):
    """The query heads of a merged projection of query, key and value."""
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    return qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))


def check(x, weight, eps=1e-6):
    if x.ndim not in (2, 3) or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise BadArgument("x", "[num_tokens, hidden] or [num_tokens, num_heads, hidden] with a contiguous last "
                          "dimension", x)
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise BadArgument("weight", f"contiguous [{x.shape[-1]}], one value per column of x", weight)
    if weight.dtype != x.dtype:
        raise BadArgument("weight", f"dtype {x.dtype}, that of x", weight, "convert it once, at load")


@op(cases=cases, check=check, cost=lambda x, weight, eps=1e-6: Cost(bytes=2 * x.nbytes + weight.nbytes))
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Apply RMSNorm to the last dimension: y = x / sqrt(mean(x^2) + eps) * weight, accumulated in fp32 and rounded
    once. (Zhang & Sennrich 2019)

    x        [num_tokens, hidden], or [num_tokens, num_heads, hidden] which normalizes each head; bf16, fp16 or
             fp32; last dim contiguous, the others may be strided
    weight   [hidden]  dtype of x
    returns  shape and dtype of x, contiguous
    raises   BadArgument (a ValueError) for other shapes, dtypes or strides
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).mul_(weight).to(x.dtype).contiguous()
