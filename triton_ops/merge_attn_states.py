"""Merge two attention states: each (token, head) is a row, and a block takes as many rows as fill a tile.

Bound by memory: two tiles in, one out. A state with lse -inf is read and dropped, so that loads do not wait for lse.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import merge_attn_states
from wave64.triton_ops.attention import is_wide, unit_of
from wave64.triton_ops.geometry import num_warps

#: Elements per block: 16 bytes of each state for each lane of four CDNA waves.
BLOCK = 2048
#: Not specialized: strides are in units of UNIT, and the number of rows changes from step to step.
RUNTIME = ["rows", "stride_at", "stride_ah", "stride_bt", "stride_bh", "lse_stride_at", "lse_stride_ah",
           "lse_stride_bt", "lse_stride_bh"]


@triton.jit
def _load_lse(lse_ptr, offs, mask):
    lse = tl.load(lse_ptr + offs, mask=mask, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def _load_part(out_ptr, offs, mask, is_present):
    """Rows that are not present become zeros: their weight is 0, and 0 times NaN would be NaN."""
    return tl.where(is_present[:, None], tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def _merge_attn_states_kernel(out_ptr, lse_ptr, out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, rows, stride_at, stride_ah,
                              stride_bt, stride_bh, lse_stride_at, lse_stride_ah, lse_stride_bt, lse_stride_bh,
                              UNIT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr,
                              BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = row < rows
    if WIDE:
        row = row.to(tl.int64)
    token, head = row // HEADS, row % HEADS
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_r[:, None] & (offs_d < HEAD_DIM)
    lse_a = _load_lse(lse_a_ptr, token * lse_stride_at + head * lse_stride_ah, mask_r)
    lse_b = _load_lse(lse_b_ptr, token * lse_stride_bt + head * lse_stride_bh, mask_r)
    a = _load_part(out_a_ptr, ((token * stride_at + head * stride_ah) * UNIT)[:, None] + offs_d, mask,
                   lse_a != float("-inf"))
    b = _load_part(out_b_ptr, ((token * stride_bt + head * stride_bh) * UNIT)[:, None] + offs_d, mask,
                   lse_b != float("-inf"))

    lse_max = tl.maximum(lse_a, lse_b)
    base = tl.where(lse_max == float("-inf"), 0.0, lse_max)  # neither state: exp(-inf - 0) = 0, not NaN
    weight_a, weight_b = tl.exp(lse_a - base), tl.exp(lse_b - base)
    weight_sum = weight_a + weight_b
    weight_sum = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    out = a * (weight_a / weight_sum)[:, None] + b * (weight_b / weight_sum)[:, None]
    tl.store(out_ptr + row[:, None] * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, lse_max + tl.log(weight_sum), mask=mask_r)


@merge_attn_states.backend("triton")
def launch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = out_a.shape
    rows = tokens * heads
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if rows == 0:
        return out, lse
    block_d = max(1, triton.next_power_of_2(head_dim))
    block_r = max(1, min(BLOCK // block_d, triton.next_power_of_2(rows)))
    strides = (*out_a.stride()[:2], *out_b.stride()[:2])
    unit = unit_of(head_dim, *strides)
    _merge_attn_states_kernel[(triton.cdiv(rows, block_r),)](
        out, lse, out_a, lse_a, out_b, lse_b, rows, *(s // unit for s in strides), *lse_a.stride(), *lse_b.stride(),
        UNIT=unit, HEADS=heads, HEAD_DIM=head_dim, WIDE=is_wide(out, out_a, out_b, lse_a, lse_b), BLOCK_R=block_r,
        BLOCK_D=block_d, num_warps=num_warps(block_r * block_d * out_a.element_size() // 16))
    return out, lse
