from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, floats_only, launch


@bind(ops.fused_add_rms_norm, supports=floats_only)
def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    num_tokens, hidden = x.shape
    launch("fused_add_rms_norm", x=x, residual=residual, weight=weight, x_stride=x.stride(0),
           residual_stride=residual.stride(0), num_tokens=num_tokens, hidden=hidden, eps=eps, dtype=x.dtype)
