"""GEGLU with GELU in its tanh form."""

import torch
from torch import Tensor
from torch.nn import functional as F

from wave64.op import op
from wave64.ops.silu_and_mul import cases, check, cost


@op(cases=cases, check=check, cost=cost)
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """y[t] = gelu(x[t, :d]) * x[t, d:], in fp32, rounded once.   (Hendrycks & Gimpel 2016)
    gelu(a) = a * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 a^3))) / 2

    x        [num_tokens, 2 * d]  bf16, fp16 or fp32: gate then up; last dim contiguous, rows may be strided
    returns  [num_tokens, d]      dtype of x, contiguous
    raises   BadArgument (a ValueError) if x is not [num_tokens, an even number]
    """
    gate, up = x.chunk(2, -1)
    return F.gelu(gate.to(torch.promote_types(x.dtype, torch.float32)), approximate="tanh").mul_(up).to(x.dtype)
