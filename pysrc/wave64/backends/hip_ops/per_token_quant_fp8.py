import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import DTYPES, bind, fp8_only, launch


@bind(ops.per_token_quant_fp8, supports=fp8_only)
def per_token_quant_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    launch("per_token_quant_fp8", x, x.data_ptr(), q.data_ptr(), scale.data_ptr(), x.stride(0), *x.shape,
           DTYPES[x.dtype])
    return q, scale
