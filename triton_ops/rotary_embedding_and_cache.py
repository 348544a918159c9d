"""RoPE and cache write in one launch: a block rotates a few query heads of one token, or rotates a few key heads and
stores them to key and cache, or copies a few value heads to the cache.

The trick: a key is stored to the cache from the registers that it was rotated in, rounded to the dtype of key first.
Bound by memory: queries and keys in and out, values in, the cache's rows out; a token's angles come from L2. With few
tokens, by the latency of one load after another.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import rotary_embedding_and_cache
from wave64.quant import kv_scales_of
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import scales_of_heads, to_cache, unsupported_cache
from wave64.triton_ops.rotary_embedding import rotate_halves, rotate_heads, rotate_interleaved


@triton.jit
def _copy(from_ptrs, to_ptrs, mask, scale_ptr, LIMIT: tl.constexpr):
    x = tl.load(from_ptrs, mask=mask, other=0.0)
    tl.store(to_ptrs, to_cache(x, scale_ptr, LIMIT, to_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_and_store(key_ptrs, cache_ptrs, is_head, slot, cos, sin, scale_ptr, half, head_dim, LIMIT: tl.constexpr,
                      IS_NEOX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Apply RoPE to the heads at key_ptrs [BLOCK_H, 1] in place, and write them to cache_ptrs if there is a slot."""
    BLOCK_J: tl.constexpr = BLOCK_D // 2
    dtype: tl.constexpr = cache_ptrs.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    cos, sin = cos[None, :], sin[None, :]
    if IS_NEOX:
        offs_j = tl.arange(0, BLOCK_J)[None, :]
        mask = is_head & (offs_j < half)
        first, second = rotate_halves(key_ptrs, offs_j, half, mask, cos, sin)
        if slot >= 0:
            tl.store(cache_ptrs + offs_j, to_cache(first, scale_ptr, LIMIT, dtype), mask=mask)
            tl.store(cache_ptrs + half + offs_j, to_cache(second, scale_ptr, LIMIT, dtype), mask=mask)
    else:
        mask = is_head & (offs_d < 2 * half)
        rotated = rotate_interleaved(key_ptrs, offs_d, mask, cos, sin, BLOCK_H, BLOCK_J)
        if slot >= 0:
            tl.store(cache_ptrs + offs_d, to_cache(rotated, scale_ptr, LIMIT, dtype), mask=mask)
    if slot >= 0:
        rest = is_head & (offs_d >= 2 * half) & (offs_d < head_dim)
        _copy(key_ptrs + offs_d, cache_ptrs + offs_d, rest, scale_ptr, LIMIT)


@triton.jit
def _rotary_embedding_and_cache_kernel(positions_ptr, query_ptr, key_ptr, value_ptr, cos_sin_ptr, key_cache_ptr,
                                       value_cache_ptr, slot_ptr, k_scale_ptr, v_scale_ptr, heads, kv_heads,
                                       positions_stride, query_stride, key_stride, value_stride, query_head_stride,
                                       key_head_stride, value_head_stride, half, head_dim,
                                       IS_NEOX: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
                                       BLOCK_D: tl.constexpr):
    stored: tl.constexpr = key_cache_ptr.dtype.element_ty
    LIMIT: tl.constexpr = 448.0 if stored == tl.float8e4nv else 240.0 if stored == tl.float8e4b8 else 0.0
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_groups, key_groups = tl.cdiv(heads, BLOCK_H), tl.cdiv(kv_heads, BLOCK_H)
    if group < query_groups + key_groups:
        offs_j = tl.arange(0, BLOCK_D // 2)
        position = tl.load(positions_ptr + token * positions_stride).to(tl.int64)
        cos_ptrs = cos_sin_ptr + position * (2 * half) + offs_j
        cos = tl.load(cos_ptrs, mask=offs_j < half, other=0.0).to(tl.float32)
        sin = tl.load(cos_ptrs + half, mask=offs_j < half, other=0.0).to(tl.float32)
        if group < query_groups:
            rotate_heads(query_ptr + token * query_stride, group * BLOCK_H, heads, query_head_stride, half, cos, sin,
                         IS_NEOX, BLOCK_H, BLOCK_D // 2)
        else:
            offs_h = (group - query_groups) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            slot = tl.load(slot_ptr + token)  # int64, since the pool may hold more than 2^31 elements
            _rotate_and_store(key_ptr + token * key_stride + offs_h * key_head_stride,
                              key_cache_ptr + slot * (kv_heads * head_dim) + offs_h * head_dim, offs_h < kv_heads, slot,
                              cos, sin,
                              scales_of_heads(k_scale_ptr, offs_h, kv_heads, PER_HEAD)
                              if k_scale_ptr is not None else None,
                              half, head_dim, LIMIT, IS_NEOX, BLOCK_H, BLOCK_D)
    else:
        offs_h = (group - query_groups - key_groups) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        slot = tl.load(slot_ptr + token)
        if slot >= 0:
            _copy(value_ptr + token * value_stride + offs_h * value_head_stride + offs_d,
                  value_cache_ptr + slot * (kv_heads * head_dim) + offs_h * head_dim + offs_d,
                  (offs_h < kv_heads) & (offs_d < head_dim),
                  scales_of_heads(v_scale_ptr, offs_h, kv_heads, PER_HEAD) if v_scale_ptr is not None else None,
                  LIMIT)


def supports(positions, query, key, value, cos_sin_cache, key_cache, *args, **kwargs) -> str | None:
    return unsupported_cache(key_cache)


@rotary_embedding_and_cache.backend("triton", supports=supports)
def launch(positions: Tensor, query: Tensor, key: Tensor, value: Tensor, cos_sin_cache: Tensor, key_cache: Tensor,
           value_cache: Tensor, slot_mapping: Tensor, is_neox: bool = True, k_scale: Tensor | None = None,
           v_scale: Tensor | None = None) -> None:
    (tokens, heads, head_dim), kv_heads = query.shape, key.shape[1]
    if tokens * head_dim * (heads + kv_heads) == 0:
        return
    k_scale, v_scale, scale_stride = kv_scales_of(k_scale, v_scale, kv_heads)
    block_d = max(2, triton.next_power_of_2(head_dim))
    # 1024 numbers per block: 16 bytes of each half for each lane of a CDNA wave
    block_h = max(1, min(1024 // block_d, triton.next_power_of_2(max(heads, kv_heads))))
    grid = tokens, triton.cdiv(heads, block_h) + 2 * triton.cdiv(kv_heads, block_h)
    _rotary_embedding_and_cache_kernel[grid](
        positions, query, key, value, cos_sin_cache, key_cache, value_cache, slot_mapping, k_scale, v_scale, heads,
        kv_heads, positions.stride(0), query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1),
        value.stride(1), cos_sin_cache.shape[1] // 2, head_dim, IS_NEOX=is_neox,
        PER_HEAD=scale_stride == 1, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps(block_h * block_d // 16))
