"""What the gated activations share."""

import torch
from torch import Tensor

from wave64.backends.hip import DTYPES, launch


def launch_gated(op: str, x: Tensor) -> Tensor:
    out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
    launch(op, x, x.data_ptr(), out.data_ptr(), x.stride(0), *out.shape, DTYPES[x.dtype])
    return out
