"""RoPE and cache write for MLA in one launch: a wave copies kv_c of some tokens to the cache, or rotates k_pe of more
tokens and stores it to k_pe and the cache, or rotates a few heads of one token's q_pe.

The trick: k_pe is stored to the cache from registers, rounded to the dtype of k_pe first.
Bound by memory: q_pe in and out, the rows of the new tokens in and out; a token's angles come from L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import concat_and_cache_mla_rope_fused
from wave64.triton_ops.attention import is_wide, unit_of
from wave64.triton_ops.concat_and_cache_mla import BLOCK, copy
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import cache_limit, to_cache, unsupported_cache
from wave64.triton_ops.rotary_embedding import rotate_halves, rotate_heads, rotate_interleaved


@triton.jit
def _rotate_and_store(positions_ptr, k_pe_ptr, cos_sin_ptr, slot_ptr, cache_ptr, scale_ptr, block, tokens,
                      positions_stride, stride, ROW: tl.constexpr, HALF: tl.constexpr, LIMIT: tl.constexpr,
                      IS_NEOX: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr):
    """Apply RoPE to k_pe of the tokens of `block` in place, and write it to the cache, too, where they have a slot."""
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = offs_t < tokens
    slots = tl.load(slot_ptr + offs_t, mask=is_token, other=-1)
    positions = tl.load(positions_ptr + offs_t.to(tl.int64) * positions_stride, mask=is_token, other=0).to(tl.int64)
    if WIDE:
        offs_t = offs_t.to(tl.int64)
    else:
        slots = slots.to(tl.int32)
    is_token, is_stored = is_token[:, None], (slots >= 0)[:, None]
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    cos_ptrs = cos_sin_ptr + positions[:, None] * (2 * HALF) + offs_j
    cos = tl.load(cos_ptrs, mask=offs_j < HALF, other=0.0).to(tl.float32)
    sin = tl.load(cos_ptrs + HALF, mask=offs_j < HALF, other=0.0).to(tl.float32)
    k_pe_ptrs, cache_ptrs = k_pe_ptr + offs_t[:, None] * stride, cache_ptr + slots[:, None] * ROW
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if IS_NEOX:
        inside = offs_j < HALF
        first, second = rotate_halves(k_pe_ptrs, offs_j, HALF, is_token & inside, cos, sin)
        tl.store(cache_ptrs + offs_j, to_cache(first, scale_ptr, LIMIT, dtype), mask=is_stored & inside)
        tl.store(cache_ptrs + HALF + offs_j, to_cache(second, scale_ptr, LIMIT, dtype), mask=is_stored & inside)
    else:
        offs_d = tl.arange(0, 2 * BLOCK_J)[None, :]
        inside = offs_d < 2 * HALF
        k_pe = rotate_interleaved(k_pe_ptrs, offs_d, is_token & inside, cos, sin, BLOCK_T, BLOCK_J)
        tl.store(cache_ptrs + offs_d, to_cache(k_pe, scale_ptr, LIMIT, dtype), mask=is_stored & inside)


@triton.jit(do_not_specialize=["tokens", "heads", "positions_stride", "q_stride", "q_head_stride", "k_pe_stride",
                               "kv_c_stride"])
def _concat_and_cache_mla_rope_fused_kernel(positions_ptr, q_pe_ptr, k_pe_ptr, kv_c_ptr, cos_sin_ptr, slot_ptr,
                                            kv_cache_ptr, scale_ptr, tokens, heads, positions_stride, q_stride,
                                            q_head_stride, k_pe_stride, kv_c_stride, UNIT: tl.constexpr,
                                            RANK: tl.constexpr, HALF: tl.constexpr, LIMIT: tl.constexpr,
                                            IS_NEOX: tl.constexpr, WIDE: tl.constexpr, BLOCK_TC: tl.constexpr,
                                            BLOCK_C: tl.constexpr, BLOCK_TP: tl.constexpr, BLOCK_H: tl.constexpr,
                                            BLOCK_J: tl.constexpr):
    block, row = tl.program_id(0), RANK + 2 * HALF
    latents, keys = tl.cdiv(tokens, BLOCK_TC), tl.cdiv(tokens, BLOCK_TP)
    if block < latents:
        copy(kv_c_ptr, kv_cache_ptr, slot_ptr, scale_ptr, block, tokens, kv_c_stride * UNIT, RANK, row, LIMIT, WIDE,
             BLOCK_TC, BLOCK_C)
    elif block < latents + keys:
        _rotate_and_store(positions_ptr, k_pe_ptr, cos_sin_ptr, slot_ptr, kv_cache_ptr + RANK, scale_ptr,
                          block - latents, tokens, positions_stride, k_pe_stride * UNIT, row, HALF, LIMIT, IS_NEOX,
                          WIDE, BLOCK_TP, BLOCK_J)
    else:
        groups = tl.cdiv(heads, BLOCK_H)
        group = block - latents - keys
        token = (group // groups).to(tl.int64)
        offs_j = tl.arange(0, BLOCK_J)
        position = tl.load(positions_ptr + token * positions_stride).to(tl.int64)
        cos_ptrs = cos_sin_ptr + position * (2 * HALF) + offs_j
        cos = tl.load(cos_ptrs, mask=offs_j < HALF, other=0.0).to(tl.float32)
        sin = tl.load(cos_ptrs + HALF, mask=offs_j < HALF, other=0.0).to(tl.float32)
        rotate_heads(q_pe_ptr + token * q_stride * UNIT, group % groups * BLOCK_H, heads, q_head_stride * UNIT, HALF,
                     cos, sin, IS_NEOX, BLOCK_H, BLOCK_J)


def supports(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, scale=None) -> str | None:
    return unsupported_cache(kv_cache)


@concat_and_cache_mla_rope_fused.backend("triton", supports=supports)
def launch(positions: Tensor, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cos_sin_cache: Tensor, is_neox: bool,
           slot_mapping: Tensor, kv_cache: Tensor, scale: Tensor | None = None) -> None:
    tokens, heads, rope = q_pe.shape
    if tokens == 0:
        return
    rank, half = kv_c.shape[1], rope // 2
    block_c, block_j = triton.next_power_of_2(rank), triton.next_power_of_2(half)
    block_tc, block_tp = max(1, BLOCK // block_c), max(1, BLOCK // (2 * block_j))
    # 512 pairs per block: 16 bytes of each half for each lane of a CDNA wave
    block_h = max(1, min(BLOCK // 2 // block_j, triton.next_power_of_2(max(heads, 1))))
    strides = q_pe.stride(0), q_pe.stride(1), k_pe.stride(0), kv_c.stride(0)
    unit = unit_of(rank, *strides)
    grid = triton.cdiv(tokens, block_tc) + triton.cdiv(tokens, block_tp) + tokens * triton.cdiv(heads, block_h)
    _concat_and_cache_mla_rope_fused_kernel[(grid,)](
        positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, kv_cache, scale, tokens, heads, positions.stride(0),
        *(stride // unit for stride in strides), UNIT=unit, RANK=rank, HALF=half, LIMIT=cache_limit(kv_cache),
        IS_NEOX=is_neox, WIDE=is_wide(kv_c, k_pe, kv_cache), BLOCK_TC=block_tc, BLOCK_C=block_c, BLOCK_TP=block_tp,
        BLOCK_H=block_h, BLOCK_J=block_j, num_warps=num_warps(BLOCK // 16))
