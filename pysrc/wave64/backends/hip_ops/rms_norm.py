import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, floats_only, launch


def supports(x: Tensor, weight: Tensor, eps: float = 1e-6) -> str | None:
    if x.ndim == 3 and 1 not in x.shape[:2] and x.stride(0) != x.shape[1] * x.stride(1):
        return "heads of a wider row: tokens and heads have different strides"
    return floats_only(x)


@bind(ops.rms_norm, supports=supports)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.view(-1, x.shape[-1]) if x.ndim == 3 else x
    num_tokens, hidden = rows.shape
    launch("rms_norm", x=rows, weight=weight, out=out, x_stride=rows.stride(0), out_stride=out.stride(-2),
           num_tokens=num_tokens, hidden=hidden, eps=eps, dtype=x.dtype)
    return out
