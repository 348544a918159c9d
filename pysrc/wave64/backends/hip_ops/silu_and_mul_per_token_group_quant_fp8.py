import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, launch, no_fp8
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN

GROUP_SIZES = (32, 64, 128)


def supports(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> str | None:
    if scale_ue8m0:
        return "has no scales of powers of two"
    if group_size == PER_TOKEN:
        return "quantizes groups of columns, not rows"
    if group_size not in GROUP_SIZES or x.shape[1] // 2 % group_size:
        return f"quantizes whole groups of 32, 64 or 128 columns, these are {x.shape[1] // 2} in groups of {group_size}"
    if x.data_ptr() % 16 or len(x) > 1 and x.stride(0) * x.element_size() % 16:
        return "reads 16 bytes at a time, and rows do not begin at multiples of 16 bytes"
    return None


@bind(ops.silu_and_mul_per_token_group_quant_fp8, supports=supports, absent=no_fp8)
def silu_and_mul_per_token_group_quant_fp8(x: Tensor, group_size: int,
                                           scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    num_tokens, d = x.shape[0], x.shape[1] // 2
    q = torch.empty((num_tokens, d), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((num_tokens, d // group_size), dtype=torch.float32, device=x.device)
    launch("silu_and_mul_per_token_group_quant_fp8", x=x, q=q, scale=scale, x_stride=x.stride(0),
           num_tokens=num_tokens, d=d, group_size=group_size, dtype=x.dtype)
    return q, scale
