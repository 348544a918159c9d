"""Sorts ids of experts into blocks in one launch: each program counts all ids, and places those of two experts.

The trick: no program waits for another. Counting is cheap from L2, a ballot per bit of a wave's ids; what the experts
before take follows from the counts, and both experts' ranks from one running sum of two 16-bit halves.
Bound by latency up to a thousand ids, then by the counting, which a launch of its own does where ids are very many.
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

#: More ids than these are counted by a launch of its own, in PARTS parts.
MOST_IDS = 8192
PARTS = 16
#: Ids read and places filled at a time, at most.
TILE = 2048
FILL = 512
#: The fewest and the most lanes of a program: with an id a lane, none has to go through LDS on its way to its place.
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
    """Ones to sum up: of the first expert in the lower half, of the second in the upper."""
    return tl.where(ids == first, 1, tl.where((ids == first + 1) & (first + 1 < num_experts), 1 << 16, 0))


@triton.jit
def _two_sums(a, b):
    """Of numbers >= 0, in one reduction: barriers between waves cost more than sums."""
    both = tl.sum(a.to(tl.int64) | (b.to(tl.int64) << 32), 0)
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def _place(sorted_ptr, ids, ones, start, first, place, next_place):
    """Writes the indices of a tile's ids of both experts, the first of each to its place."""
    rank = tl.cumsum(ones, 0)
    place = tl.where(ids == first, place + (rank & 0xFFFF), next_place + (rank >> 16)) - 1
    tl.store(sorted_ptr + place, start + tl.arange(0, ids.shape[0]), mask=ones > 0)


@triton.jit
def _fill(ptr, value, start, end, step, SIZE: tl.constexpr):
    """SIZE places in every `step` from start to end get the value."""
    for at in range(start, end, step):
        offs = at + tl.arange(0, SIZE)
        tl.store(ptr + offs, tl.zeros([SIZE], tl.int32) + value, mask=offs < end)


@triton.jit
def _moe_align_block_size_count_kernel(counts_ptr, ids_ptr, num_ids, part, num_experts, EXPERTS: tl.constexpr,
                                       TILE: tl.constexpr):
    """How often every expert occurs in a part of the ids, which may be empty."""
    start = tl.program_id(0) * part
    end = tl.minimum(start + part, num_ids)
    counts = tl.zeros([EXPERTS], tl.int32)
    for at in range(start, end, TILE):
        counts += _count(_ids(ids_ptr, at, end, TILE), num_experts, EXPERTS)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit
def _moe_align_block_size_kernel(sorted_ptr, experts_ptr, total_ptr, ids_ptr, counts_ptr, num_ids, part, num_blocks,
                                 num_experts, OVERLAP: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr,
                                 PARTS: tl.constexpr, FILL: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                                 PADDING: tl.constexpr):
    """One program: of a pair of experts the ids in a part, and a share of what lies behind all runs; in the first part
    also the padding and the blocks of the pair."""
    if OVERLAP:
        gdc_wait()
    first = tl.program_id(0) * 2
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, num_ids)
    offs_e = tl.arange(0, EXPERTS)
    ids = _ids(ids_ptr, start, end, TILE)
    if counts_ptr is None:
        counts = _count(ids, num_experts, EXPERTS)
        for at in range(TILE, num_ids, TILE):
            counts += _count(_ids(ids_ptr, at, num_ids, TILE), num_experts, EXPERTS)
    else:
        counts = tl.zeros([EXPERTS], tl.int32)
        for other in tl.static_range(PARTS):
            counts += tl.load(counts_ptr + other * EXPERTS + offs_e)
    taken = (counts + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    place, total = _two_sums(tl.where(offs_e < first, taken, 0), taken)
    count, next_count = _two_sums(tl.where(offs_e == first, counts, 0), tl.where(offs_e == first + 1, counts, 0))
    padded = tl.cdiv(count, BLOCK_SIZE) * BLOCK_SIZE
    next_place = place + padded
    behind = next_place + tl.cdiv(next_count, BLOCK_SIZE) * BLOCK_SIZE

    ones = _ones(ids, first, num_experts)
    here, next_here = place, next_place
    if counts_ptr is not None:
        offs = tl.arange(0, PARTS)
        earlier = offs < tl.program_id(1)
        here += tl.sum(tl.load(counts_ptr + offs * EXPERTS + first, mask=earlier, other=0), 0)
        next_here += tl.sum(tl.load(counts_ptr + offs * EXPERTS + first + 1, mask=earlier, other=0), 0)
    _place(sorted_ptr, ids, ones, start, first, here, next_here)
    for at in range(start + TILE, end, TILE):
        passed = tl.sum(ones, 0)
        here += passed & 0xFFFF
        next_here += passed >> 16
        ids = _ids(ids_ptr, at, end, TILE)
        ones = _ones(ids, first, num_experts)
        _place(sorted_ptr, ids, ones, at, first, here, next_here)

    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.program_id(1) == 0:
        _fill(sorted_ptr, num_ids, place + count, next_place, PADDING, PADDING)
        _fill(sorted_ptr, num_ids, next_place + next_count, behind, PADDING, PADDING)
        _fill(experts_ptr, first, place // BLOCK_SIZE, next_place // BLOCK_SIZE, FILL, FILL)
        _fill(experts_ptr, first + 1, next_place // BLOCK_SIZE, behind // BLOCK_SIZE, FILL, FILL)
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
    if n > MOST_IDS:
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
        **({"launch_pdl": True} if overlap else {}))  # an option that other compilers do not know
    return sorted_token_ids, expert_ids, total
