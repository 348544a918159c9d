"""Rotary embedding in place: one launch rotates query and key, a block takes a few heads of one token.

Both halves of a pair belong to one lane, so nothing is exchanged and nothing can be read after it was overwritten.
Bound by memory: the rotated part of query and key in and out; a token's angles are read once per block, from L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import rotary_embedding
from wave64.triton_ops.geometry import num_warps


@triton.jit
def _rotate(x_ptr, head, heads, head_stride, half, cos, sin, IS_NEOX: tl.constexpr, BLOCK_H: tl.constexpr,
            BLOCK_J: tl.constexpr):
    """Rotates heads [head, head + BLOCK_H) of the token at `x_ptr`; cos and sin are [BLOCK_J]."""
    offs_h = head + tl.arange(0, BLOCK_H)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cos, sin = cos[None, :], sin[None, :]
    if IS_NEOX:
        offs_j = tl.arange(0, BLOCK_J)
        mask = (offs_h < heads)[:, None] & (offs_j < half)[None, :]
        a_ptrs = x_ptr + offs_h[:, None] * head_stride + offs_j[None, :]
        a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(a_ptrs + half, mask=mask, other=0.0).to(tl.float32)
        tl.store(a_ptrs, (a * cos - b * sin).to(dtype), mask=mask)
        tl.store(a_ptrs + half, (b * cos + a * sin).to(dtype), mask=mask)
    else:
        offs_d = tl.arange(0, 2 * BLOCK_J)
        mask = (offs_h < heads)[:, None] & (offs_d < 2 * half)[None, :]
        ptrs = x_ptr + offs_h[:, None] * head_stride + offs_d[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_J, 2)))
        rotated = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_H, 2 * BLOCK_J))
        tl.store(ptrs, rotated.to(dtype), mask=mask)


@triton.jit
def _rotary_embedding_kernel(positions_ptr, query_ptr, key_ptr, cos_sin_ptr, heads, kv_heads, query_stride, key_stride,
                             query_head_stride, key_head_stride, half, IS_NEOX: tl.constexpr, BLOCK_H: tl.constexpr,
                             BLOCK_J: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    offs_j = tl.arange(0, BLOCK_J)
    cos_ptrs = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * half) + offs_j
    cos = tl.load(cos_ptrs, mask=offs_j < half, other=0.0).to(tl.float32)
    sin = tl.load(cos_ptrs + half, mask=offs_j < half, other=0.0).to(tl.float32)
    query_groups = tl.cdiv(heads, BLOCK_H)
    if group < query_groups:
        _rotate(query_ptr + token * query_stride, group * BLOCK_H, heads, query_head_stride, half, cos, sin, IS_NEOX,
                BLOCK_H, BLOCK_J)
    else:
        _rotate(key_ptr + token * key_stride, (group - query_groups) * BLOCK_H, kv_heads, key_head_stride, half, cos,
                sin, IS_NEOX, BLOCK_H, BLOCK_J)


def _layout(x: Tensor, head_size: int) -> tuple[int, int, int]:
    """Heads, stride of a token and of a head, of a flat or a three-dimensional view."""
    if x.ndim == 2:
        return x.shape[1] // head_size, x.stride(0), head_size
    return x.shape[1], x.stride(0), x.stride(1)


@rotary_embedding.backend("triton")
def launch(positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor,
           is_neox: bool = True) -> None:
    heads, query_stride, query_head_stride = _layout(query, head_size)
    kv_heads, key_stride, key_head_stride = (0, 0, 0) if key is None else _layout(key, head_size)
    tokens, half = positions.shape[0], cos_sin_cache.shape[1] // 2
    if tokens * half * (heads + kv_heads) == 0:
        return
    # 512 pairs a block: 16 bytes of either half for each lane of one CDNA wave
    block_j = triton.next_power_of_2(half)
    block_h = max(1, min(512 // block_j, triton.next_power_of_2(max(heads, kv_heads))))
    grid = (tokens, triton.cdiv(heads, block_h) + triton.cdiv(kv_heads, block_h))
    _rotary_embedding_kernel[grid](positions, query, query if key is None else key, cos_sin_cache, heads, kv_heads,
                                   query_stride, key_stride, query_head_stride, key_head_stride, half,
                                   IS_NEOX=is_neox, BLOCK_H=block_h, BLOCK_J=block_j,
                                   num_warps=num_warps(block_h * block_j // 8))
