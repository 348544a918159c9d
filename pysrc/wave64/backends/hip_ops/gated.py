"""The launch that the gated activations share."""

import torch
from torch import Tensor

from wave64.backends.hip import launch


def launch_gated(op: str, x: Tensor) -> Tensor:
    num_tokens, d = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_tokens, d), dtype=x.dtype, device=x.device)
    launch(op, x=x, out=out, x_stride=x.stride(0), num_tokens=num_tokens, d=d, dtype=x.dtype)
    return out
