import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch


@bind(ops.rms_norm, supports=floats_only)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch("rms_norm", x, x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0), *x.shape, eps,
           DTYPES[x.dtype])
    return out
