"""What the FP8 quantizers and caches share: amax and scale as wave64/quant.py defines them, and tiles of whole groups.

A lane has 16 elements: two loads of 16 bytes, one store of 16. Bound by memory.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform, quant
from wave64.arch import Arch
from wave64.ops.reshape_and_cache import FP8
from wave64.triton_ops.attention import is_wide
from wave64.triton_ops.geometry import num_warps

#: Elements per program of the kernels that quantize groups.
BLOCK = 4096
MIN_AMAX = tl.constexpr(quant.MIN_AMAX)
#: Smaller scales count as this one: 0 / 0 would be NaN, and so would 0 times the reciprocal of 0.
MIN_SCALE = tl.constexpr(quant.MIN_SCALE)


@triton.jit
def scales(amax, LIMIT: tl.constexpr, BELOW: tl.constexpr):
    """(scale, inverse): quantization multiplies by `inverse` instead of dividing by `scale`. Both are rounded to
    nearest. BELOW is the largest value below LIMIT; 0: scales are rounded up to powers of two (UE8M0)."""
    amax = tl.maximum(amax, MIN_AMAX)
    scale = tl.div_rn(amax, tl.full(amax.shape, LIMIT, tl.float32))
    if BELOW == 0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    else:
        inverse = tl.div_rn(tl.full(amax.shape, BELOW, tl.float32), amax)
    return scale, inverse


@triton.jit
def group_tile(groups, x_stride, COLUMNS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BLOCK_G: tl.constexpr):
    """(offsets in x, offsets in q, mask) [BLOCK_G, GROUP] of the program's groups, numbered through all rows."""
    groups_per_row: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask = (offs_g < groups)[:, None]
    if WIDE:
        offs_g = offs_g.to(tl.int64)
    row, column = offs_g // groups_per_row, offs_g % groups_per_row * GROUP
    offs = tl.arange(0, GROUP)[None, :]
    if COLUMNS % GROUP > 0:
        mask = mask & (offs < COLUMNS - column[:, None])
    return (row * x_stride + column)[:, None] + offs, (row * COLUMNS + column)[:, None] + offs, mask


@triton.jit
def store_groups(q_ptr, scale_ptr, x, offs, mask, groups, LIMIT: tl.constexpr, BELOW: tl.constexpr,
                 BLOCK_G: tl.constexpr):
    """Quantize and store the tile x, which is fp32 and 0 where the mask is false."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    scale, inverse = scales(tl.max(tl.abs(x), 1), LIMIT, BELOW)
    tl.store(scale_ptr + offs_g, scale, mask=offs_g < groups)
    tl.store(q_ptr + offs, (x * inverse[:, None]).to(q_ptr.dtype.element_ty), mask=mask)


@functools.cache
def limits(dtype: torch.dtype, ue8m0: bool = False) -> dict[str, float]:
    """Constants of an FP8 dtype for the kernels. ue8m0: scales are powers of two."""
    return dict(LIMIT=quant.limit(dtype), BELOW=0.0 if ue8m0 else quant.below(dtype))


def launch_groups(kernel, x: Tensor, columns: int, group_size: int, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Launch kernel(q_ptr, scale_ptr, x_ptr, groups, x_stride, ...) over all groups. Returns (q [tokens, columns],
    scale [tokens, groups])."""
    tokens, groups_per_row = x.shape[0], triton.cdiv(columns, group_size)
    q = torch.empty((tokens, columns), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((tokens, groups_per_row), dtype=torch.float32, device=x.device)
    if tokens:
        block_g = max(1, BLOCK // group_size)
        kernel[(triton.cdiv(tokens * groups_per_row, block_g),)](
            q, scale, x, tokens * groups_per_row, x.stride(0), COLUMNS=columns, GROUP=group_size, WIDE=is_wide(x, q),
            BLOCK_G=block_g, **limits(q.dtype, ue8m0), num_warps=num_warps(block_g * group_size // 16))
    return q, scale


@triton.jit
def to_cache(x, scale_ptr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """x as a cache of `dtype` stores it. LIMIT is the largest value of an FP8 cache, 0 for others."""
    if LIMIT > 0:
        x = x.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
            x = x / tl.where(scale < MIN_SCALE, MIN_SCALE, scale)
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def scales_of_heads(scale_ptr, offs_h, heads, PER_HEAD: tl.constexpr):
    """Where to_cache finds the scales of heads offs_h, pointers in offs_h's shape; one for all without PER_HEAD. Not
    called where there are none: a function of Triton 3.6's cannot return None."""
    if PER_HEAD:
        scale_ptr += tl.minimum(offs_h, heads - 1)
    return scale_ptr


def cache_limit(cache: Tensor) -> float:
    """LIMIT of to_cache."""
    return torch.finfo(cache.dtype).max if cache.dtype in FP8 else 0.0


def unsupported_cache(cache: Tensor) -> str | None:
    """The reason why this architecture cannot store to the cache, or None."""
    arch, kind = platform.arch(), str(cache.dtype).removeprefix("torch.float8_")
    if arch is not None and cache.dtype in FP8 and arch.fp8 != kind:
        return f"an {kind} cache on {arch.name}, whose FP8 type is {arch.fp8}"
    return None


def no_fp8(arch: Arch) -> str | None:
    """The reason why Triton cannot quantize on an architecture, or None."""
    return f"{arch.name} has no FP8 conversion" if arch.fp8 is None else None
