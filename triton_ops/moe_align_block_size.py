"""Sort (token, expert) pairs into blocks per expert in one launch: each program counts all ids and writes two experts.

The trick: no program waits for another. Counting is cheap from L2, one ballot per bit of a wave's ids. The counts give
the offset of each expert's run, and one cumulative sum of two 16-bit halves gives the ranks within both runs.
Bound by latency up to a thousand ids, then by counting, for which many ids have a launch of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from wave64.ops import moe_align_block_size
from wave64.ops.moe_align_block_size import outputs
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.splits import overlaps

#: More ids than this are counted by a separate launch, in PARTS parts.
MAX_COUNTED = 8192
PARTS = 16
#: Ids read, and elements filled, at a time, at most.
TILE = 2048
FILL = 512
#: Minimum and maximum lanes of a program: with one id per lane, no id goes through LDS before it is stored.
LANES = 128, 512


@triton.jit
def _ids(ids_ptr, start, end, TILE: tl.constexpr):
    offs = start + tl.arange(0, TILE)
    return tl.load(ids_ptr + offs, mask=offs < end, other=-1)


@triton.jit
def _count(ids, num_experts, EXPERTS: tl.constexpr):
    return tl.histogram(ids, EXPERTS, mask=(ids >= 0) & (ids < num_experts))


@triton.jit
def _ones(ids, first, num_experts):
    """1 in the lower 16 bits for ids of the first expert, 1 in the upper 16 bits for those of the second."""
    return tl.where(ids == first, 1, tl.where((ids == first + 1) & (first + 1 < num_experts), 1 << 16, 0))


@triton.jit
def _two_sums(a, b):
    """The sums of a and b >= 0 in one reduction: barriers between waves cost more than adds."""
    both = tl.sum(a.to(tl.int64) | (b.to(tl.int64) << 32), 0)
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def _scatter(sorted_ptr, ids, ones, start, first, offset, next_offset):
    """Write the indices of a tile's ids of both experts to their runs, from offset and next_offset on."""
    rank = tl.cumsum(ones, 0)
    offset = tl.where(ids == first, offset + (rank & 0xFFFF), next_offset + (rank >> 16)) - 1
    tl.store(sorted_ptr + offset, start + tl.arange(0, ids.shape[0]), mask=ones > 0)


@triton.jit
def _fill(ptr, value, start, end, stride, SIZE: tl.constexpr):
    """Store `value` to SIZE elements at start, start + stride, ..., below end."""
    for first_id in range(start, end, stride):
        offs = first_id + tl.arange(0, SIZE)
        tl.store(ptr + offs, tl.zeros([SIZE], tl.int32) + value, mask=offs < end)


@triton.jit(do_not_specialize=["num_ids", "part"])
def _moe_align_block_size_count_kernel(counts_ptr, ids_ptr, num_ids, part, num_experts, EXPERTS: tl.constexpr,
                                       TILE: tl.constexpr):
    """Count the ids of every expert in a part of the ids, which may be empty."""
    start = tl.program_id(0) * part
    end = tl.minimum(start + part, num_ids)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first_id in range(start, end, TILE):
        counts += _count(_ids(ids_ptr, first_id, end, TILE), num_experts, EXPERTS)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["num_ids", "part", "num_blocks"])
