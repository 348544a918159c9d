"""Sampling: one launch sums up the logits by chunks over all compute units, a second draws, a block per row. No sort.

What top_k or top_p keep is everything from one logit on, found by bisection between logits that occur, so it is exact
and ties are kept. The trick is to bisect few: the first launch also writes the peak of every 16 logits; the groups with
the highest peaks, as many as fit, are gathered in order into one tile of registers, and it holds every logit above the
highest peak left out. Where that is not all that may be kept (a flat distribution), the row is streamed instead.
Bound by memory in the first launch, which reads the logits once, and by latency in the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import sample
from wave64.triton_ops.geometry import num_warps

#: Logits of a chunk, and of the tile that is searched in registers.
BLOCK = 4096
GROUP = 16
#: Of the drawing block. On CDNA a mask takes two scalar registers for every logit that a lane holds, so lanes hold few.
WAVES = 16
LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
#: Behind any index.
BEHIND = tl.constexpr(2**31 - 1)


@triton.jit
def _clean(x):
    """fp32 with NaN as -inf and +inf as the largest number, so that differences of two are never NaN."""
    x = x.to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), LARGEST)


@triton.jit
def _chunk(logits_ptr, start, vocab, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    return _clean(tl.load(logits_ptr + offs, mask=offs < vocab, other=float("-inf")))


@triton.jit
def _scale(temperature):
    """log2(e) / temperature, within what makes neither NaN nor a weight of a masked logit."""
    return LOG2_E / tl.minimum(tl.maximum(temperature, 1e-30), 1e36)


@triton.jit
def _weight(x, best, scale):
    """2^((x - best) * scale), 0 from 2^-200 on; scale is log2(e) / temperature, or 0 to count. Half the difference
    and the bound keep huge logits from overflowing."""
    return tl.exp2(tl.maximum(0.5 * x - 0.5 * best, -100.0 / tl.maximum(scale, 1e-36)) * (2.0 * scale))


@triton.jit
def _kept_weight(x, best, scale, floor, min_p):
    weight = _weight(x, best, scale)
    return tl.where((x >= floor) & (x > float("-inf")) & (weight >= min_p), weight, 0.0)


@triton.jit
def _above(x, pivot, floor, best, scale):
    """Of the x from floor on, element by element: the weight above pivot, what is above it, what is not."""
    above = (x > pivot) & (x >= floor)
    below = (x <= pivot) & (x >= floor)
    return (tl.where(above, _weight(x, best, scale), 0.0), tl.where(above, x, float("inf")),
            tl.where(below, x, float("-inf")))


@triton.jit
def _threshold(tile, logits_ptr, end, vocab, want, floor, best, scale, BLOCK: tl.constexpr):
    """The least x >= floor that occurs with less than `want` weight above it: the last one to keep. It searches `tile`
    and the logits [BLOCK, end). Where everything above floor weighs less than `want`: floor."""
    low = floor
    high = best
    pivot = floor
    while low < high:
        weight, least, greatest = _above(tile, pivot, floor, best, scale)
        for start in range(BLOCK, end, BLOCK):
            more, x_least, x_greatest = _above(_chunk(logits_ptr, start, vocab, BLOCK), pivot, floor, best, scale)
            weight += more
            least = tl.minimum(least, x_least)
            greatest = tl.maximum(greatest, x_greatest)
        # both ends are logits that occur, so every turn leaves out at least one of those between
        if tl.sum(weight, 0) >= want:
            low = tl.min(least, 0)
        else:
            high = tl.max(greatest, 0)
        pivot = 0.5 * low + 0.5 * high
        pivot = tl.maximum(tl.where(pivot < high, pivot, low), low)
    return low


@triton.jit
def _cut(peaks, best, most):
    """A value with at most `most` peaks above it, and if there are so many and they differ, at least half as many."""
    low = tl.min(tl.where(peaks > float("-inf"), peaks, float("inf")), 0)
    high = best
    cut = tl.full([], float("-inf"), tl.float32)
    above = tl.sum((peaks > cut).to(tl.int32), 0)
    steps = 0
    while (steps < 24) & ((above > most) | (2 * above < most)) & (low < high):
        pivot = 0.5 * low + 0.5 * high
        above = tl.sum((peaks > pivot).to(tl.int32), 0)
        if above > most:
            low = pivot
        else:
            high = pivot
            cut = pivot
        steps += 1
    return tl.where(above > most, high, cut)


@triton.jit
def _mass(tile, logits_ptr, end, vocab, best, scale, floor, min_p, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The kept weight [CHUNKS] of `tile` and of every chunk of the logits [BLOCK, end)."""
    offs_c = tl.arange(0, CHUNKS)
    mass = tl.where(offs_c == 0, tl.sum(_kept_weight(tile, best, scale, floor, min_p), 0), 0.0)
    for start in range(BLOCK, end, BLOCK):
        x = _chunk(logits_ptr, start, vocab, BLOCK)
        here = tl.sum(_kept_weight(x, best, scale, floor, min_p), 0)
        mass = tl.where(offs_c == start // BLOCK, here, mass)
    return mass


@triton.jit
def _share(mass, top_p):
    """The mass that top_p keeps; out of reach where it keeps all."""
    return tl.where(top_p < 1, top_p * tl.sum(mass, 0), float("inf"))


@triton.jit
def _find(mass, uniform, CHUNKS: tl.constexpr):
    """The chunk in which the running mass first exceeds uniform times all of it, that product, the mass before."""
    offs_c = tl.arange(0, CHUNKS)
    running = tl.cumsum(mass, 0)
    target = uniform * tl.max(running, 0)
    chunk = tl.min(tl.where((running > target) & (mass > 0), offs_c, BEHIND), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(mass > 0, offs_c, -1), 0))
    return chunk, target, tl.sum(tl.where(offs_c == chunk - 1, running, 0.0), 0)


