"""Split planning for decode attention: how a batch's keys are split among programs, and the offsets of those keys.

`plan_splits` makes a `Split` on the host, which does not know the lengths; each program then computes its own split
from the lengths with `find_split`. A sequence has one split for each `keys_per_split` of its keys, and at least one, so
a long sequence gets many programs and a short one gets one. `Split` is passed to kernels as `*split`, five integers:
Triton would specialize every integer of a tuple on its value, and compile a kernel for each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.triton_ops.attention import INTERPRETED


class Split(NamedTuple):
    """The inputs of split planning, in the order in which kernels take them."""

    num_seqs: int
    capacity: int   # keys that a row of the page table can hold
    window: int     # keys that a query attends to at most; -1: all
    programs: int   # that the keys of a batch are split among
    min_keys: int   # per split, at least; a sequence's last split may have half as many

    @property
    def max_splits(self) -> int:
        """Upper bound of the splits of one sequence."""
        keys = min(self.capacity, self.window) if self.window > 0 else self.capacity
        return max(1, (keys + self.min_keys // 2) // self.min_keys)

    @property
    def num_items(self) -> int:
        """Upper bound of the splits of a batch: one per sequence, and one more per program."""
        return min(self.num_seqs * self.max_splits, self.num_seqs + self.programs)

    def partials(self, rows: int, width: int, out: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the partial results [num_items, rows, width] and (row_max, row_sum) [num_items, rows, 2] of the
        splits, fp32. Where no sequence can have a second split, returns `out` twice, as unused placeholders."""
        if self.max_splits == 1:
            return out, out
        return (torch.empty((self.num_items, rows, width), dtype=torch.float32, device=out.device),
                torch.empty((self.num_items, rows, 2), dtype=torch.float32, device=out.device))

    @property
    def overlap(self) -> bool:
        """True where the merge is launched while the splits are still being computed: NVIDIA's programmatic dependent
        launch, from Hopper on. The merge reads the lengths meanwhile, then waits in `gdc_wait`."""
        return self.max_splits > 1 and overlaps()


#: The fields of Split, as kernels name them: arguments that change from step to step.
SPLIT = list(Split._fields)


def plan_splits(page_table: Tensor, page_size: int, tiles: int, programs: int, min_keys: int, window: int = -1,
                keys_per_split: int = 0) -> Split:
    """Plan the splits of a batch in which the rows of a sequence take `tiles` programs per split.

    programs        per compute unit at a time
    keys_per_split  > 0 fixes how a sequence is split, so that its result does not depend on the rest of the batch
    """
    num_seqs, max_pages = page_table.shape
    if keys_per_split:  # so many programs that min_keys decides
        return Split(num_seqs, max_pages * page_size, window, 2**30, keys_per_split)
    programs = max(1, platform.compute_units() * programs // tiles)
    return Split(num_seqs, max_pages * page_size, window, programs, min_keys)


def overlaps() -> bool:
    """True if the architecture has programmatic dependent launch."""
    arch = platform.arch()
    return arch is not None and arch.vendor == "nvidia" and arch.matrix == "wgmma"


class Lengths(NamedTuple):
    """Compile-time: how programs read the lengths of a batch."""

    BLOCK_B: int        # lengths read at a time
    ONE_BLOCK_B: bool   # one read covers the batch, which saves three dependent loads before the first key


def length_blocks(num_seqs: int, block_b: int = 0) -> Lengths:
    """block_b as given, or one of two sizes, since each size is a compilation."""
    block_b = block_b or (32 if num_seqs <= 32 else 256)
    return Lengths(block_b, num_seqs <= block_b)


@triton.jit
def keys_of(seq_lens_ptr, seq, num_seqs, capacity, window, NEW: tl.constexpr):
    """Number of keys to split for sequences `seq`, 0 beyond the last: the length, without the NEW newest tokens, within
    the page table's capacity and the window."""
    keys = tl.minimum(tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0), capacity)
    keys = tl.maximum(keys - NEW, 0)
    return tl.where(window > 0, tl.minimum(keys, window), keys)


