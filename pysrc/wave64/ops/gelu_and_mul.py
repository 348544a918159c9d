"""GEGLU with the exact GELU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from wave64.op import op
from wave64.ops.silu_and_mul import cases, check, cost


@op(cases=cases, check=check, cost=cost)
def gelu_and_mul(x: Tensor) -> Tensor:
    """Apply GEGLU: y = gelu(x[:, :d]) * x[:, d:] with the exact gelu(a) = a * (1 + erf(a / sqrt(2))) / 2, computed in
    fp32 and rounded once.   (Shazeer 2020, GLU variants)

    x        [num_tokens, 2 * d]  bf16, fp16 or fp32: gate then up; last dim contiguous, rows may be strided
    returns  [num_tokens, d]      dtype of x, contiguous
    raises   BadArgument (a ValueError) for other shapes, dtypes or strides
    """
    gate, up = x.chunk(2, -1)
    return F.gelu(gate.to(torch.promote_types(x.dtype, torch.float32)), approximate="none").mul_(up).to(x.dtype)
