"""The sum over the ranks of a group."""

import torch
from torch import Tensor

from wave64 import distributed
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES


def _draw(shape, dtype):
    return dict(x=torch.randn(shape, dtype=dtype), group=distributed.ALONE.name)


def cases():
    """Of a rank alone, which any process is. What several ranks exchange is tests/ops/test_emulated_ranks.py's."""
    for shape in [(1, 4096), (3, 97), (5,), (0, 128)]:
        for dtype in DTYPES:
            yield Case(f"{'x'.join(map(str, shape))}-{dtype}", lambda s=shape, d=dtype: _draw(s, d))


def check_group(group: str) -> None:
    """A name that is registered."""
    if group not in (known := distributed.names()):
        raise BadArgument("group", f"a registered name: {', '.join(known)}", repr(group),
                          "wave64.distributed.join() a world or partition() it first")


def check(x, group):
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if not x.is_contiguous():
        raise BadArgument("x", "a contiguous tensor", x, "pass x.contiguous()")
    check_group(group)


@op(cases=cases, check=check, fake=lambda x, group: x.new_empty(x.shape), cost=lambda x, group: Cost(2 * x.nbytes))
def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, added up in the order of the ranks in fp32 and rounded once: the same bits on every rank
    and in every run. (The reference's order is torch.distributed's.) Every rank of the group makes the same calls in
    the same order.

    x        any shape, contiguous, the same on every rank; bf16, fp16 or fp32
    group    a registered name (wave64.distributed)
    returns  shape and dtype of x
    raises   BadArgument (a ValueError) for other dtypes or strides, or a group that is not registered
    """
    return distributed.all_reduce(x, group)