@triton.jit
def splits_of(keys, keys_per_split):
    """Number of splits for `keys`, at least one; a split has about `keys_per_split` keys, at most 1.5 times that."""
    return tl.maximum(1, (keys + keys_per_split // 2) // keys_per_split)


@triton.jit
def uniform(x, CDNA: tl.constexpr):
    """x, which is equal in all lanes, in a scalar register. CDNA's compiler does not know that a sum is uniform, and
    would compute everything that depends on it, addresses and loops included, in vector registers."""
    if CDNA and not INTERPRETED:
        # s_nop: the compiler inserts no wait states around inline assembly, before x is read or before the result is.
        code: tl.constexpr = "s_nop 0\nv_readfirstlane_b32 $0, $1\ns_nop 4"
        x = tl.inline_asm_elementwise(code, "=s,v", [x], tl.int32, True, 1)
    return x


@triton.jit
def find_split(item, seq_lens_ptr, num_seqs, capacity, window, programs, min_keys, NEW: tl.constexpr,
               BLOCK_B: tl.constexpr, ONE_BLOCK_B: tl.constexpr, CDNA: tl.constexpr):
    """Find the sequence of split `item`, where splits are numbered through the batch. Returns (seq, number of its first
    split, its keys, its splits), as scalars; seq = num_seqs if the batch has fewer splits."""
    offs_b = tl.arange(0, BLOCK_B)
    keys = keys_of(seq_lens_ptr, offs_b, num_seqs, capacity, window, NEW)
    total = tl.sum(keys)
    if not ONE_BLOCK_B:
        for start in range(BLOCK_B, num_seqs, BLOCK_B):
            total += tl.sum(keys_of(seq_lens_ptr, start + offs_b, num_seqs, capacity, window, NEW))
    keys_per_split = tl.maximum(min_keys, tl.cdiv(total, programs))
    seq, first, counted = 0, 0, 0
    if ONE_BLOCK_B:
        splits = tl.where(offs_b < num_seqs, splits_of(keys, keys_per_split), 0)
        passed = (splits > 0) & (tl.cumsum(splits) <= item)
        seq += tl.sum(passed.to(tl.int32))
        first += tl.sum(tl.where(passed, splits, 0))
        keys = tl.sum(tl.where(offs_b == seq, keys, 0))
    else:
        for start in range(0, num_seqs, BLOCK_B):
            splits = splits_of(keys_of(seq_lens_ptr, start + offs_b, num_seqs, capacity, window, NEW), keys_per_split)
            splits = tl.where(start + offs_b < num_seqs, splits, 0)
            passed = (splits > 0) & (counted + tl.cumsum(splits) <= item)
            seq += tl.sum(passed.to(tl.int32))
            first += tl.sum(tl.where(passed, splits, 0))
            counted += tl.sum(splits)
        keys = keys_of(seq_lens_ptr, seq, num_seqs, capacity, window, NEW)
    num_splits = splits_of(keys, keys_per_split)
    return uniform(seq, CDNA), uniform(first, CDNA), uniform(keys, CDNA), uniform(num_splits, CDNA)


@triton.jit
def split_range(split, num_splits, first_block, blocks, BLOCK_N: tl.constexpr):
    """(start, end) of a split's keys. Splits have whole blocks, the first ones one more, so that a block lies inside
    one page where pages hold whole blocks."""
    start = (first_block + split * (blocks // num_splits) + tl.minimum(split, blocks % num_splits)) * BLOCK_N
    end = start + (blocks // num_splits + (split < blocks % num_splits).to(tl.int32)) * BLOCK_N
    return start, end


@triton.jit
def page_numbers(table_ptr, block, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the page numbers of a whole block of keys: one number where pages hold whole blocks. Loads nothing unless
    `block` < `last`; last None: always load."""
    if PAGE_SIZE % BLOCK_N == 0:
        pages = table_ptr + block // PAGE_SIZE
        mask = None if last is None else block < last
    else:
        if BLOCK_N % PAGE_SIZE == 0:  # a scalar plus offsets that are the same for every block
            pages = table_ptr + block // PAGE_SIZE + tl.arange(0, BLOCK_N) // PAGE_SIZE
        else:
            pages = table_ptr + (block + tl.arange(0, BLOCK_N)) // PAGE_SIZE
        mask = None if last is None else tl.full([BLOCK_N], block, tl.int32) < last
    return tl.load(pages, mask=mask)


@triton.jit
def block_rows(ptr, pages, block, stride_page, stride_row, UNIT: tl.constexpr, PAGE_SIZE: tl.constexpr,
               BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """(base pointer, offsets) of the rows of a whole block of keys. Where pages hold whole blocks, the offsets from a
    scalar base are the same for every block, and 32 bits are enough for a pool of any size."""
    offs_n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        base = ptr + (pages.to(tl.int64) * stride_page + block % PAGE_SIZE * stride_row) * UNIT
        offsets = offs_n * stride_row * UNIT
    else:
        base = ptr
        rows = (offs_n if BLOCK_N % PAGE_SIZE == 0 else block + offs_n) % PAGE_SIZE
        page = pages.to(tl.int64) if WIDE else pages
        offsets = (page * stride_page + rows * stride_row) * UNIT
    return base, offsets


@triton.jit
def upcast(x, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Convert x to dtype. EXACT: x is FP8 and dtype represents all its values, so the conversion to bf16 skips the
    rounding that the compiler emits for architectures without an instruction for it."""
    if EXACT and dtype == tl.bfloat16:
        y = (x.to(tl.float32).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def converted_here(x, CDNA: tl.constexpr):
    """x, unchanged; the compiler must convert 16-bit x before this point. Otherwise CDNA's compiler moves a conversion
    from FP8 after each dot's read of its operand from LDS, which then reads single bytes and converts once per dot."""
    if CDNA and not INTERPRETED and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("", "=v,0", [x], x.dtype, False, 2)
    return x
