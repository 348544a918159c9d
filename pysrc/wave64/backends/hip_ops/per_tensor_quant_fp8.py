import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import DTYPES, bind, fp8_only, launch, workspace

#: Blocks that find amax, at most: as many as the largest GPU runs at a time.
PARTS = 2048


@bind(ops.per_tensor_quant_fp8, supports=fp8_only)
def per_tensor_quant_fp8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=quant.fp8_dtype(), device=x.device)
    found = torch.empty(1, dtype=torch.float32, device=x.device)
    amax = workspace(PARTS, dtype=torch.float32, device=x.device) if scale is None else None
    launch("per_tensor_quant_fp8", x, x.data_ptr(), 0 if scale is None else scale.data_ptr(), q.data_ptr(),
           found.data_ptr(), 0 if amax is None else amax.data_ptr(), x.stride(0), *x.shape, PARTS, DTYPES[x.dtype])
    return q, found
