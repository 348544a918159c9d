"""RoPE in place: one launch rotates query and key; a block rotates a few heads of one token.

One lane has both elements of a pair, so lanes exchange nothing and read nothing that was overwritten.
Bound by memory: the rotated part of query and key in and out; a block reads its token's angles once, from L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import rotary_embedding
from wave64.triton_ops.geometry import num_warps


@triton.jit
def _rotated_pair(a, b, cos, sin):
    """(a cos - b sin, b cos + a sin). The fma is explicit: otherwise the compiler would choose per kernel which product
    is rounded, and the operators that apply RoPE would differ in the last bit."""
    return tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)


@triton.jit
def rotate_halves(x_ptrs, offs_j, half, mask, cos, sin):
    """Apply RoPE (neox style) to the rows x_ptrs [rows, 1] in place: column j pairs with column j + half. Returns the
    rotated (first, second) halves in x's dtype."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    a_ptrs = x_ptrs + offs_j
    a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    first, second = _rotated_pair(a, b, cos, sin)
    first, second = first.to(dtype), second.to(dtype)
    tl.store(a_ptrs, first, mask=mask)
    tl.store(a_ptrs + half, second, mask=mask)
    return first, second


@triton.jit
def rotate_interleaved(x_ptrs, offs_d, mask, cos, sin, ROWS: tl.constexpr, BLOCK_J: tl.constexpr):
    """Apply RoPE (GPT-J style) to the rows x_ptrs [rows, 1] in place: columns 2 j and 2 j + 1 are a pair. Returns the
    rotated rows in x's dtype."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    ptrs = x_ptrs + offs_d
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(x, (ROWS, BLOCK_J, 2)))
    first, second = _rotated_pair(a, b, cos, sin)
    rotated = tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK_J)).to(dtype)
    tl.store(ptrs, rotated, mask=mask)
    return rotated


@triton.jit
def rotate_heads(x_ptr, head, heads, head_stride, half, cos, sin, IS_NEOX: tl.constexpr, BLOCK_H: tl.constexpr,
                 BLOCK_J: tl.constexpr):
    """Apply RoPE in place to heads [head, head + BLOCK_H) of the token at x_ptr; cos and sin are [BLOCK_J]."""
    offs_h = head + tl.arange(0, BLOCK_H)
    cos, sin = cos[None, :], sin[None, :]
    if IS_NEOX:
        offs_j = tl.arange(0, BLOCK_J)
        mask = (offs_h < heads)[:, None] & (offs_j < half)[None, :]
        rotate_halves(x_ptr + offs_h[:, None] * head_stride, offs_j[None, :], half, mask, cos, sin)
    else:
        offs_d = tl.arange(0, 2 * BLOCK_J)
        mask = (offs_h < heads)[:, None] & (offs_d < 2 * half)[None, :]
        rotate_interleaved(x_ptr + offs_h[:, None] * head_stride, offs_d[None, :], mask, cos, sin, BLOCK_H, BLOCK_J)


@triton.jit
def _rotary_embedding_kernel(positions_ptr, query_ptr, key_ptr, cos_sin_ptr, heads, kv_heads, positions_stride,
                             query_stride, key_stride, query_head_stride, key_head_stride, half,
                             IS_NEOX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    offs_j = tl.arange(0, BLOCK_J)
    position = tl.load(positions_ptr + token * positions_stride).to(tl.int64)
    cos_ptrs = cos_sin_ptr + position * (2 * half) + offs_j
    cos = tl.load(cos_ptrs, mask=offs_j < half, other=0.0).to(tl.float32)
    sin = tl.load(cos_ptrs + half, mask=offs_j < half, other=0.0).to(tl.float32)
    query_groups = tl.cdiv(heads, BLOCK_H)
    if group < query_groups:
        rotate_heads(query_ptr + token * query_stride, group * BLOCK_H, heads, query_head_stride, half, cos, sin,
                     IS_NEOX, BLOCK_H, BLOCK_J)
    else:
        rotate_heads(key_ptr + token * key_stride, (group - query_groups) * BLOCK_H, kv_heads, key_head_stride, half,
                     cos, sin, IS_NEOX, BLOCK_H, BLOCK_J)


def _layout(x: Tensor, head_size: int) -> tuple[int, int, int]:
    """(num_heads, token stride, head stride) of x [num_tokens, num_heads * head_size] or [num_tokens, num_heads,
    head_size]."""
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
    # 512 pairs per block: 16 bytes of each half for each lane of a CDNA wave
    block_j = triton.next_power_of_2(half)
    block_h = max(1, min(512 // block_j, triton.next_power_of_2(max(heads, kv_heads))))
    grid = (tokens, triton.cdiv(heads, block_h) + triton.cdiv(kv_heads, block_h))
    _rotary_embedding_kernel[grid](positions, query, query if key is None else key, cos_sin_cache, heads, kv_heads,
                                   positions.stride(0), query_stride, key_stride, query_head_stride, key_head_stride,
                                   half, IS_NEOX=is_neox, BLOCK_H=block_h, BLOCK_J=block_j,
                                   num_warps=num_warps(block_h * block_j // 8))