def _moe_align_block_size_kernel(sorted_ptr, experts_ptr, total_ptr, ids_ptr, counts_ptr, num_ids, part, num_blocks,
                                 num_experts, OVERLAP: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr,
                                 PARTS: tl.constexpr, FILL: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                                 PADDING: tl.constexpr):
    """One program: the ids of two experts in one part of the ids, and a part of what follows the last run. Programs of
    the first part also write the padding and the expert ids of both runs."""
    if OVERLAP:
        gdc_wait()
    first = tl.program_id(0) * 2
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, num_ids)
    offs_e = tl.arange(0, EXPERTS)
    ids = _ids(ids_ptr, start, end, TILE)
    if counts_ptr is None:
        counts = _count(ids, num_experts, EXPERTS)
        for first_id in range(TILE, num_ids, TILE):
            counts += _count(_ids(ids_ptr, first_id, num_ids, TILE), num_experts, EXPERTS)
    else:
        counts = tl.zeros([EXPERTS], tl.int32)
        for counted_part in tl.static_range(PARTS):
            counts += tl.load(counts_ptr + counted_part * EXPERTS + offs_e)
    padded_counts = (counts + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    offset, total = _two_sums(tl.where(offs_e < first, padded_counts, 0), padded_counts)
    count, next_count = _two_sums(tl.where(offs_e == first, counts, 0), tl.where(offs_e == first + 1, counts, 0))
    padded_count = tl.cdiv(count, BLOCK_SIZE) * BLOCK_SIZE
    next_offset = offset + padded_count
    runs_end = next_offset + tl.cdiv(next_count, BLOCK_SIZE) * BLOCK_SIZE

    ones = _ones(ids, first, num_experts)
    part_offset, next_part_offset = offset, next_offset
    if counts_ptr is not None:
        offs = tl.arange(0, PARTS)
        is_earlier = offs < tl.program_id(1)
        part_offset += tl.sum(tl.load(counts_ptr + offs * EXPERTS + first, mask=is_earlier, other=0), 0)
        next_part_offset += tl.sum(tl.load(counts_ptr + offs * EXPERTS + first + 1, mask=is_earlier, other=0), 0)
    _scatter(sorted_ptr, ids, ones, start, first, part_offset, next_part_offset)
    for first_id in range(start + TILE, end, TILE):
        tile_counts = tl.sum(ones, 0)
        part_offset += tile_counts & 0xFFFF
        next_part_offset += tile_counts >> 16
        ids = _ids(ids_ptr, first_id, end, TILE)
        ones = _ones(ids, first, num_experts)
        _scatter(sorted_ptr, ids, ones, first_id, first, part_offset, next_part_offset)

    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.program_id(1) == 0:
        _fill(sorted_ptr, num_ids, offset + count, next_offset, PADDING, PADDING)
        _fill(sorted_ptr, num_ids, next_offset + next_count, runs_end, PADDING, PADDING)
        _fill(experts_ptr, first, offset // BLOCK_SIZE, next_offset // BLOCK_SIZE, FILL, FILL)
        _fill(experts_ptr, first + 1, next_offset // BLOCK_SIZE, runs_end // BLOCK_SIZE, FILL, FILL)
    if program == 0:
        tl.store(total_ptr, total)
    _fill(sorted_ptr, num_ids, total + program * FILL, num_blocks * BLOCK_SIZE, programs * FILL, FILL)
    _fill(experts_ptr, -1, total // BLOCK_SIZE + program * FILL, num_blocks, programs * FILL, FILL)


@moe_align_block_size.backend("triton")
def launch(topk_ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = topk_ids.numel()
    sorted_token_ids, expert_ids, total = outputs(topk_ids, block_size, num_experts)
    if n == 0:
        return sorted_token_ids, expert_ids, total
    tile = max(LANES[0], min(TILE, triton.next_power_of_2(n)))
    experts = max(64, triton.next_power_of_2(num_experts))
    waves = num_warps(min(tile, LANES[1]))
    parts, part, counts = 1, n, None
    if n > MAX_COUNTED:
        part = triton.cdiv(triton.cdiv(n, PARTS), tile) * tile
        parts = triton.cdiv(n, part)
        counts = torch.empty((PARTS, experts), dtype=torch.int32, device=topk_ids.device)
        _moe_align_block_size_count_kernel[PARTS,](counts, topk_ids, n, part, num_experts, EXPERTS=experts, TILE=tile,
                                                   num_warps=waves)
    overlap = counts is None and overlaps()
    _moe_align_block_size_kernel[triton.cdiv(num_experts, 2), parts](
        sorted_token_ids, expert_ids, total, topk_ids, counts, n, part, expert_ids.shape[0], num_experts,
        OVERLAP=overlap, EXPERTS=experts, TILE=tile, PARTS=PARTS, FILL=FILL, BLOCK_SIZE=block_size,
        PADDING=triton.next_power_of_2(block_size), num_warps=waves,
        **({"launch_pdl": True} if overlap else {}))  # only NVIDIA's compiler has this option
    return sorted_token_ids, expert_ids, total
