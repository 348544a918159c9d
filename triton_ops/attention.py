"""What the attention kernels share: loads from paged and ragged KV, logits, online softmax, what Triton supports."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.quant import FP8

#: Initial value of running maxima: below any logit, and finite, so that no difference of two maxima is NaN.
LOWEST = tl.constexpr(-1e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b, accumulated in fp32. fp32 operands are not rounded to TF32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_pages(table_ptr, first, offs_n, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Load the page numbers of positions offs_n, in the block that starts at position `first`, from a sequence's page
    table.

    Returns one number where pages hold whole blocks, else one per position. WIDE: the pool exceeds 2 GiB, so page
    numbers, and the offsets computed from them, are 64-bit.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table_ptr + first // PAGE_SIZE)
    else:
        pages = tl.load(table_ptr + offs_n // PAGE_SIZE)
    return pages.to(tl.int64) if WIDE else pages


@triton.jit
def load_rows(ptr, pages, offs_n, stride_page, stride_row, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
              PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows [BLOCK_N, BLOCK_D] of one head at positions offs_n; columns from HEAD_DIM on are 0.

    Every position must be valid: callers clamp positions and mask the scores, since a mask on a load costs registers
    for every row.
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
    """Logits in base 2, for exp2: log2(e) * cap(scale * products), where cap(x) = logit_cap * tanh(x / logit_cap)."""
    if CAPPED:
        y = products * (scale / logit_cap)
        magnitude = tl.abs(y)
        e = tl.exp2(magnitude * (-2 * LOG2_E))
        # Near 0 a Taylor series, since 1 - e would cancel.
        square = y * y
        series = magnitude * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        tanh = tl.where(magnitude < 0.2, series, (1 - e) / (1 + e))
        logits = tl.where(y < 0, -tanh, tanh) * (logit_cap * LOG2_E)
    else:
        logits = products * (scale * LOG2_E)
    return logits


@triton.jit
def add_sink(sink, row_max, row_sum):
    """Add the logit of an attention sink to a softmax state. Returns (row_max, row_sum, factor for the accumulator)."""
    sink = sink.to(tl.float32) * LOG2_E
    new_max = tl.maximum(row_max, sink)
    rescale = tl.exp2(row_max - new_max)
    return new_max, row_sum * rescale + tl.exp2(sink - new_max), rescale


def unsupported(query: Tensor, key_cache: Tensor) -> str | None:
    """The reason why the Triton kernels do not support these arguments, or None."""
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {query.dtype} attention"
    if query.shape[2] > 256:
        return f"keeps heads of at most 256 in registers, these have {query.shape[2]}"
    arch = platform.arch()
    if key_cache.dtype in FP8.values() and arch and arch.fp8 is None:
        return f"{arch.name} has no FP8 conversion"
    return None


def is_wide(*caches: Tensor) -> bool:
    """True if a byte offset inside one of the tensors needs more than 31 bits."""
    return any(sum((n - 1) * s for n, s in zip(c.shape, c.stride(), strict=True)) * c.element_size() >= 2**31 - 2**16
               for c in caches)


def unit_of(head_dim: int, *strides: int) -> int:
    """The largest power of 2, at most 16, that divides head_dim and all strides. Kernels take strides in this unit:
    they know the width of an aligned load, and one compiled kernel serves all strides."""
    return math.gcd(16, head_dim, *strides)


# ---- many queries per sequence: prefill_attention and varlen_attention


@triton.jit
def load_tile(ptr, rows, mask, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns FIRST to FIRST + BLOCK of the rows at ptr + rows, as [rows, BLOCK]. Columns from WIDTH on, and rows
    where mask [rows, 1] is false, are 0; mask None loads every row."""
    columns = FIRST + tl.arange(0, BLOCK)[None, :]
    if FIRST + BLOCK > WIDTH:
        mask = columns < WIDTH if mask is None else mask & (columns < WIDTH)
    return tl.load(ptr + rows[:, None] + columns, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def load_columns(ptr, rows, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """load_tile of all rows, transposed: [BLOCK, rows], the right operand of a dot. A tile that is loaded this way has
    no bank conflicts in LDS; Triton does not swizzle one that passes through tl.trans."""
    columns = FIRST + tl.arange(0, BLOCK)[:, None]
    if FIRST + BLOCK > WIDTH:
        x = tl.load(ptr + rows[None, :] + columns, mask=columns < WIDTH, other=0.0)
    else:
        x = tl.load(ptr + rows[None, :] + columns)
    return x


@triton.jit
def load_query(ptr, stride, mask_m, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_R: tl.constexpr):
    """Load BLOCK_M queries: (first BLOCK_D columns, next BLOCK_R columns); BLOCK_R 0: the first one twice."""
    rows = tl.arange(0, BLOCK_M) * stride
    q = load_tile(ptr, rows, mask_m[:, None], WIDTH, 0, BLOCK_D)
    return q, load_tile(ptr, rows, mask_m[:, None], WIDTH, BLOCK_D, BLOCK_R) if BLOCK_R > 0 else q


@triton.jit
def assign_heads(i, heads, GROUP: tl.constexpr):
    """(head, KV head) of the i-th of `heads` programs. Adjacent programs take different KV heads: an MI300X assigns
    programs to its chiplets round robin, so programs of one KV head use one chiplet's L2."""
    kv_heads = heads // GROUP
    return i % kv_heads * GROUP + i // kv_heads, i % kv_heads


@triton.jit
def key_positions(block, first_key, length, MASKED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of a block's keys. MASKED: positions outside [first_key, length) are clamped to readable ones."""
    n = block + tl.arange(0, BLOCK_N)
    if MASKED and WINDOWED:
        n = tl.maximum(n, first_key)
    return tl.minimum(n, length - 1) if MASKED else n


@triton.jit
def load_page_numbers(table_ptr, block, n, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the page numbers of a block's keys, at positions n: one number where pages hold whole blocks."""
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table_ptr + block // PAGE_SIZE)
    elif MASKED or BLOCK_N % PAGE_SIZE > 0:
        pages = tl.load(table_ptr + n // PAGE_SIZE)
    else:  # a scalar plus offsets that are the same for every block
        pages = tl.load(table_ptr + block // PAGE_SIZE + tl.arange(0, BLOCK_N) // PAGE_SIZE)
    return pages


@triton.jit
def round_weights(p, dtype: tl.constexpr, HALF_UP: tl.constexpr):
    """Round softmax weights p >= 0 to dtype. HALF_UP: two instructions to bf16, for architectures without a conversion
    instruction, where rounding to nearest even takes six; only ties differ, which round up."""
    if HALF_UP and dtype == tl.bfloat16:
        p = ((p.to(tl.uint32, bitcast=True) + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return p.to(dtype)


@triton.jit
def attend(q, q_rest, row_max, row_sum, acc, position, first, last, first_key, length, window, scale, logit_cap,
           scale_log2, keys, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
           WIDE: tl.constexpr, SAME_STRIDES: tl.constexpr, HALF_UP: tl.constexpr, UNIT: tl.constexpr,
           QK_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Online softmax over the keys [first, last), at least one; `first` is a multiple of BLOCK_N. Returns the updated
    (row_max, row_sum, acc).

    MASKED: some queries do not attend to some of the keys, and keys outside [first_key, length) must not be read.
    SAME_STRIDES: keys and values have equal strides. PAGE_SIZE 0: keys and values are ragged, without pages. The page
    numbers of a block are loaded one block ahead, so that prefetched loads of keys and values never wait for them.
    """
    k_ptr, v_ptr, table_ptr, stride_kp, stride_kn, stride_vp, stride_vn = keys
    pages = 0
    if PAGE_SIZE > 0:
        next_n = key_positions(first, first_key, length, MASKED, WINDOWED, BLOCK_N)
        pages = load_page_numbers(table_ptr, first, next_n, MASKED, PAGE_SIZE, BLOCK_N)
    for block in range(first, last, BLOCK_N):
        if PAGE_SIZE > 0:
            n = next_n
            rows = (tl.arange(0, BLOCK_N) if not MASKED and BLOCK_N % PAGE_SIZE == 0 else n) % PAGE_SIZE
            page = pages.to(tl.int64) if WIDE else pages
            k_rows = (page * stride_kp + rows * stride_kn) * UNIT
            v_rows = k_rows if SAME_STRIDES else (page * stride_vp + rows * stride_vn) * UNIT
            next_block = tl.minimum(block + BLOCK_N, last - 1 if MASKED else last - BLOCK_N)
            next_n = key_positions(next_block, first_key, length, MASKED, WINDOWED, BLOCK_N)
            pages = load_page_numbers(table_ptr, next_block, next_n, MASKED, PAGE_SIZE, BLOCK_N)
        else:
            n = key_positions(block, first_key, length, MASKED, WINDOWED, BLOCK_N)
            rows = n.to(tl.int64) if WIDE else n
            k_rows = rows * stride_kn * UNIT
            v_rows = k_rows if SAME_STRIDES else rows * stride_vn * UNIT
        s = dot(q, load_columns(k_ptr, k_rows, QK_DIM, 0, BLOCK_D).to(q.dtype))
        if BLOCK_R > 0:
            s = dot(q_rest, load_columns(k_ptr, k_rows, QK_DIM, BLOCK_D, BLOCK_R).to(q.dtype), s)
        if CAPPED:
            s = base2_logits(s, scale, logit_cap, True)
        if MASKED:  # no query lies beyond `length` or attends to keys before first_key
            offs_n = block + tl.arange(0, BLOCK_N)[None, :]
            visible = offs_n <= position[:, None] if CAUSAL else offs_n < length
            if WINDOWED:
                visible &= offs_n > position[:, None] - window
            s = tl.where(visible, s, float("-inf"))
        old_max, row_max = row_max, tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        p = tl.exp2(tl.fma(s, scale_log2, -row_max[:, None]))
        rescale = tl.exp2(old_max - row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = load_tile(v_ptr, v_rows, None, V_DIM, 0, BLOCK_V)
        acc = dot(round_weights(p, q.dtype, HALF_UP), v.to(q.dtype), acc * rescale[:, None])
    return row_max, row_sum, acc


@triton.jit
def attend_to_all(q, q_rest, row, new, length, window, scale, logit_cap, keys, NEGATIVE_SCALE: tl.constexpr,
                  CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
                  SAME_STRIDES: tl.constexpr, HALF_UP: tl.constexpr, UNIT: tl.constexpr, QK_DIM: tl.constexpr,
                  V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Attention of BLOCK_M queries, from query `row` of the `new` queries at the end of a sequence of `length` keys.

    Returns row_max and row_sum [BLOCK_M] of the logits in base 2, and acc [BLOCK_M, BLOCK_V], the sum of the values
    weighted with exp2(logit - row_max), not yet divided by row_sum.
    keys: pointers to the head's keys, its values and the sequence's page table, then page and row strides of both.
    NEGATIVE_SCALE: scale may be negative.
    """
    position = length - new + row + tl.arange(0, BLOCK_M)
    # With a positive factor the largest product is the largest logit, and one fma computes a logit minus row_max.
    scale_log2 = 1.0 if CAPPED else tl.maximum(tl.abs(scale) * LOG2_E, 1e-30)
    if NEGATIVE_SCALE:
        q = tl.where(scale < 0, -q, q)
        if BLOCK_R > 0:
            q_rest = tl.where(scale < 0, -q_rest, q_rest)
    # Some query of this block attends to each of the keys [first_key, end), every query to those of [inner, outer).
    first_query = length - new + row
    last_query = tl.minimum(first_query + BLOCK_M, length) - 1
    end = tl.maximum(0, last_query + 1) if CAUSAL else length
    outer = (tl.maximum(0, first_query + 1) if CAUSAL else length) // BLOCK_N * BLOCK_N
    first_key = tl.maximum(0, first_query - window + 1) if WINDOWED else 0
    begin = first_key // BLOCK_N * BLOCK_N
    inner = begin
    if WINDOWED:
        inner = tl.minimum(tl.cdiv(tl.maximum(0, last_query - window + 1), BLOCK_N) * BLOCK_N, end)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for section in tl.static_range(0 if WINDOWED else 1, 3):  # the window's start, the middle, the diagonal
        first = begin if section == 0 else inner if section == 1 else tl.maximum(inner, outer)
        last = inner if section == 0 else outer if section == 1 else end
        # Without this branch, NVIDIA's assembler serializes the matrix instructions: those still in flight after the
        # loop would share registers with the zeros of a loop that is not entered.
        if first < last:
            row_max, row_sum, acc = attend(
                q, q_rest, row_max, row_sum, acc, position, first, last, first_key, length, window, scale, logit_cap,
                scale_log2, keys, section != 1, CAUSAL, WINDOWED, CAPPED, WIDE, SAME_STRIDES, HALF_UP, UNIT, QK_DIM,
                V_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V)
    return row_max, row_sum, acc


@triton.jit
def store_rows(out_ptr, lse_ptr, heads, mask_m, row_max, row_sum, acc, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_V: tl.constexpr):
    """Normalize and store out and lse of BLOCK_M tokens; a query that attends to no key gets zeros and -inf."""
    is_empty = row_sum == 0
    row_sum = tl.where(is_empty, 1, row_sum)
    acc /= row_sum[:, None]
    rows, columns = tl.arange(0, BLOCK_M) * heads, tl.arange(0, BLOCK_V)
    tl.store(out_ptr + rows[:, None] * WIDTH + columns, acc.to(out_ptr.dtype.element_ty),
             mask=mask_m[:, None] & (columns < WIDTH))
    tl.store(lse_ptr + rows, tl.where(is_empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2), mask=mask_m)


def tile_width(columns: int) -> int:
    """Tile width for `columns`: a power of two, at least 16, the width of a matrix instruction. At least 64 on Hopper,
    where matrix instructions compiled by Triton 3.6 read past the end of narrower tiles in shared memory."""
    arch = platform.arch()
    return max(64 if arch and arch.matrix == "wgmma" else 16, triton.next_power_of_2(columns))


def split_width(head_dim: int) -> tuple[int, int]:
    """Widths of the tiles for head_dim columns: (width, 0), or two powers of two where that pads less, as
    192 = 128 + 64."""
    whole = tile_width(head_dim)
    rest = tile_width(head_dim - whole // 2)
    return (whole, 0) if head_dim <= whole // 2 or whole // 2 + rest >= whole else (whole // 2, rest)
