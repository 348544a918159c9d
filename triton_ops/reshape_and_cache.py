"""Cache write: one launch for keys and values, a block copies a few heads of one token to its slot.

Bound by memory: the new keys and values in, the same out, converted on the way where the cache is FP8.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import reshape_and_cache
from wave64.quant import kv_scales_of
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import cache_limit, scales_of_heads, to_cache, unsupported_cache


@triton.jit
def _store(new_ptr, cache_ptr, scale_ptr, head_stride, slot, heads, head_dim, LIMIT: tl.constexpr,
           PER_HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """cache[slot] = new for the block's heads. LIMIT: see quant.to_cache."""
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < head_dim)
    x = tl.load(new_ptr + offs_h * head_stride + offs_d, mask=mask, other=0.0)
    scale_ptr = scales_of_heads(scale_ptr, offs_h, heads, PER_HEAD) if scale_ptr is not None else None
    x = to_cache(x, scale_ptr, LIMIT, cache_ptr.dtype.element_ty)
    # slots are int64, since the pool may hold more than 2^31 elements
    tl.store(cache_ptr + slot * (heads * head_dim) + offs_h * head_dim + offs_d, x, mask=mask)


@triton.jit
def _reshape_and_cache_kernel(key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slot_ptr, k_scale_ptr, v_scale_ptr,
                              key_stride, value_stride, key_head_stride, value_head_stride, heads, head_dim,
                              LIMIT: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
                              BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        if tl.program_id(2) == 0:
            _store(key_ptr + token * key_stride, key_cache_ptr, k_scale_ptr, key_head_stride, slot, heads, head_dim,
                   LIMIT, PER_HEAD, BLOCK_H, BLOCK_D)
        else:
            _store(value_ptr + token * value_stride, value_cache_ptr, v_scale_ptr, value_head_stride, slot, heads,
                   head_dim, LIMIT, PER_HEAD, BLOCK_H, BLOCK_D)


def supports(key, value, key_cache, value_cache, slot_mapping, k_scale=None, v_scale=None) -> str | None:
    return unsupported_cache(key_cache)


@reshape_and_cache.backend("triton", supports=supports)
def launch(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
           k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    tokens, heads, head_dim = key.shape
    if key.numel() == 0:
        return
    k_scale, v_scale, scale_stride = kv_scales_of(k_scale, v_scale, heads)
    block_d = triton.next_power_of_2(head_dim)
    block_h = max(1, min(1024 // block_d, triton.next_power_of_2(heads)))
    _reshape_and_cache_kernel[(tokens, triton.cdiv(heads, block_h), 2)](
        key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, key.stride(0), value.stride(0),
        key.stride(1), value.stride(1), heads, head_dim, LIMIT=cache_limit(key_cache), PER_HEAD=scale_stride == 1,
        BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps(block_h * block_d // 8))