@triton.jit
def _sample_chunks_kernel(peaks_ptr, stats_ptr, logits_ptr, temperature_ptr, logits_stride, vocab, GROUP: tl.constexpr,
                          BLOCK: tl.constexpr):
    """Of a chunk of a row: the peaks of its groups, its maximum, its mass relative to that."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    x = _chunk(logits_ptr + row * logits_stride, chunk * BLOCK, vocab, BLOCK)
    peaks = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1)
    offs = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(peaks_ptr + row * chunks * (BLOCK // GROUP) + offs, peaks)
    best = tl.max(peaks, 0)
    mass = tl.sum(_weight(x, tl.maximum(best, -LARGEST), _scale(tl.load(temperature_ptr + row))), 0)
    tl.store(stats_ptr + row * 2 * chunks + chunk, best)
    tl.store(stats_ptr + row * 2 * chunks + chunks + chunk, mass)


@triton.jit
def _sample_kernel(out_ptr, logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, peaks_ptr,
                   stats_ptr, ids_ptr, logits_stride, vocab, chunks, CHUNKS: tl.constexpr, PEAKS: tl.constexpr,
                   GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The id of a row. CHUNKS and PEAKS are the powers of two that hold its chunks and peaks."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    ids_ptr += row * GROUPS
    stats_ptr += row * 2 * chunks
    offs = tl.arange(0, BLOCK)
    offs_c = tl.arange(0, CHUNKS)
    chunk_best = tl.load(stats_ptr + offs_c, mask=offs_c < chunks, other=float("-inf"))
    best = tl.max(chunk_best, 0)
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0) & (best > float("-inf")):
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
        scale = _scale(temperature)
        mass = tl.load(stats_ptr + chunks + offs_c, mask=offs_c < chunks, other=0.0)
        mass *= _weight(chunk_best, best, scale)
        floor = tl.full([], float("-inf"), tl.float32)
        end = vocab
        tile = tl.full([BLOCK], float("-inf"), tl.float32)
        by_count = (top_k > 0) & (top_k < vocab)
        if by_count | (top_p < 1) | (min_p > 0):
            offs_p = tl.arange(0, PEAKS)
            peaks = tl.load(peaks_ptr + row * chunks * GROUPS + offs_p, mask=offs_p < chunks * GROUPS,
                            other=float("-inf"))
            cut = _cut(peaks, best, GROUPS)
            chosen = (peaks > cut).to(tl.int32)
            tl.store(ids_ptr + tl.cumsum(chosen, 0) - 1, offs_p, mask=chosen > 0)
            tl.debug_barrier()
            group = tl.load(ids_ptr + offs // GROUP, mask=offs // GROUP < tl.sum(chosen, 0), other=vocab)
            ids = group * GROUP + offs % GROUP
            tile = _clean(tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")))
            tile = tl.where(tile > cut, tile, float("-inf"))
            want = tl.where(by_count, top_k.to(tl.float32), _share(mass, top_p))
            weight = _weight(tile, best, tl.where(by_count, 0.0, scale))
            held = tl.sum(tl.where(tile > float("-inf"), weight, 0.0), 0)
            narrow = (by_count == 0) & (_weight(cut, best, scale) <= min_p)
            if (held >= want) | narrow | (cut == float("-inf")):
                end = 0
            else:
                tile = _chunk(logits_ptr, 0, vocab, BLOCK)
            # top_k, where asked for, then top_p of what that left
            for by_mass in range(tl.where(by_count, 0, 1), 2):
                floor = _threshold(tile, logits_ptr, end, vocab, want, floor, best, scale * by_mass, BLOCK)
                mass = _mass(tile, logits_ptr, end, vocab, best, scale, floor, min_p * by_mass, CHUNKS, BLOCK)
                want = _share(mass, top_p)
        chunk, target, before = _find(mass, tl.load(uniform_ptr + row), CHUNKS)
        if end > 0:
            tile = _chunk(logits_ptr, chunk * BLOCK, vocab, BLOCK)
        # rounding may choose a neighbour, but never one that is not kept
        weight = _kept_weight(tile, best, scale, floor, min_p)
        hit = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        place = tl.min(tl.where(hit, offs, BEHIND), 0)
        place = tl.minimum(place, tl.max(tl.where(weight > 0, offs, -1), 0))
        token = chunk * BLOCK + place
        if end == 0:
            token = tl.load(ids_ptr + place // GROUP) * GROUP + place % GROUP
    else:
        chunk = tl.min(tl.where(chunk_best == best, offs_c, BEHIND), 0)
        x = _chunk(logits_ptr, chunk * BLOCK, vocab, BLOCK)
        token = chunk * BLOCK + tl.min(tl.where(x == best, offs, BEHIND), 0)
    tl.store(out_ptr + row, token.to(tl.int64))


@sample.backend("triton")
def launch(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = max(GROUP, min(BLOCK, triton.next_power_of_2(vocab)))
        chunks, groups = triton.cdiv(vocab, block), block // GROUP
        peaks = torch.empty((rows, chunks * groups), dtype=torch.float32, device=logits.device)
        stats = torch.empty((rows, 2, chunks), dtype=torch.float32, device=logits.device)
        ids = torch.empty((rows, groups), dtype=torch.int32, device=logits.device)
        _sample_chunks_kernel[(rows, chunks)](peaks, stats, logits, temperature, logits.stride(0), vocab, GROUP=GROUP,
                                              BLOCK=block, num_warps=num_warps(block // 16))
        _sample_kernel[(rows,)](out, logits, temperature, top_k, top_p, min_p, uniform, peaks, stats, ids,
                                logits.stride(0), vocab, chunks, CHUNKS=triton.next_power_of_2(chunks),
                                PEAKS=triton.next_power_of_2(chunks * groups), GROUP=GROUP, BLOCK=block,
                                num_warps=max(1, min(WAVES, block // 256)))
    return out
