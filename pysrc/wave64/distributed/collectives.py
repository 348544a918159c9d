"""What ranks exchange through torch.distributed: gloo between CPUs, RCCL between GPUs. The operators of the same names
(wave64.ops) have these as references. Every rank of a group makes the same calls in the same order, on tensors of the
same shape.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from wave64.distributed.groups import member, registered, summing

# torch 2.13 renamed these two, and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x [...], contiguous, the same on every rank. Raises ValueError for a group that is not
    registered."""
    out = x.clone()
    if member(group).size > 1 and x.numel():
        other = summing(group)
        if other is None or not other.all_reduce(out):
            dist.all_reduce(out, group=registered(group))
    return out


def all_gather(x: Tensor, group: str) -> Tensor:
    """The ranks' x [n, ...], contiguous, below each other, [size * n, ...], in the order of their ranks. Raises
    ValueError for a group that is not registered."""
    size = member(group).size
    if size == 1:
        return x.clone()
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    if x.numel():  # as bytes: gloo refuses FP8, int16 and others
        _all_gather(out.view(torch.uint8), x.view(torch.uint8), group=registered(group))
    return out


def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x [size * n, ...], contiguous, of which rank r gets the r-th of `size` equal parts, [n,
    ...]. Raises ValueError for a group that is not registered."""
    size = member(group).size
    if size == 1:
        return x.clone()
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    if x.numel():
        _reduce_scatter(out, x, group=registered(group))
    return out
