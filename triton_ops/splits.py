"""How a batch's keys are dealt out to programs, and where they lie.

Every sequence gets one part for each share of keys that it has, and at least one. Programs work out the shares from the
lengths themselves: a long sequence gets many parts, a short one one, and the host need not know which.
"""

import triton
import triton.language as tl

from wave64 import platform
from wave64.triton_ops.attention import INTERPRETED

#: The lengths that a deal depends on: arguments that vary from step to step, none worth another compilation.
LENGTHS = ["num_seqs", "room", "window", "programs", "least"]


@triton.jit
def keys_of(seq_lens_ptr, seq, num_seqs, room, window, NEW: tl.constexpr):
    """Keys that are dealt out for sequences `seq`, 0 beyond the last: of their lengths without the NEW newest tokens,
    what the page table and the window allow."""
    keys = tl.minimum(tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0), room)
    keys = tl.maximum(keys - NEW, 0)
    return tl.where(window > 0, tl.minimum(keys, window), keys)


@triton.jit
def parts_of(keys, share):
    """Programs that so many keys of a sequence go to, each with about `share`, at most 1.5 times that; at least one."""
    return tl.maximum(1, (keys + share // 2) // share)


@triton.jit
def deal(item, seq_lens_ptr, num_seqs, room, window, programs, least, NEW: tl.constexpr, BLOCK_B: tl.constexpr,
         ONE_LOOK: tl.constexpr):
    """(seq, first, keys, parts): the sequence whose parts, counted through the batch, include `item`; the number of its
    first part; its keys; and into how many parts they are dealt. seq = num_seqs if there are fewer parts.

    ONE_LOOK: the lengths fit BLOCK_B, so they are loaded once: three dependent loads less before a program's first key.
    """
    offs_b = tl.arange(0, BLOCK_B)
    keys = keys_of(seq_lens_ptr, offs_b, num_seqs, room, window, NEW)
    total = tl.sum(keys)
    if not ONE_LOOK:
        for start in range(BLOCK_B, num_seqs, BLOCK_B):
            total += tl.sum(keys_of(seq_lens_ptr, start + offs_b, num_seqs, room, window, NEW))
    share = tl.maximum(least, tl.cdiv(total, programs))
    seq, first, dealt = 0, 0, 0
    if ONE_LOOK:
        parts = tl.where(offs_b < num_seqs, parts_of(keys, share), 0)
        passed = (parts > 0) & (tl.cumsum(parts) <= item)
        seq += tl.sum(passed.to(tl.int32))
        first += tl.sum(tl.where(passed, parts, 0))
        keys = tl.sum(tl.where(offs_b == seq, keys, 0))
    else:
        for start in range(0, num_seqs, BLOCK_B):
            parts = parts_of(keys_of(seq_lens_ptr, start + offs_b, num_seqs, room, window, NEW), share)
            parts = tl.where(start + offs_b < num_seqs, parts, 0)
            passed = (parts > 0) & (dealt + tl.cumsum(parts) <= item)
            seq += tl.sum(passed.to(tl.int32))
            first += tl.sum(tl.where(passed, parts, 0))
            dealt += tl.sum(parts)
        keys = keys_of(seq_lens_ptr, seq, num_seqs, room, window, NEW)
    return seq, first, keys, parts_of(keys, share)


@triton.jit
def page_numbers(table_ptr, block, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of a whole block of keys: one number where they share it. last: nothing is read unless block is before it;
    None: it is."""
    if PAGE_SIZE % BLOCK_N == 0:
        pages = table_ptr + block // PAGE_SIZE
        mask = None if last is None else block < last
    else:
        if BLOCK_N % PAGE_SIZE == 0:  # beside the scalar, offsets that are the same for every block
            pages = table_ptr + block // PAGE_SIZE + tl.arange(0, BLOCK_N) // PAGE_SIZE
        else:
            pages = table_ptr + (block + tl.arange(0, BLOCK_N)) // PAGE_SIZE
        mask = None if last is None else tl.full([BLOCK_N], block, tl.int32) < last
    return tl.load(pages, mask=mask)


@triton.jit
def rows_of(ptr, pages, block, stride_page, stride_row, UNIT: tl.constexpr, PAGE_SIZE: tl.constexpr,
            BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """(base, offsets): where the rows of a whole block of keys lie. Where they share a page, the offsets from a scalar
    base are the same for every block, and of 32 bits however large the pool is."""
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
def widened(x, dtype: tl.constexpr, EXACT: tl.constexpr):
    """x in dtype. EXACT: dtype holds every number of x's, FP8: to bf16 then without the rounding that a compiler adds
    where there is no instruction for it."""
    if EXACT and dtype == tl.bfloat16:
        y = (x.to(tl.float32).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def settled(x, CDNA: tl.constexpr):
    """x of 16 bits as it is. CDNA's compiler would else put off a conversion from FP8 until each product has read its
    operand from LDS, a byte at a time, and convert once for each."""
    if CDNA and not INTERPRETED and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("", "=v,0", [x], x.dtype, False, 2)
    return x


@triton.jit
def uniform(x, CDNA: tl.constexpr):
    """x, the same in all lanes. What came through a sum looks otherwise to CDNA's compiler, which then does all that
    follows from it, addresses and loops among it, in vector registers, and loads page numbers as vectors, too."""
    if CDNA and not INTERPRETED:
        # s_nop: around inline assembly the compiler leaves out the waits, before x is read and before the result is.
        code: tl.constexpr = "s_nop 0\nv_readfirstlane_b32 $0, $1\ns_nop 4"
        x = tl.inline_asm_elementwise(code, "=s,v", [x], tl.int32, True, 1)
    return x


def most_parts(keys: int, least: int) -> int:
    """Parts that a sequence of so many keys is dealt in at most."""
    return max(1, (keys + least // 2) // least)


def looks(num_seqs: int, block_b: int = 0) -> dict[str, int]:
    """BLOCK_B (as given, or what suits) and ONE_LOOK for so many lengths: few sizes, since each is a compilation."""
    block_b = block_b or (32 if num_seqs <= 32 else 256)
    return dict(BLOCK_B=block_b, ONE_LOOK=num_seqs <= block_b)


def overlaps() -> bool:
    """True where a merge may be launched while the parts are still being computed: NVIDIA's programmatic dependent
    launch, from Hopper on. The merge looks at the lengths meanwhile, then waits in `gdc_wait` for the parts."""
    arch = platform.arch()
    return arch is not None and arch.vendor == "nvidia" and arch.matrix == "wgmma"
