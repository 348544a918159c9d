"""RMSNorm: a block holds a whole row in registers, so x is read once.

Bound by memory: x in, y out; the weight stays in L2. With aligned rows a lane has four loads of 16 bytes in flight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import rms_norm
from wave64.triton_ops.geometry import num_warps


@triton.jit
def _normalize(y_ptr, x_ptr, weight_ptr, row, hidden, eps, BLOCK: tl.constexpr):
    """y[row] = x[0] / rms(x[0]) * weight."""
    offs = tl.arange(0, BLOCK)
    mask = offs < hidden
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps) * weight
    tl.store(y_ptr + row * hidden + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_kernel(y_ptr, x_ptr, weight_ptr, x_stride, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _normalize(y_ptr, x_ptr + row * x_stride, weight_ptr, row, hidden, eps, BLOCK)


@triton.jit
def _rms_norm_heads_kernel(y_ptr, x_ptr, weight_ptr, x_stride, x_head_stride, num_heads, hidden, eps,
                           BLOCK: tl.constexpr):
    """For rows [token, head] with two strides: the heads of a merged QKV projection."""
    row = tl.program_id(0).to(tl.int64)
    token, head = row // num_heads, row % num_heads
    x_ptr += token * x_stride + head * x_head_stride
    _normalize(y_ptr, x_ptr, weight_ptr, row, hidden, eps, BLOCK)


@rms_norm.backend("triton")
def launch(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    hidden = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        block = triton.next_power_of_2(hidden)
        options = dict(BLOCK=block, num_warps=num_warps(block * x.element_size() // 64))
        if x.ndim == 3:
            tokens, heads = x.shape[:2]
            _rms_norm_heads_kernel[(tokens * heads,)](y, x, weight, x.stride(0), x.stride(1), heads, hidden, eps,
                                                      **options)
        else:
            _rms_norm_kernel[(x.shape[0],)](y, x, weight, x.stride(0), hidden, eps, **options)
    return y
