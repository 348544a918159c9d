import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch


def supports(x: Tensor, weight: Tensor, eps: float = 1e-6) -> str | None:
    if x.ndim == 3 and 1 not in x.shape[:2] and x.stride(0) != x.shape[1] * x.stride(1):
        return "heads of a wider row: tokens and heads have different strides"
    return floats_only(x)


@bind(ops.rms_norm, supports=supports)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.view(-1, x.shape[-1]) if x.ndim == 3 else x
    launch("rms_norm", x, x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows.stride(0), out.stride(-2), *rows.shape,
           eps, DTYPES[x.dtype])
    return out
