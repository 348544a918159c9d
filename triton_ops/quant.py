"""What the FP8 quantizers share: amax and scale as wave64/quant.py defines them, and tiles of whole groups.

A lane has 16 numbers: two loads of 16 bytes in, one store of 16 out. Bound by memory.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform, quant
from wave64.triton_ops.attention import is_wide
from wave64.triton_ops.geometry import num_warps

#: Numbers of a program that takes several groups.
BLOCK = 4096
MIN_AMAX = tl.constexpr(quant.MIN_AMAX)


@triton.jit
def scales(amax, LIMIT: tl.constexpr, BELOW: tl.constexpr):
    """(scale, what numbers are multiplied by instead of divided by it); both quotients are rounded to nearest. BELOW 0:
    scales are the next powers of two from there on."""
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
    """(where each number [BLOCK_G, GROUP] lies in x, where in q, which exist) of the program's groups, counted through
    all rows."""
    each: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask = (offs_g < groups)[:, None]
    if WIDE:
        offs_g = offs_g.to(tl.int64)
    row, column = offs_g // each, offs_g % each * GROUP
    offs = tl.arange(0, GROUP)[None, :]
    if COLUMNS % GROUP > 0:
        mask = mask & (offs < COLUMNS - column[:, None])
    return (row * x_stride + column)[:, None] + offs, (row * COLUMNS + column)[:, None] + offs, mask


@triton.jit
def store_groups(q_ptr, scale_ptr, x, offs, mask, groups, LIMIT: tl.constexpr, BELOW: tl.constexpr,
                 BLOCK_G: tl.constexpr):
    """Quantizes the tile x in fp32, 0 where there is nothing."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    scale, inverse = scales(tl.max(tl.abs(x), 1), LIMIT, BELOW)
    tl.store(scale_ptr + offs_g, scale, mask=offs_g < groups)
    tl.store(q_ptr + offs, (x * inverse[:, None]).to(q_ptr.dtype.element_ty), mask=mask)


@functools.cache
def limits(dtype: torch.dtype, ue8m0: bool = False) -> dict[str, float]:
    """What kernels have to know of an FP8 type, and of scales that are powers of two."""
    return dict(LIMIT=quant.limit(dtype), BELOW=0.0 if ue8m0 else quant.below(dtype))


def launch_groups(kernel, x: Tensor, columns: int, group_size: int, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """kernel(q_ptr, scale_ptr, x_ptr, groups, x_stride, ...) over all groups of q [tokens, columns]."""
    tokens, each = x.shape[0], triton.cdiv(columns, group_size)
    q = torch.empty((tokens, columns), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((tokens, each), dtype=torch.float32, device=x.device)
    if tokens:
        block_g = BLOCK // group_size
        kernel[(triton.cdiv(tokens * each, block_g),)](
            q, scale, x, tokens * each, x.stride(0), COLUMNS=columns, GROUP=group_size, WIDE=is_wide(x, q),
            BLOCK_G=block_g, **limits(q.dtype, ue8m0), num_warps=num_warps(BLOCK // 16))
    return q, scale


def supports(*args, **kwargs) -> str | None:
    """Why Triton cannot quantize here, or None."""
    arch = platform.arch()
    return f"{arch.name} has no FP8 conversion" if arch and arch.fp8 is None else None
