"""Quantizes a tensor with one scale: given, or found by a launch before.

The trick: the first launch leaves each program's amax, and every program of the second takes the largest of them: no
atomics, nothing to set to zero before, and the second launch also writes the scale.
Bound by memory: x in twice (once with a given scale), the second time in part from cache, half of that out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform, quant
from wave64.ops import per_tensor_quant_fp8
from wave64.triton_ops.attention import is_wide
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import limits, scales, supports

#: Numbers that a program takes at a time.
BLOCK = 8192
TINY = tl.constexpr(quant.MIN_SCALE)


@triton.jit
def _place(block, x_stride, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(where the numbers of a block lie in x, where in q, which exist); blocks are counted through all rows."""
    each = tl.cdiv(columns, BLOCK)
    if WIDE:
        block = tl.cast(block, tl.int64)
    start, row = block % each * BLOCK, block // each
    offs = tl.arange(0, BLOCK)
    return row * x_stride + start + offs, row * columns + start + offs, offs < columns - start


@triton.jit(do_not_specialize=["blocks"])
def _per_tensor_amax_kernel(amax_ptr, x_ptr, x_stride, columns, blocks, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    most = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offs, _, mask = _place(block, x_stride, columns, WIDE, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)))
    tl.store(amax_ptr + tl.program_id(0), tl.max(most, 0))


@triton.jit(do_not_specialize=["blocks"])
def _per_tensor_quant_fp8_kernel(q_ptr, scale_ptr, given_ptr, amax_ptr, x_ptr, x_stride, columns, blocks,
                                 PARTS: tl.constexpr, LIMIT: tl.constexpr, BELOW: tl.constexpr, WIDE: tl.constexpr,
                                 BLOCK: tl.constexpr):
    """The scale is given, or found from the amax of as many programs as there are here, at most PARTS."""
    if given_ptr is not None:
        scale = tl.load(given_ptr)
        inverse = tl.div_rn(1.0, tl.maximum(scale, TINY))
    else:
        offs_p = tl.arange(0, PARTS)
        amax = tl.load(amax_ptr + offs_p, mask=offs_p < tl.num_programs(0), other=0.0)
        scale, inverse = scales(tl.max(amax, 0), LIMIT, BELOW)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offs_x, offs_q, mask = _place(block, x_stride, columns, WIDE, BLOCK)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32) * inverse
        if given_ptr is not None:
            x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        tl.store(q_ptr + offs_q, x.to(q_ptr.dtype.element_ty), mask=mask)


@per_tensor_quant_fp8.backend("triton", supports=supports)
def launch(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=quant.fp8_dtype(), device=x.device)
    found = torch.empty(1, dtype=torch.float32, device=x.device)
    rows, columns = (min(1, x.shape[0]), x.numel()) if x.is_contiguous() else x.shape
    block = min(BLOCK, max(16, triton.next_power_of_2(columns)))
    blocks = rows * triton.cdiv(columns, block)
    programs = max(1, min(blocks, 4 * platform.compute_units()))
    place = (x, x.stride(0), columns, blocks)
    shape = dict(WIDE=is_wide(x, q), BLOCK=block, num_warps=num_warps(block // 16))
    amax = None
    if scale is None:
        amax = torch.empty(programs, dtype=torch.float32, device=x.device)
        _per_tensor_amax_kernel[(programs,)](amax, *place, **shape)
    _per_tensor_quant_fp8_kernel[(programs,)](q, found, scale, amax, *place, PARTS=triton.next_power_of_2(programs),
                                              **limits(q.dtype), **shape)
    return q, found
