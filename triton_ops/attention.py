"""Pieces shared by the kernels that attend to a paged cache: where keys lie, their logits, what Triton can serve."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.ops.paged_attention import FP8

#: Where running maxima start: below any logit, and finite, so that no difference of two of them is NaN.
LOWEST = tl.constexpr(-1e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b in fp32; fp32 operands are multiplied as such."""
    if INTERPRETED:  # multiplies bf16 as the integers that it keeps them in
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_pages(table_ptr, first, offs_n, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Pages of positions offs_n of the sequence whose page table is at table_ptr; `first` is that of their block.

    One number where a block, which starts at a multiple of BLOCK_N, lies inside a page. 64-bit only for pools above
    2 GiB (WIDE), as are then the offsets computed from it.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table_ptr + first // PAGE_SIZE)
    else:
        pages = tl.load(table_ptr + offs_n // PAGE_SIZE)
    return pages.to(tl.int64) if WIDE else pages


@triton.jit
def load_rows(ptr, pages, offs_n, stride_page, stride_row, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
              PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_N, BLOCK_D] of the cache of the head at ptr, positions offs_n; 0 beyond HEAD_DIM.

    Positions are to be valid ones: the callers clamp them and mask scores instead, since a mask on a load costs
    registers for every row.
    """
    offs_d = tl.arange(0, BLOCK_D)
    rows = (pages * stride_page + offs_n % PAGE_SIZE * stride_row) * UNIT
    if HEAD_DIM < BLOCK_D:
        return tl.load(ptr + rows[:, None] + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
    return tl.load(ptr + rows[:, None] + offs_d)


@triton.jit
def base2_logits(products, scale, logit_cap, CAPPED: tl.constexpr):
    """log2(e) * cap(scale * products): what exp2 takes. cap(x) = c tanh(x / c)."""
    if CAPPED:
        y = products * (scale / logit_cap)
        size = tl.abs(y)
        e = tl.exp2(size * (-2 * LOG2_E))
        # Near 0 a series, since 1 - e would cancel.
        square = y * y
        near = size * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        tanh = tl.where(size < 0.2, near, (1 - e) / (1 + e))
        return tl.where(y < 0, -tanh, tanh) * (logit_cap * LOG2_E)
    return products * (scale * LOG2_E)


@triton.jit
def add_sink(sink, peak, total):
    """Takes a sink's logit into a running (peak, total); also gives what the values mixed so far shrink by."""
    sink = sink.to(tl.float32) * LOG2_E
    new_peak = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - new_peak)
    return new_peak, total * shrink + tl.exp2(sink - new_peak), shrink


def unsupported(query: Tensor, key_cache: Tensor) -> str | None:
    """Why Triton cannot attend with these, or None."""
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {query.dtype} attention"
    if query.shape[2] > 256:
        return f"keeps heads of at most 256 in registers, these have {query.shape[2]}"
    arch = platform.arch()
    if key_cache.dtype in FP8.values() and arch and arch.fp8 is None:
        return f"{arch.name} has no FP8 conversion"
    return None


def is_wide(*caches: Tensor) -> bool:
    """True if an offset in bytes inside one of them needs more than 31 bits."""
    return any(sum((n - 1) * s for n, s in zip(c.shape, c.stride(), strict=True)) * c.element_size() >= 2**31 - 2**16
               for c in caches)


def unit_of(head_dim: int, *strides: int) -> int:
    """The largest power of 2, at most 16, that divides them all: kernels take strides in units of it, and so know how
    wide they may load, with one compiled kernel for all strides alike."""
    return math.gcd(16, head_dim, *strides)
