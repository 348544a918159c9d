"""What ranks exchange. Every rank of a group makes the same calls in the same order, on tensors of the same shape.

Today each goes to torch.distributed: gloo on CPUs, RCCL on GPUs.
"""

import torch.distributed as dist
from torch import Tensor

from wave64.distributed.groups import registered

# torch 2.13 renamed these two, and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, the same on every rank.

    x        any shape, contiguous, bf16, fp16 or fp32; what it holds afterwards is not defined
    group    a registered name
    returns  shape and dtype of x
    raises   ValueError for a group that is not registered
    """
    dist.all_reduce(x, group=registered(group))
    return x


def all_gather(x: Tensor, group: str) -> Tensor:
    """The ranks' x below each other, in the order of their ranks.

    x        [n, ...], contiguous, any dtype
    returns  [size * n, ...], dtype of x
    raises   ValueError for a group that is not registered
    """
    made = registered(group)
    out = x.new_empty(made.size() * x.shape[0], *x.shape[1:])
    _all_gather(out, x, group=made)
    return out


def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, of which rank r gets the r-th of `size` equal parts along the first dimension.

    x        [size * n, ...], contiguous, bf16, fp16 or fp32
    returns  [n, ...], dtype of x
    raises   ValueError for a group that is not registered, or rows that its size does not divide
    """
    made = registered(group)
    if x.shape[0] % made.size():
        raise ValueError(f"x: expected a multiple of {made.size()} rows, one part per rank, got {list(x.shape)}")
    out = x.new_empty(x.shape[0] // made.size(), *x.shape[1:])
    _reduce_scatter(out, x, group=made)
    return out
