import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, launch, no_fp8


def supports(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> str | None:
    return "has no scales of powers of two" if scale_ue8m0 else None


@bind(ops.per_token_group_quant_fp8, supports=supports, absent=no_fp8)
def per_token_group_quant_fp8(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    num_tokens, columns = x.shape
    q = torch.empty((num_tokens, columns), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((num_tokens, -(-columns // group_size)), dtype=torch.float32, device=x.device)
    launch("per_token_group_quant_fp8", x=x, q=q, scale=scale, x_stride=x.stride(0), num_tokens=num_tokens,
           columns=columns, group_size=group_size, dtype=x.dtype)
    return q, scale
