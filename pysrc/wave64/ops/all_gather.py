"""The tensors of all ranks of a group, below each other."""

import torch
from torch import Tensor

from wave64 import distributed
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.all_reduce import check_group


def _draw(shape, dtype):
    return dict(x=torch.randn(shape).mul(50).to(dtype), group=distributed.ALONE.name)


def cases():
    """Of a rank alone, which any process is. What several ranks exchange is tests/ops/test_emulated_ranks.py's."""
    for shape, dtype in [((4, 512), torch.bfloat16), ((3, 97), torch.float32), ((5,), torch.int64),
                         ((7, 3), torch.uint8), ((0, 128), torch.float16)]:
        yield Case(f"{'x'.join(map(str, shape))}-{dtype}", lambda s=shape, d=dtype: _draw(s, d))


def check(x, group):
    if x.ndim == 0 or not x.is_contiguous():
        raise BadArgument("x", "a contiguous tensor of at least one dimension", x, "pass x.contiguous()")
    check_group(group)


def _fake(x, group):
    return x.new_empty(distributed.member(group).size * x.shape[0], *x.shape[1:])


@op(cases=cases, check=check, fake=_fake, cost=lambda x, group: Cost((1 + distributed.member(group).size) * x.nbytes))
def all_gather(x: Tensor, group: str) -> Tensor:
    """The ranks' x below each other, in the order of their ranks. Every rank of the group makes the same calls in the
    same order.

    x        [n, ...], contiguous, the same shape on every rank; any dtype
    group    a registered name (wave64.distributed)
    returns  [size * n, ...], dtype of x
    raises   BadArgument (a ValueError) for other strides, or a group that is not registered
    """
    return distributed.all_gather(x, group)
