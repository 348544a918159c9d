"""What the gated activations share: the tile of gate and up of a block, and the grid.

Bound by memory: 2 d elements of a row in, d out. Tiles are small, so that one row spreads over many compute units, and
with many rows each has many loads in flight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.triton_ops.geometry import num_warps

BLOCK = 1024


@triton.jit
def load_gate_and_up(x_ptr, x_stride, d, BLOCK: tl.constexpr):
    """Load the block's tile of gate and up. Returns (gate, up, offsets of the result in y [tokens, d], mask); fp32."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < d
    x_ptr += row * x_stride
    gate = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + d + offs, mask=mask, other=0.0).to(tl.float32)
    return gate, up, row * d + offs, mask


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)), as the square of a reciprocal square root: one instruction on CDNA, where a division is ten.
    For x far below 0 the exponential is infinite and the result 0, also times a huge x, so there is no clamp."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


def launch(kernel, x: Tensor) -> Tensor:
    """Launch kernel(y_ptr, x_ptr, x_stride, d, BLOCK) over every tile of x [tokens, 2 * d]. Returns y [tokens, d]."""
    tokens, d = x.shape[0], x.shape[1] // 2
    y = torch.empty((tokens, d), dtype=x.dtype, device=x.device)
    if y.numel():
        kernel[(tokens, triton.cdiv(d, BLOCK))](y, x, x.stride(0), d, BLOCK=BLOCK, num_warps=num_warps(BLOCK // 8))
    return y
