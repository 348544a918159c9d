import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, launch, no_fp8


@bind(ops.per_token_quant_fp8, supports=None, absent=no_fp8)
def per_token_quant_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, columns = x.shape
    q = torch.empty((num_tokens, columns), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((num_tokens, 1), dtype=torch.float32, device=x.device)
    launch("per_token_quant_fp8", x=x, q=q, scale=scale, x_stride=x.stride(0), num_tokens=num_tokens, columns=columns,
           dtype=x.dtype)
    return q, scale
