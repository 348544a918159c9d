"""Cache write for MLA: one launch for kv_c and k_pe; a wave copies kv_c of some tokens, or k_pe of more tokens.

A lane has 16 elements of either, so that k_pe is loaded by 16 bytes, too, and an FP8 cache is stored to by 16.
Bound by memory: the new rows in, the same out, converted on the way where the cache is FP8.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import concat_and_cache_mla
from wave64.triton_ops.attention import is_wide, unit_of
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import cache_limit, to_cache, unsupported_cache

#: Elements per program, which is one CDNA wave.
BLOCK = 1024


@triton.jit
def copy(new_ptr, cache_ptr, slot_ptr, scale_ptr, block, tokens, stride, WIDTH: tl.constexpr, ROW: tl.constexpr,
         LIMIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    """cache[slots] = new for the tokens of `block`: WIDTH of the ROW columns of a cache row."""
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.load(slot_ptr + offs_t, mask=offs_t < tokens, other=-1)
    mask = (slots >= 0)[:, None]
    # Rows beyond the last token load the last one and are not stored, so the loads need no mask and no slots.
    offs_t = tl.minimum(offs_t, tokens - 1)
    if WIDE:
        offs_t = offs_t.to(tl.int64)
    else:
        slots = slots.to(tl.int32)
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    new_ptrs = new_ptr + offs_t[:, None] * stride + offs_w
    if WIDTH < BLOCK_W:
        x = tl.load(new_ptrs, mask=offs_w < WIDTH, other=0.0)
        mask = mask & (offs_w < WIDTH)
    else:
        x = tl.load(new_ptrs)
    tl.store(cache_ptr + slots[:, None] * ROW + offs_w, to_cache(x, scale_ptr, LIMIT, cache_ptr.dtype.element_ty),
             mask=mask)


@triton.jit(do_not_specialize=["tokens", "kv_c_stride", "k_pe_stride"])
def _concat_and_cache_mla_kernel(kv_c_ptr, k_pe_ptr, kv_cache_ptr, slot_ptr, scale_ptr, tokens, kv_c_stride,
                                 k_pe_stride, UNIT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
                                 LIMIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_TC: tl.constexpr,
                                 BLOCK_C: tl.constexpr, BLOCK_TP: tl.constexpr, BLOCK_P: tl.constexpr):
    block, latents = tl.program_id(0), tl.cdiv(tokens, BLOCK_TC)
    if block < latents:
        copy(kv_c_ptr, kv_cache_ptr, slot_ptr, scale_ptr, block, tokens, kv_c_stride * UNIT, RANK, RANK + ROPE, LIMIT,
             WIDE, BLOCK_TC, BLOCK_C)
    else:
        copy(k_pe_ptr, kv_cache_ptr + RANK, slot_ptr, scale_ptr, block - latents, tokens, k_pe_stride * UNIT, ROPE,
             RANK + ROPE, LIMIT, WIDE, BLOCK_TP, BLOCK_P)


def supports(kv_c, k_pe, kv_cache, slot_mapping, scale=None) -> str | None:
    return unsupported_cache(kv_cache)


@concat_and_cache_mla.backend("triton", supports=supports)
def launch(kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, scale: Tensor | None = None) -> None:
    tokens, rank = kv_c.shape
    if tokens == 0 or kv_cache.numel() == 0:
        return
    rope = k_pe.shape[-1]
    block_c, block_p = triton.next_power_of_2(rank), triton.next_power_of_2(rope)
    block_tc, block_tp = max(1, BLOCK // block_c), max(1, BLOCK // block_p)
    unit = unit_of(rank, kv_c.stride(0), k_pe.stride(0))
    _concat_and_cache_mla_kernel[(triton.cdiv(tokens, block_tc) + triton.cdiv(tokens, block_tp),)](
        kv_c, k_pe, kv_cache, slot_mapping, scale, tokens, kv_c.stride(0) // unit, k_pe.stride(0) // unit, UNIT=unit,
        RANK=rank, ROPE=rope, LIMIT=cache_limit(kv_cache), WIDE=is_wide(kv_c, k_pe, kv_cache), BLOCK_TC=block_tc,
        BLOCK_C=block_c, BLOCK_TP=block_tp, BLOCK_P=block_p, num_warps=num_warps(BLOCK // 16))
