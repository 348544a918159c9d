"""Sampling without a sort: one launch reduces the logits by chunks on all compute units, a second samples, a block per
row.

top_k and top_p keep all logits from a threshold on. Bisection between logits that occur finds it exactly; ties are
kept. The trick is to bisect few logits: the first launch also writes the maximum of every group of 16; the groups with
the largest maxima, as many as fit, are gathered in order into a tile in registers, which then holds every logit above
the largest maximum left out. If more logits than those may be kept (a flat distribution), the row is streamed instead.
Bound by memory in the first launch, which reads the logits once, and by latency in the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import sample
from wave64.triton_ops.geometry import num_warps

#: Logits per chunk, and per tile in registers.
BLOCK = 4096
GROUP = 16
#: Of the sampling block, at most. On CDNA a mask takes two scalar registers per logit of a lane, so lanes hold few.
MAX_WAVES = 16
LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
#: Above any index.
MAX_INT = tl.constexpr(2**31 - 1)


@triton.jit
def _clean(x):
    """x in fp32; NaN becomes -inf and +inf the largest number, so that no difference is NaN."""
    x = x.to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), LARGEST)


@triton.jit
def _chunk(logits_ptr, start, vocab, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    return _clean(tl.load(logits_ptr + offs, mask=offs < vocab, other=float("-inf")))


@triton.jit
def _scale(temperature):
    """log2(e) / temperature, clamped so that no weight is NaN and masked logits have weight 0."""
    return LOG2_E / tl.minimum(tl.maximum(temperature, 1e-30), 1e36)


@triton.jit
def _weight(x, row_max, scale):
    """2^((x - row_max) * scale), or 0 below 2^-200; scale is log2(e) / temperature, or 0 to count. Halves and a clamp
    prevent overflow for huge logits."""
    return tl.exp2(tl.maximum(0.5 * x - 0.5 * row_max, -100.0 / tl.maximum(scale, 1e-36)) * (2.0 * scale))


@triton.jit
def _kept_weight(x, row_max, scale, floor, min_p):
    weight = _weight(x, row_max, scale)
    return tl.where((x >= floor) & (x > float("-inf")) & (weight >= min_p), weight, 0.0)


@triton.jit
def _above(x, pivot, floor, row_max, scale):
    """For each x >= floor: (its weight if above pivot, else 0; x if above, else inf; x if not above, else -inf)."""
    above = (x > pivot) & (x >= floor)
    below = (x <= pivot) & (x >= floor)
    return (tl.where(above, _weight(x, row_max, scale), 0.0), tl.where(above, x, float("inf")),
            tl.where(below, x, float("-inf")))


@triton.jit
def _threshold(tile, logits_ptr, end, vocab, want, floor, row_max, scale, BLOCK: tl.constexpr):
    """The smallest logit to keep: the minimum x >= floor with less than `want` weight above it, or floor if all logits
    above floor weigh less than `want`. Searches `tile` and the logits [BLOCK, end)."""
    low = floor
    high = row_max
    pivot = floor
    while low < high:
        weight, min_above, max_below = _above(tile, pivot, floor, row_max, scale)
        for start in range(BLOCK, end, BLOCK):
            x_weight, x_min_above, x_max_below = _above(_chunk(logits_ptr, start, vocab, BLOCK), pivot, floor, row_max,
                                                        scale)
            weight += x_weight
            min_above = tl.minimum(min_above, x_min_above)
            max_below = tl.maximum(max_below, x_max_below)
        # both ends are logits that occur, so every iteration excludes at least one logit
        if tl.sum(weight, 0) >= want:
            low = tl.min(min_above, 0)
        else:
            high = tl.max(max_below, 0)
        pivot = 0.5 * low + 0.5 * high
        pivot = tl.maximum(tl.where(pivot < high, pivot, low), low)
    return low


@triton.jit
def _find_cut(group_max, row_max, max_count):
    """A value with at most max_count group maxima above it, and at least half as many unless too many are equal."""
    low = tl.min(tl.where(group_max > float("-inf"), group_max, float("inf")), 0)
    high = row_max
    cut = tl.full([], float("-inf"), tl.float32)
    above = tl.sum((group_max > cut).to(tl.int32), 0)
    steps = 0
    while (steps < 24) & ((above > max_count) | (2 * above < max_count)) & (low < high):
        pivot = 0.5 * low + 0.5 * high
        above = tl.sum((group_max > pivot).to(tl.int32), 0)
        if above > max_count:
            low = pivot
        else:
            high = pivot
            cut = pivot
        steps += 1
    return tl.where(above > max_count, high, cut)


@triton.jit
def _mass(tile, logits_ptr, end, vocab, row_max, scale, floor, min_p, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The kept weight [CHUNKS] of `tile` and of every chunk of the logits [BLOCK, end)."""
    offs_c = tl.arange(0, CHUNKS)
    mass = tl.where(offs_c == 0, tl.sum(_kept_weight(tile, row_max, scale, floor, min_p), 0), 0.0)
    for start in range(BLOCK, end, BLOCK):
        x = _chunk(logits_ptr, start, vocab, BLOCK)
        chunk_mass = tl.sum(_kept_weight(x, row_max, scale, floor, min_p), 0)
        mass = tl.where(offs_c == start // BLOCK, chunk_mass, mass)
    return mass


@triton.jit
def _wanted_mass(mass, top_p):
    """The mass that top_p keeps; infinity if it keeps all."""
    return tl.where(top_p < 1, top_p * tl.sum(mass, 0), float("inf"))


@triton.jit
def _find_chunk(mass, uniform, CHUNKS: tl.constexpr):
    """(first chunk whose cumulative mass exceeds target = uniform * total mass, target, mass before the chunk)."""
    offs_c = tl.arange(0, CHUNKS)
    running = tl.cumsum(mass, 0)
    target = uniform * tl.max(running, 0)
    chunk = tl.min(tl.where((running > target) & (mass > 0), offs_c, MAX_INT), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(mass > 0, offs_c, -1), 0))
    return chunk, target, tl.sum(tl.where(offs_c == chunk - 1, running, 0.0), 0)


