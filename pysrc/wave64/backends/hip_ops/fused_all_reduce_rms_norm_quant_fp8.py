import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends import peers
from wave64.backends.hip import bind, constants, launch, no_fp8


def supports(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_size: int, group: str) -> str | None:
    limit = constants("fused_all_reduce_rms_norm_quant_fp8").MAX_ROW_BYTES
    if x.shape[1] * x.element_size() > limit:
        return f"rows of more than {limit} bytes"
    return peers.too_large(group, x)


@bind(ops.fused_all_reduce_rms_norm_quant_fp8, supports=supports, absent=no_fp8)
def fused_all_reduce_rms_norm_quant_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_size: int,
                                        group: str) -> tuple[Tensor, Tensor]:
    ranks = peers.of(group)
    ranks.note("fused_all_reduce_rms_norm_quant_fp8", x)
    (num_tokens, hidden), q = x.shape, torch.empty_like(x, dtype=quant.fp8_dtype())
    scale = torch.empty((num_tokens, hidden // group_size), dtype=torch.float32, device=x.device)
    launch("fused_all_reduce_rms_norm_quant_fp8", **ranks.fields, x=x, residual=residual, weight=weight, out=q,
           scale=scale, num_tokens=num_tokens, hidden=hidden, eps=eps, dtype=x.dtype,
           protocol=ranks.norm_protocol(x.nbytes), group_size=group_size)
    return q, scale
