"""GEGLU with GELU in its tanh form."""

import math

import torch
from torch import Tensor

from wave64.op import op
from wave64.ops.silu_and_mul import cases, check, cost


@op(cases=cases, check=check, cost=cost)
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """Apply GEGLU with the tanh approximation: y = gelu(x[:, :d]) * x[:, d:], computed in fp32 and rounded once, where
    gelu(a) = a * (1 + tanh(u)) / 2 = a / (1 + exp(-2 u)) and u = sqrt(2 / pi) * (a + 0.044715 a^3). The second form is
    computed, since the first cancels far below zero.   (Hendrycks & Gimpel 2016)

    x        [num_tokens, 2 * d]  bf16, fp16 or fp32: gate then up; last dim contiguous, rows may be strided
    returns  [num_tokens, d]      dtype of x, contiguous
    raises   BadArgument (a ValueError) for other shapes, dtypes or strides
    """
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    u = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate * torch.sigmoid(2 * u) * up).to(x.dtype)
