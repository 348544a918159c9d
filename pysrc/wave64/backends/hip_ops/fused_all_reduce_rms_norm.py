import torch
from torch import Tensor

from wave64 import ops
from wave64.backends import peers
from wave64.backends.hip import bind, constants, launch


def supports(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> str | None:
    limit = constants("fused_all_reduce_rms_norm").MAX_ROW_BYTES
    if x.shape[1] * x.element_size() > limit:
        return f"rows of more than {limit} bytes"
    return peers.too_large(group, x)


@bind(ops.fused_all_reduce_rms_norm, supports=supports)
def fused_all_reduce_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> Tensor:
    ranks = peers.of(group)
    ranks.note("fused_all_reduce_rms_norm", x)
    (num_tokens, hidden), out = x.shape, torch.empty_like(x)
    launch("fused_all_reduce_rms_norm", **ranks.fields, x=x, residual=residual, weight=weight, out=out,
           num_tokens=num_tokens, hidden=hidden, eps=eps, dtype=x.dtype, protocol=ranks.norm_protocol(x.nbytes))
    return out