@triton.jit
def _sample_chunks_kernel(group_max_ptr, stats_ptr, logits_ptr, temperature_ptr, logits_stride, vocab,
                          GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """For a chunk of a row: the maxima of its groups, its maximum, and its mass relative to that."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    x = _chunk(logits_ptr + row * logits_stride, chunk * BLOCK, vocab, BLOCK)
    group_max = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1)
    offs = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(group_max_ptr + row * chunks * (BLOCK // GROUP) + offs, group_max)
    row_max = tl.max(group_max, 0)
    mass = tl.sum(_weight(x, tl.maximum(row_max, -LARGEST), _scale(tl.load(temperature_ptr + row))), 0)
    tl.store(stats_ptr + row * 2 * chunks + chunk, row_max)
    tl.store(stats_ptr + row * 2 * chunks + chunks + chunk, mass)


@triton.jit
def _sample_kernel(out_ptr, logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, group_max_ptr,
                   stats_ptr, ids_ptr, logits_stride, vocab, chunks, CHUNKS: tl.constexpr, GROUP_MAXIMA: tl.constexpr,
                   GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Sample the id of a row. CHUNKS and GROUP_MAXIMA are the numbers of chunks and groups, padded to powers of two."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    ids_ptr += row * GROUPS
    stats_ptr += row * 2 * chunks
    offs = tl.arange(0, BLOCK)
    offs_c = tl.arange(0, CHUNKS)
    chunk_max = tl.load(stats_ptr + offs_c, mask=offs_c < chunks, other=float("-inf"))
    row_max = tl.max(chunk_max, 0)
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0) & (row_max > float("-inf")):
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
        scale = _scale(temperature)
        mass = tl.load(stats_ptr + chunks + offs_c, mask=offs_c < chunks, other=0.0)
        mass *= _weight(chunk_max, row_max, scale)
        floor = tl.full([], float("-inf"), tl.float32)
        end = vocab
        tile = tl.full([BLOCK], float("-inf"), tl.float32)
        by_count = (top_k > 0) & (top_k < vocab)
        if by_count | (top_p < 1) | (min_p > 0):
            offs_p = tl.arange(0, GROUP_MAXIMA)
            group_max = tl.load(group_max_ptr + row * chunks * GROUPS + offs_p, mask=offs_p < chunks * GROUPS,
                                other=float("-inf"))
            cut = _find_cut(group_max, row_max, GROUPS)
            chosen = (group_max > cut).to(tl.int32)
            tl.store(ids_ptr + tl.cumsum(chosen, 0) - 1, offs_p, mask=chosen > 0)
            tl.debug_barrier()
            group = tl.load(ids_ptr + offs // GROUP, mask=offs // GROUP < tl.sum(chosen, 0), other=vocab)
            ids = group * GROUP + offs % GROUP
            tile = _clean(tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")))
            tile = tl.where(tile > cut, tile, float("-inf"))
            want = tl.where(by_count, top_k.to(tl.float32), _wanted_mass(mass, top_p))
            weight = _weight(tile, row_max, tl.where(by_count, 0.0, scale))
            tile_mass = tl.sum(tl.where(tile > float("-inf"), weight, 0.0), 0)
            min_p_cuts = (by_count == 0) & (_weight(cut, row_max, scale) <= min_p)
            if (tile_mass >= want) | min_p_cuts | (cut == float("-inf")):
                end = 0
            else:
                tile = _chunk(logits_ptr, 0, vocab, BLOCK)
            # top_k, if set, then top_p of the remaining logits
            for by_mass in range(tl.where(by_count, 0, 1), 2):
                floor = _threshold(tile, logits_ptr, end, vocab, want, floor, row_max, scale * by_mass, BLOCK)
                mass = _mass(tile, logits_ptr, end, vocab, row_max, scale, floor, min_p * by_mass, CHUNKS, BLOCK)
                want = _wanted_mass(mass, top_p)
        chunk, target, before = _find_chunk(mass, tl.load(uniform_ptr + row), CHUNKS)
        if end > 0:
            tile = _chunk(logits_ptr, chunk * BLOCK, vocab, BLOCK)
        # rounding may choose an adjacent logit, but never one that is not kept
        weight = _kept_weight(tile, row_max, scale, floor, min_p)
        is_after = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        offset = tl.min(tl.where(is_after, offs, MAX_INT), 0)
        offset = tl.minimum(offset, tl.max(tl.where(weight > 0, offs, -1), 0))
        token = chunk * BLOCK + offset
        if end == 0:
            token = tl.load(ids_ptr + offset // GROUP) * GROUP + offset % GROUP
    else:
        chunk = tl.min(tl.where(chunk_max == row_max, offs_c, MAX_INT), 0)
        x = _chunk(logits_ptr, chunk * BLOCK, vocab, BLOCK)
        token = chunk * BLOCK + tl.min(tl.where(x == row_max, offs, MAX_INT), 0)
    tl.store(out_ptr + row, token.to(tl.int64))


@sample.backend("triton")
def launch(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = max(GROUP, min(BLOCK, triton.next_power_of_2(vocab)))
        chunks, groups = triton.cdiv(vocab, block), block // GROUP
        group_max = torch.empty((rows, chunks * groups), dtype=torch.float32, device=logits.device)
        stats = torch.empty((rows, 2, chunks), dtype=torch.float32, device=logits.device)
        ids = torch.empty((rows, groups), dtype=torch.int32, device=logits.device)
        _sample_chunks_kernel[(rows, chunks)](group_max, stats, logits, temperature, logits.stride(0), vocab,
                                              GROUP=GROUP, BLOCK=block, num_warps=num_warps(block // 16))
        _sample_kernel[(rows,)](out, logits, temperature, top_k, top_p, min_p, uniform, group_max, stats, ids,
                                logits.stride(0), vocab, chunks, CHUNKS=triton.next_power_of_2(chunks),
                                GROUP_MAXIMA=triton.next_power_of_2(chunks * groups), GROUP=GROUP, BLOCK=block,
                                num_warps=max(1, min(MAX_WAVES, block // 256)))
    return out
