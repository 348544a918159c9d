"""Quantize rows: a block holds a whole row in registers, so x is read once; a longer row is read twice.

Bound by memory: x in, half of that (of 16-bit x) out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import quant
from wave64.ops import per_token_quant_fp8
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import limits, no_fp8, scales

#: Elements of a row that fit into registers.
MAX_BLOCK = 16384


@triton.jit
def _per_token_quant_fp8_kernel(q_ptr, scale_ptr, x_ptr, x_stride, columns, LIMIT: tl.constexpr, BELOW: tl.constexpr,
                                ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x_ptr += row * x_stride
    q_ptr += row * columns
    if ONE_BLOCK:
        x = tl.load(x_ptr + offs, mask=offs < columns, other=0.0).to(tl.float32)
        scale, inverse = scales(tl.max(tl.abs(x), 0), LIMIT, BELOW)
        tl.store(q_ptr + offs, (x * inverse).to(q_ptr.dtype.element_ty), mask=offs < columns)
    else:
        amax = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            x = tl.load(x_ptr + start + offs, mask=offs < columns - start, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(x))
        scale, inverse = scales(tl.max(amax, 0), LIMIT, BELOW)
        for start in range(0, columns, BLOCK):
            x = tl.load(x_ptr + start + offs, mask=offs < columns - start, other=0.0).to(tl.float32)
            tl.store(q_ptr + start + offs, (x * inverse).to(q_ptr.dtype.element_ty), mask=offs < columns - start)
    tl.store(scale_ptr + row, scale)


@per_token_quant_fp8.backend("triton", absent=no_fp8)
def launch(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    q = torch.empty((tokens, columns), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    if tokens:
        padded = triton.next_power_of_2(columns)
        block = min(padded, MAX_BLOCK)
        _per_token_quant_fp8_kernel[(tokens,)](q, scale, x, x.stride(0), columns, **limits(q.dtype),
                                               ONE_BLOCK=block == padded, BLOCK=block, num_warps=num_warps(block // 32))
    return q, scale
