import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, launch, no_fp8

#: Blocks that find amax, at most: as many as the largest GPU runs at a time.
NUM_PARTS = 2048


@bind(ops.per_tensor_quant_fp8, supports=None, absent=no_fp8)
def per_tensor_quant_fp8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    num_tokens, columns = x.shape
    q = torch.empty((num_tokens, columns), dtype=quant.fp8_dtype(), device=x.device)
    found = torch.empty(1, dtype=torch.float32, device=x.device)
    amax = torch.empty(NUM_PARTS, dtype=torch.float32, device=x.device) if scale is None else None
    launch("per_tensor_quant_fp8", x=x, scale=scale, q=q, found=found, amax=amax, x_stride=x.stride(0),
           num_tokens=num_tokens, columns=columns, num_parts=NUM_PARTS, dtype=x.dtype)
    return q, found
