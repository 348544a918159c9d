"""The sum over the ranks of a group, of which each rank gets a part."""

import torch
from torch import Tensor

from wave64 import distributed
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.all_reduce import check_group
from wave64.ops.rms_norm import DTYPES


def _draw(shape, dtype):
    return dict(x=torch.randn(shape, dtype=dtype), group=distributed.ALONE.name)


def cases():
    """Of a rank alone, which any process is. What several ranks exchange is tests/ops/test_emulated_ranks.py's."""
    for shape in [(4, 512), (3, 97), (0, 128)]:
        for dtype in DTYPES:
            yield Case(f"{'x'.join(map(str, shape))}-{dtype}", lambda s=shape, d=dtype: _draw(s, d))


def check(x, group):
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if x.ndim == 0 or not x.is_contiguous():
        raise BadArgument("x", "a contiguous tensor of at least one dimension", x, "pass x.contiguous()")
    check_group(group)
    if x.shape[0] % (size := distributed.member(group).size):
        raise BadArgument("x", f"a multiple of {size} rows, one part per rank", x)


def _fake(x, group):
    return x.new_empty(x.shape[0] // distributed.member(group).size, *x.shape[1:])


@op(cases=cases, check=check, fake=_fake,
    cost=lambda x, group: Cost(x.nbytes + x.nbytes // distributed.member(group).size))
def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, of which rank r gets the r-th of `size` equal parts along the first dimension; added up
    as all_reduce does. Every rank of the group makes the same calls in the same order.

    x        [size * n, ...], contiguous, the same shape on every rank; bf16, fp16 or fp32
    group    a registered name (wave64.distributed)
    returns  [n, ...], dtype of x
    raises   BadArgument (a ValueError) for other dtypes, shapes or strides, or a group that is not registered
    """
    return distributed.reduce_scatter(x, group)
