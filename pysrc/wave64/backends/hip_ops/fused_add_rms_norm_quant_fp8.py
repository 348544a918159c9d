import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, constants, launch, no_fp8
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN

CONSTANTS = constants("fused_add_rms_norm_quant_fp8")


def supports(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group_size: int,
             scale_ue8m0: bool = False) -> str | None:
    if scale_ue8m0:
        return "has no scales of powers of two"
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes > CONSTANTS.MAX_ROW_BYTES:
        return f"rows of more than {CONSTANTS.MAX_ROW_BYTES} bytes"
    rows = (x,) if residual is None else (x, residual)
    offsets = [row_bytes, weight.data_ptr(), *(tensor.data_ptr() for tensor in rows)]
    if len(x) > 1:
        offsets += [tensor.stride(0) * tensor.element_size() for tensor in rows]
    if any(offset % 16 for offset in offsets):
        return "reads 16 bytes at a time, and rows do not begin and end at multiples of 16 bytes"
    return None


@bind(ops.fused_add_rms_norm_quant_fp8, supports=supports, absent=no_fp8)
def fused_add_rms_norm_quant_fp8(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group_size: int,
                                 scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    num_tokens, hidden = x.shape
    q = torch.empty((num_tokens, hidden), dtype=quant.fp8_dtype(), device=x.device)
    groups = 1 if group_size == PER_TOKEN else hidden // group_size
    scale = torch.empty((num_tokens, groups), dtype=torch.float32, device=x.device)
    launch("fused_add_rms_norm_quant_fp8", x=x, residual=residual, weight=weight, q=q, scale=scale,
           x_stride=x.stride(0), residual_stride=0 if residual is None else residual.stride(0), num_tokens=num_tokens,
           hidden=hidden, eps=eps, group_size=group_size, dtype=x.dtype)
    return q, scale
