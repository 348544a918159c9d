"""Quantize a tensor with one scale, which is given or computed by a launch before.

The trick: the first launch writes each program's amax, and every program of the second takes the maximum of them. That
needs no atomics and no zeroed memory; the second launch also writes the scale.
Bound by memory: x in twice (once with a given scale), the second time partly from cache, half of that out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform, quant
from wave64.ops import per_tensor_quant_fp8
from wave64.triton_ops.attention import is_wide
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import MIN_SCALE, limits, no_fp8, scales

#: Elements that a program processes at a time.
BLOCK = 8192


@triton.jit
def _block_offsets(block, x_stride, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets in x, offsets in q, mask) of a block; blocks are numbered through all rows."""
    blocks_per_row = tl.cdiv(columns, BLOCK)
    if WIDE:
        block = tl.cast(block, tl.int64)
    start, row = block % blocks_per_row * BLOCK, block // blocks_per_row
    offs = tl.arange(0, BLOCK)
    return row * x_stride + start + offs, row * columns + start + offs, offs < columns - start


@triton.jit(do_not_specialize=["blocks"])
def _per_tensor_amax_kernel(amax_ptr, x_ptr, x_stride, columns, blocks, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    amax = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offs, _, mask = _block_offsets(block, x_stride, columns, WIDE, BLOCK)
        amax = tl.maximum(amax, tl.abs(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)))
    tl.store(amax_ptr + tl.program_id(0), tl.max(amax, 0))


@triton.jit(do_not_specialize=["blocks"])
def _per_tensor_quant_fp8_kernel(q_ptr, scale_ptr, given_ptr, amax_ptr, x_ptr, x_stride, columns, blocks,
                                 PARTS: tl.constexpr, LIMIT: tl.constexpr, BELOW: tl.constexpr, WIDE: tl.constexpr,
                                 BLOCK: tl.constexpr):
    """The scale is given, or computed from the amax of each program of the launch before, at most PARTS."""
    if given_ptr is not None:
        scale = tl.load(given_ptr)
        inverse = tl.div_rn(1.0, tl.maximum(scale, MIN_SCALE))
    else:
        offs_p = tl.arange(0, PARTS)
        amax = tl.load(amax_ptr + offs_p, mask=offs_p < tl.num_programs(0), other=0.0)
        scale, inverse = scales(tl.max(amax, 0), LIMIT, BELOW)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offs_x, offs_q, mask = _block_offsets(block, x_stride, columns, WIDE, BLOCK)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32) * inverse
        if given_ptr is not None:
            x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        tl.store(q_ptr + offs_q, x.to(q_ptr.dtype.element_ty), mask=mask)


@per_tensor_quant_fp8.backend("triton", absent=no_fp8)
def launch(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=quant.fp8_dtype(), device=x.device)
    scale_out = torch.empty(1, dtype=torch.float32, device=x.device)
    rows, columns = (min(1, x.shape[0]), x.numel()) if x.is_contiguous() else x.shape
    block = min(BLOCK, max(16, triton.next_power_of_2(columns)))
    blocks = rows * triton.cdiv(columns, block)
    programs = max(1, min(blocks, 4 * platform.compute_units()))
    x_blocks = (x, x.stride(0), columns, blocks)
    options = dict(WIDE=is_wide(x, q), BLOCK=block, num_warps=num_warps(block // 16))
    amax = None
    if scale is None:
        amax = torch.empty(programs, dtype=torch.float32, device=x.device)
        _per_tensor_amax_kernel[(programs,)](amax, *x_blocks, **options)
    _per_tensor_quant_fp8_kernel[(programs,)](q, scale_out, scale, amax, *x_blocks,
                                              PARTS=triton.next_power_of_2(programs), **limits(q.dtype), **options)
    return q, scale_out
