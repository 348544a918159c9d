from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch


@bind(ops.fused_add_rms_norm, supports=floats_only)
def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    launch("fused_add_rms_norm", x, x.data_ptr(), residual.data_ptr(), weight.data_ptr(), x.stride(0),
           residual.stride(0), *x.shape, eps, DTYPES[x.dtype])
