"""Sampling: a block per row reads the logits two to four times and never sorts.

What top_k or top_p keep is everything from one logit on, found by bisection between logits that occur, so it is exact
and ties are kept. The trick is to bisect few: while the first pass looks for the maximum, every position of the tile
keeps its own, and the k largest of those maxima cannot lie above the k largest logits (the same holds for mass).
What lies above that bound is gathered, in order, into one tile of registers; where it does not fit (a flat distribution
under top_p) the row is streamed instead, by the same code.
Bound by L2: a row of 128256 fp32 is half a megabyte, and one compute unit reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import sample
from wave64.triton_ops.geometry import num_warps

BLOCK = 4096
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
def _weight(x, best, scale):
    """2^((x - best) * scale), 0 from 2^-200 on; scale is log2(e) / temperature, or 0 to count."""
    return tl.exp2(tl.maximum(x - best, -200.0 / tl.maximum(scale, 1e-36)) * scale)


@triton.jit
def _kept_weight(x, best, scale, floor, min_p):
    weight = _weight(x, best, scale)
    return tl.where((x >= floor) & (weight >= min_p), weight, 0.0)


@triton.jit
def _above(x, pivot, floor, best, scale):
    """Of the x from floor on: the weight above pivot, the least above it, the greatest not above it."""
    above = x > pivot
    weight = tl.sum(tl.where(above & (x >= floor), _weight(x, best, scale), 0.0), 0)
    least = tl.min(tl.where(above & (x >= floor), x, float("inf")), 0)
    greatest = tl.max(tl.where(above | (x < floor), float("-inf"), x), 0)
    return weight, least, greatest


@triton.jit
def _threshold(tile, logits_ptr, end, vocab, want, floor, best, scale, BLOCK: tl.constexpr):
    """The least x >= floor that occurs with less than `want` weight above it: the last one to keep. It searches `tile`
    and the logits [BLOCK, end). Where everything above floor weighs less than `want`: floor."""
    low = floor
    high = best
    pivot = floor
    while low < high:
        weight, least, greatest = _above(tile, pivot, floor, best, scale)
        for start in tl.range(BLOCK, end, BLOCK, num_stages=3):
            more, x_least, x_greatest = _above(_chunk(logits_ptr, start, vocab, BLOCK), pivot, floor, best, scale)
            weight += more
            least = tl.minimum(least, x_least)
            greatest = tl.maximum(greatest, x_greatest)
        # both ends are logits that occur, so every turn leaves out at least one of those between
        if weight >= want:
            low = least
        else:
            high = greatest
        pivot = 0.5 * low + 0.5 * high
        pivot = tl.maximum(tl.where(pivot < high, pivot, low), low)
    return low


@triton.jit
def _mass(tile, logits_ptr, end, vocab, best, scale, floor, min_p, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The kept weight [CHUNKS] of `tile` and of every chunk of the logits [BLOCK, end)."""
    offs_c = tl.arange(0, CHUNKS)
    mass = tl.where(offs_c == 0, tl.sum(_kept_weight(tile, best, scale, floor, min_p), 0), 0.0)
    for start in tl.range(BLOCK, end, BLOCK, num_stages=3):
        x = _chunk(logits_ptr, start, vocab, BLOCK)
        here = tl.sum(_kept_weight(x, best, scale, floor, min_p), 0)
        mass = tl.where(offs_c == start // BLOCK, here, mass)
    return mass


@triton.jit
def _gather(logits_ptr, ids_ptr, vocab, cut, BLOCK: tl.constexpr):
    """Writes the ids of the finite logits from `cut` on, in order, if they are BLOCK at most; returns how many."""
    count = 0
    for start in range(0, vocab, BLOCK):
        x = _chunk(logits_ptr, start, vocab, BLOCK)
        wanted = (x >= cut) & (x > float("-inf"))
        here = tl.sum(wanted.to(tl.int32), 0)
        if (here > 0) & (count + here <= BLOCK):
            place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(ids_ptr + place, start + tl.arange(0, BLOCK), mask=wanted)
        count += here
    return count


@triton.jit
def _first(mass, tile, logits_ptr, vocab, uniform, best, scale, floor, min_p, CHUNKS: tl.constexpr,
           BLOCK: tl.constexpr):
    """Index of the first kept logit at which the running mass exceeds uniform times all of it: its chunk, then its
    place there. Rounding may choose a neighbour, but never one that is not kept."""
    offs_c = tl.arange(0, CHUNKS)
    offs = tl.arange(0, BLOCK)
    running = tl.cumsum(mass, 0)
    target = uniform * tl.max(running, 0)
    chunk = tl.min(tl.where((running > target) & (mass > 0), offs_c, BEHIND), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(mass > 0, offs_c, -1), 0))
    before = tl.sum(tl.where(offs_c == chunk - 1, running, 0.0), 0)
    x = tile
    if chunk > 0:
        x = _chunk(logits_ptr, chunk * BLOCK, vocab, BLOCK)
    weight = _kept_weight(x, best, scale, floor, min_p)
    hit = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
    place = tl.min(tl.where(hit, offs, BEHIND), 0)
    place = tl.minimum(place, tl.max(tl.where(weight > 0, offs, -1), 0))
    return chunk * BLOCK + place


