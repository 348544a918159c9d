from torch import Tensor

from wave64 import ops
from wave64.backends import peers
from wave64.backends.hip import bind, launch


@bind(ops.reduce_scatter, supports=lambda x, group: peers.too_large(group, x))
def reduce_scatter(x: Tensor, group: str) -> Tensor:
    ranks = peers.of(group)
    ranks.note("reduce_scatter", x)
    out = x.new_empty(x.shape[0] // ranks.group.size, *x.shape[1:])
    launch("reduce_scatter", **ranks.fields, x=x, out=out, count=out.numel(), dtype=x.dtype)
    return out
