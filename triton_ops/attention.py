"""Pieces shared by the kernels that attend to a paged cache: where keys lie, their logits, what Triton can serve."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.quant import FP8

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
        x = tl.load(ptr + rows[:, None] + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
    else:
        x = tl.load(ptr + rows[:, None] + offs_d)
    return x


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
        logits = tl.where(y < 0, -tanh, tanh) * (logit_cap * LOG2_E)
    else:
        logits = products * (scale * LOG2_E)
    return logits


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


# ---- many queries: what prefill_attention and varlen_attention have in common


@triton.jit
def load_tile(ptr, rows, mask, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK]: columns FIRST and following at ptr + rows, 0 from WIDTH on and where mask [rows, 1] (None: all
    rows may be read) is false."""
    columns = FIRST + tl.arange(0, BLOCK)[None, :]
    if FIRST + BLOCK > WIDTH:
        mask = columns < WIDTH if mask is None else mask & (columns < WIDTH)
    return tl.load(ptr + rows[:, None] + columns, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def load_columns(ptr, rows, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, rows]: the same of rows that may all be read, as the right factor of a product. Loaded as such, it is
    laid out in LDS without bank conflicts; behind a tl.trans, Triton would not swizzle it."""
    columns = FIRST + tl.arange(0, BLOCK)[:, None]
    if FIRST + BLOCK > WIDTH:
        x = tl.load(ptr + rows[None, :] + columns, mask=columns < WIDTH, other=0.0)
    else:
        x = tl.load(ptr + rows[None, :] + columns)
    return x


@triton.jit
def load_query(ptr, stride, mask_m, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_R: tl.constexpr):
    """BLOCK_M queries from ptr on: their first BLOCK_D columns, and the BLOCK_R that follow (0: the same, unused)."""
    rows = tl.arange(0, BLOCK_M) * stride
    q = load_tile(ptr, rows, mask_m[:, None], WIDTH, 0, BLOCK_D)
    return q, load_tile(ptr, rows, mask_m[:, None], WIDTH, BLOCK_D, BLOCK_R) if BLOCK_R > 0 else q


@triton.jit
def deal_heads(i, heads, GROUP: tl.constexpr):
    """(head, key head) of the i-th program of a row. Neighbours take different key heads: dealt to the chiplets of an
    MI300X in turn, programs of one key head meet in one cache; elsewhere all of a row run together anyway."""
    kv_heads = heads // GROUP
    return i % kv_heads * GROUP + i // kv_heads, i % kv_heads


@triton.jit
def key_positions(block, lowest, length, EDGE: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of a block's keys; on an edge those outside [lowest, length) become ones that may be read."""
    n = block + tl.arange(0, BLOCK_N)
    if EDGE and WINDOWED:
        n = tl.maximum(n, lowest)
    return tl.minimum(n, length - 1) if EDGE else n


@triton.jit
def load_page_numbers(table_ptr, block, n, EDGE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of each of the block's keys, which are at positions n, or one number where they share it."""
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table_ptr + block // PAGE_SIZE)
    elif EDGE or BLOCK_N % PAGE_SIZE > 0:
        pages = tl.load(table_ptr + n // PAGE_SIZE)
    else:  # besides the scalar, offsets that are the same for every block
        pages = tl.load(table_ptr + block // PAGE_SIZE + tl.arange(0, BLOCK_N) // PAGE_SIZE)
    return pages


@triton.jit
def narrow(p, dtype: tl.constexpr, HALF_UP: tl.constexpr):
    """p >= 0 in dtype. HALF_UP: to bf16 in two instructions instead of six without one for it; only ties
    differ, which go up."""
    if HALF_UP and dtype == tl.bfloat16:
        p = ((p.to(tl.uint32, bitcast=True) + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return p.to(dtype)


@triton.jit
def attend(q, q_rest, peak, total, mixed, position, first, last, lowest, length, window, scale, logit_cap, factor, keys,
           EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
           ALIKE: tl.constexpr, HALF_UP: tl.constexpr, UNIT: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
           PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
           BLOCK_V: tl.constexpr):
    """Takes the blocks of keys from `first`, a multiple of BLOCK_N, to `last` (at least one) into peak, total, mixed.

    EDGE: some of the keys are hidden from some queries; those outside [lowest, length) may not even be read.
    ALIKE: rows of keys and values are as far apart. PAGE_SIZE 0: there are no pages. A block's page numbers are loaded
    while the block before is worked on, so that the loads of keys and values, which run ahead, never wait for them.
    """
    k_ptr, v_ptr, table_ptr, stride_kp, stride_kn, stride_vp, stride_vn = keys
    pages = 0
    if PAGE_SIZE > 0:
        next_n = key_positions(first, lowest, length, EDGE, WINDOWED, BLOCK_N)
        pages = load_page_numbers(table_ptr, first, next_n, EDGE, PAGE_SIZE, BLOCK_N)
    for block in range(first, last, BLOCK_N):
        if PAGE_SIZE > 0:
            n = next_n
            rows = (tl.arange(0, BLOCK_N) if not EDGE and BLOCK_N % PAGE_SIZE == 0 else n) % PAGE_SIZE
            page = pages.to(tl.int64) if WIDE else pages
            k_rows = (page * stride_kp + rows * stride_kn) * UNIT
            v_rows = k_rows if ALIKE else (page * stride_vp + rows * stride_vn) * UNIT
            following = tl.minimum(block + BLOCK_N, last - 1 if EDGE else last - BLOCK_N)
            next_n = key_positions(following, lowest, length, EDGE, WINDOWED, BLOCK_N)
            pages = load_page_numbers(table_ptr, following, next_n, EDGE, PAGE_SIZE, BLOCK_N)
        else:
            n = key_positions(block, lowest, length, EDGE, WINDOWED, BLOCK_N)
            rows = n.to(tl.int64) if WIDE else n
            k_rows = rows * stride_kn * UNIT
            v_rows = k_rows if ALIKE else rows * stride_vn * UNIT
        s = dot(q, load_columns(k_ptr, k_rows, QK_DIM, 0, BLOCK_D).to(q.dtype))
        if BLOCK_R > 0:
            s = dot(q_rest, load_columns(k_ptr, k_rows, QK_DIM, BLOCK_D, BLOCK_R).to(q.dtype), s)
        if CAPPED:
            s = base2_logits(s, scale, logit_cap, True)
        if EDGE:  # no query is beyond `length`, nor sees keys below `lowest`
            offs_n = block + tl.arange(0, BLOCK_N)[None, :]
            seen = offs_n <= position[:, None] if CAUSAL else offs_n < length
            if WINDOWED:
                seen &= offs_n > position[:, None] - window
            s = tl.where(seen, s, float("-inf"))
        before, peak = peak, tl.maximum(peak, tl.max(s, 1) * factor)
        p = tl.exp2(tl.fma(s, factor, -peak[:, None]))
        shrink = tl.exp2(before - peak)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, v_rows, None, V_DIM, 0, BLOCK_V)
        mixed = dot(narrow(p, q.dtype, HALF_UP), v.to(q.dtype), mixed * shrink[:, None])
    return peak, total, mixed


@triton.jit
def attend_to_all(q, q_rest, row, new, length, window, scale, logit_cap, keys, FLIPPED: tl.constexpr,
                  CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
                  ALIKE: tl.constexpr, HALF_UP: tl.constexpr, UNIT: tl.constexpr, QK_DIM: tl.constexpr,
                  V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Attention of BLOCK_M queries from `row` on, of `new` ones that end a sequence of `length` keys: peak and total
    [BLOCK_M] of the logits in base 2, and mixed [BLOCK_M, BLOCK_V], the values weighted with exp2(logit - peak).

    keys: pointers to keys and values of the head and to the sequence's page table, strides of page and row of both.
    FLIPPED: scale may be negative.
    """
    position = length - new + row + tl.arange(0, BLOCK_M)
    # The largest product gives the largest logit, and one fma a logit less the peak: factor must be above 0.
    factor = 1.0 if CAPPED else tl.maximum(tl.abs(scale) * LOG2_E, 1e-30)
    if FLIPPED:
        q = tl.where(scale < 0, -q, q)
        if BLOCK_R > 0:
            q_rest = tl.where(scale < 0, -q_rest, q_rest)
    # Keys [lowest, end) are seen by some query of this block, blocks [inner, outer) by all of them.
    first_query = length - new + row
    last_query = tl.minimum(first_query + BLOCK_M, length) - 1
    end = tl.maximum(0, last_query + 1) if CAUSAL else length
    outer = (tl.maximum(0, first_query + 1) if CAUSAL else length) // BLOCK_N * BLOCK_N
    lowest = tl.maximum(0, first_query - window + 1) if WINDOWED else 0
    begin = lowest // BLOCK_N * BLOCK_N
    inner = begin
    if WINDOWED:
        inner = tl.minimum(tl.cdiv(tl.maximum(0, last_query - window + 1), BLOCK_N) * BLOCK_N, end)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for part in tl.static_range(0 if WINDOWED else 1, 3):  # the window's edge, the middle, the diagonal or the end
        first = begin if part == 0 else inner if part == 1 else tl.maximum(inner, outer)
        last = inner if part == 0 else outer if part == 1 else end
        # Without this, products that are still under way after the loop would meet the zeros of a loop never entered,
        # for which NVIDIA's assembler lets no two of them be under way together.
        if first < last:
            peak, total, mixed = attend(
                q, q_rest, peak, total, mixed, position, first, last, lowest, length, window, scale, logit_cap, factor,
                keys, part != 1, CAUSAL, WINDOWED, CAPPED, WIDE, ALIKE, HALF_UP, UNIT, QK_DIM, V_DIM, PAGE_SIZE,
                BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V)
    return peak, total, mixed


@triton.jit
def store_rows(out_ptr, lse_ptr, heads, mask_m, peak, total, mixed, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_V: tl.constexpr):
    """out and lse of BLOCK_M tokens from the pointers on; zeros and -inf where nothing was seen."""
    blind = total == 0
    total = tl.where(blind, 1, total)
    mixed /= total[:, None]
    rows, columns = tl.arange(0, BLOCK_M) * heads, tl.arange(0, BLOCK_V)
    tl.store(out_ptr + rows[:, None] * WIDTH + columns, mixed.to(out_ptr.dtype.element_ty),
             mask=mask_m[:, None] & (columns < WIDTH))
    tl.store(lse_ptr + rows, tl.where(blind, float("-inf"), (peak + tl.log2(total)) * LN_2), mask=mask_m)


def tile_width(columns: int) -> int:
    """Width of the tile that holds so many columns: a power of two of at least what a matrix instruction takes; for
    Hopper at least 64, since Triton 3.6 lets its instructions read past the end of narrower tiles on chip."""
    arch = platform.arch()
    return max(64 if arch and arch.matrix == "wgmma" else 16, triton.next_power_of_2(columns))


def split_width(head_dim: int) -> tuple[int, int]:
    """Widths of the tiles that hold head_dim columns: one (and 0) or, where that saves work, a second for the rest
    (192 = 128 + 64)."""
    whole = tile_width(head_dim)
    rest = tile_width(head_dim - whole // 2)
    return (whole, 0) if head_dim <= whole // 2 or whole // 2 + rest >= whole else (whole // 2, rest)
