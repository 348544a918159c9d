"""Cache write for latent attention: one launch for both parts, a wave moves some tokens' latents or more tokens' keys.

Either way 16 numbers a lane: loads of 16 bytes also of the narrow part, and stores of 16 bytes also into FP8.
Bound by memory: the new rows in, the same out, converted on the way where the cache is FP8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform, quant
from wave64.ops import concat_and_cache_mla
from wave64.ops.reshape_and_cache import FP8
from wave64.triton_ops.attention import is_wide, unit_of
from wave64.triton_ops.geometry import num_warps

#: Numbers per program, which is one CDNA wave.
BLOCK = 1024
#: Scales below count as it: 0 / 0 would be NaN, and so would 0 times its reciprocal.
TINY = tl.constexpr(quant.MIN_SCALE)


@triton.jit
def kept(x, scale_ptr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """What a cache of `dtype` keeps of x; LIMIT is the largest number of an FP8 one, 0 for others."""
    if LIMIT > 0:
        x = x.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
            x = x / tl.where(scale < TINY, TINY, scale)
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def copy(new_ptr, cache_ptr, slot_ptr, scale_ptr, block, tokens, stride, WIDTH: tl.constexpr, ROW: tl.constexpr,
         LIMIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    """cache[slots] = new for tokens of `block`, WIDTH of ROW numbers."""
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.load(slot_ptr + offs_t, mask=offs_t < tokens, other=-1)
    mask = (slots >= 0)[:, None]
    # Beyond the last token the last is read again and not stored: loads have no mask for that, nor wait for the slots.
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
    tl.store(cache_ptr + slots[:, None] * ROW + offs_w, kept(x, scale_ptr, LIMIT, cache_ptr.dtype.element_ty),
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
    arch = platform.arch()
    flavour = str(kv_cache.dtype).removeprefix("torch.float8_")
    if arch is not None and kv_cache.dtype in FP8 and arch.fp8 != flavour:
        return f"an {flavour} cache on {arch.name}, whose FP8 type is {arch.fp8}"
    return None


@concat_and_cache_mla.backend("triton", supports=supports)
def launch(kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, scale: Tensor | None = None) -> None:
    tokens, rank = kv_c.shape
    if tokens == 0 or kv_cache.numel() == 0:
        return
    rope = k_pe.shape[-1]
    block_c, block_p = triton.next_power_of_2(rank), triton.next_power_of_2(rope)
    block_tc, block_tp = max(1, BLOCK // block_c), max(1, BLOCK // block_p)
    unit = unit_of(rank, kv_c.stride(0), k_pe.stride(0))
    limit = torch.finfo(kv_cache.dtype).max if kv_cache.dtype in FP8 else 0.0
    _concat_and_cache_mla_kernel[(triton.cdiv(tokens, block_tc) + triton.cdiv(tokens, block_tp),)](
        kv_c, k_pe, kv_cache, slot_mapping, scale, tokens, kv_c.stride(0) // unit, k_pe.stride(0) // unit, UNIT=unit,
        RANK=rank, ROPE=rope, LIMIT=limit, WIDE=is_wide(kv_c, k_pe, kv_cache), BLOCK_TC=block_tc, BLOCK_C=block_c,
        BLOCK_TP=block_tp, BLOCK_P=block_p, num_warps=num_warps(BLOCK // 16))