@triton.jit
def _sample_kernel(out_ptr, logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, ids_ptr,
                   logits_stride, vocab, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    ids_ptr += row * BLOCK
    offs = tl.arange(0, BLOCK)

    tile = _chunk(logits_ptr, 0, vocab, BLOCK)
    peak, peak_at = tile, offs
    for start in tl.range(BLOCK, vocab, BLOCK, num_stages=3):
        x = _chunk(logits_ptr, start, vocab, BLOCK)
        peak_at = tl.where(x > peak, start + offs, peak_at)
        peak = tl.maximum(peak, x)
    best = tl.max(peak, 0)
    token = tl.min(tl.where(peak == best, peak_at, BEHIND), 0)

    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0) & (best > float("-inf")):
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
        scale = LOG2_E / tl.maximum(temperature, 1e-30)
        floor = tl.full([], float("-inf"), tl.float32)
        end = vocab
        by_count = (top_k > 0) & (top_k < vocab)
        if by_count | (top_p < 1):
            want = top_k.to(tl.float32)
            if not by_count:
                mass = _mass(tile, logits_ptr, end, vocab, best, scale, floor, 0.0, CHUNKS, BLOCK)
                want = top_p * tl.sum(mass, 0)
            floor = _threshold(peak, logits_ptr, 0, vocab, want, floor, best, tl.where(by_count, 0.0, scale), BLOCK)
            count = _gather(logits_ptr, ids_ptr, vocab, floor, BLOCK)
            end = tl.where(count <= BLOCK, 0, vocab)
            if end == 0:
                tl.debug_barrier()
                ids = tl.load(ids_ptr + offs, mask=offs < count, other=0)
                tile = _clean(tl.load(logits_ptr + ids, mask=offs < count, other=float("-inf")))
            for by_mass in range(tl.where(by_count, 0, 1), tl.where(top_p < 1, 2, 1)):
                if by_count & (by_mass == 1):
                    mass = _mass(tile, logits_ptr, end, vocab, best, scale, floor, 0.0, CHUNKS, BLOCK)
                    want = top_p * tl.sum(mass, 0)
                floor = _threshold(tile, logits_ptr, end, vocab, want, floor, best, scale * by_mass, BLOCK)
        mass = _mass(tile, logits_ptr, end, vocab, best, scale, floor, min_p, CHUNKS, BLOCK)
        token = _first(mass, tile, logits_ptr, vocab, tl.load(uniform_ptr + row), best, scale, floor, min_p, CHUNKS,
                       BLOCK)
        if end == 0:
            token = tl.load(ids_ptr + token)
    tl.store(out_ptr + row, token.to(tl.int64))


@sample.backend("triton")
def launch(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocab))
        ids = torch.empty((rows, block), dtype=torch.int32, device=logits.device)
        _sample_kernel[(rows,)](out, logits, temperature, top_k, top_p, min_p, uniform, ids, logits.stride(0), vocab,
                                CHUNKS=triton.next_power_of_2(triton.cdiv(vocab, block)), BLOCK=block,
                                num_warps=num_warps(block // 4))
    return out
