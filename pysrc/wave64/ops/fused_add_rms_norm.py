"""Residual add and root mean square normalization in one pass, in place."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES


def _draw(tokens, hidden, dtype):
    return dict(x=torch.randn(tokens, hidden, dtype=dtype), residual=torch.randn(tokens, hidden, dtype=dtype),
                weight=torch.randn(hidden, dtype=dtype), eps=1e-5)


def _draw_strided():
    merged = torch.randn(2, 6, 3 * 256, dtype=torch.bfloat16)
    return dict(x=merged[0, :, 256:512], residual=merged[1, :, 1:257], weight=torch.randn(256, dtype=torch.bfloat16))


def cases():
    shapes = [(1, 4096), (7, 768), (5, 97), (0, 128), (3, 1), (2, 8192)]
    for (tokens, hidden), dtype in itertools.product(shapes, DTYPES):
        yield Case(f"{tokens}x{hidden}-{dtype}", lambda t=tokens, h=hidden, d=dtype: _draw(t, h, d))
    yield Case("strided", _draw_strided)
    for tokens, hidden in [(128, 4096), (128, 7168), (128, 8192), (4096, 4096), (4096, 7168)]:
        yield Case(f"{tokens}x{hidden}", lambda t=tokens, h=hidden: _draw(t, h, torch.bfloat16), large=True)


def check(x, residual, weight, eps=1e-6):
    if x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise BadArgument("x", "[num_tokens, hidden] with a contiguous last dimension", x)
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if residual.shape != x.shape or residual.dtype != x.dtype or (residual.stride(1) != 1 and x.shape[1] > 1):
        raise BadArgument("residual", f"{x.dtype} {list(x.shape)}, as x, with a contiguous last dimension", residual)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise BadArgument("weight", f"contiguous {x.dtype} [{x.shape[1]}], one value per column of x", weight)


@op(cases=cases, check=check, mutates=("x", "residual"),
    cost=lambda x, residual, weight, eps=1e-6: Cost(bytes=4 * x.nbytes + weight.nbytes))
def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """Add x to the residual and normalize the sum, both in place: residual += x, rounded to its dtype; then
    x = rms_norm(residual), accumulated in fp32 and rounded once.

    x         [num_tokens, hidden]  bf16, fp16 or fp32; last dim contiguous, rows may be strided; written
    residual  [num_tokens, hidden]  dtype of x; last dim contiguous, rows may be strided; written
    weight    [hidden]              dtype of x
    raises    BadArgument (a ValueError) for other shapes, dtypes or strides
    """
    residual.add_(x)
    x.copy_(F.rms_norm(residual, weight.shape, weight, eps))
