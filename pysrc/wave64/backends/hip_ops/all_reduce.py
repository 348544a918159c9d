import torch
from torch import Tensor

from wave64 import ops
from wave64.backends import peers
from wave64.backends.hip import bind
from wave64.ops.all_reduce import is_quantized


@bind(ops.all_reduce, supports=lambda x, group, quantize: peers.too_large(group, x))
def all_reduce(x: Tensor, group: str, quantize: str = "none") -> Tensor:
    out = torch.empty_like(x)
    ranks = peers.of(group)
    codes = quantize if is_quantized(x, quantize) else "none"
    ranks.note("all_reduce", x, codes)
    peers.launch_all_reduce(ranks, x, out, ranks.protocol(x.nbytes, codes))
    return out
