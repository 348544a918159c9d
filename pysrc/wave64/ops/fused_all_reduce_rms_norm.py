"""The sum over the ranks of a group, residual add and root mean square normalization in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import distributed
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.all_reduce import check_group
from wave64.ops.rms_norm import DTYPES


def _draw(tokens, hidden, dtype):
    return dict(x=torch.randn(tokens, hidden, dtype=dtype), residual=torch.randn(tokens, hidden, dtype=dtype),
                weight=torch.randn(hidden, dtype=dtype), eps=1e-5, group=distributed.ALONE.name)


def cases():
    """Of a rank alone, which any process is. What several ranks exchange is tests/ops/test_emulated_ranks.py's."""
    for tokens, hidden in [(1, 4096), (5, 97), (0, 128)]:
        for dtype in DTYPES:
            yield Case(f"{tokens}x{hidden}-{dtype}", lambda t=tokens, h=hidden, d=dtype: _draw(t, h, d))


def check(x, residual, weight, eps, group):
    if x.ndim != 2 or not x.is_contiguous():
        raise BadArgument("x", "contiguous [num_tokens, hidden]", x, "pass x.contiguous()")
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise BadArgument("residual", f"contiguous {x.dtype} {list(x.shape)}, as x", residual)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise BadArgument("weight", f"contiguous {x.dtype} [{x.shape[1]}], one value per column of x", weight)
    check_group(group)


@op(cases=cases, check=check, mutates=("residual",), fake=lambda x, residual, weight, eps, group: x.new_empty(x.shape),
    cost=lambda x, residual, weight, eps, group: Cost(4 * x.nbytes + weight.nbytes))
def fused_all_reduce_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> Tensor:
    """Add the sum of the ranks' x to the residual, in place, and normalize it: residual += all_reduce(x), rounded to
    its dtype; returns rms_norm(residual), accumulated in fp32 and rounded once. Every rank of the group makes the same
    calls in the same order.

    x         [num_tokens, hidden], contiguous; bf16, fp16 or fp32
    residual  [num_tokens, hidden], contiguous, dtype of x, the same on every rank; written
    weight    [hidden], dtype of x
    group     a registered name (wave64.distributed)
    returns   [num_tokens, hidden], dtype of x
    raises    BadArgument (a ValueError) for other shapes, dtypes or strides, or a group that is not registered
    """
    residual.add_(distributed.all_reduce(x, group))
    return F.rms_norm(residual, weight.shape, weight, eps)
