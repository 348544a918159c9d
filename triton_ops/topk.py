"""What the gates of experts share: the largest numbers of a row, by rounds of maxima.

The trick: a row stays in one wave's registers, as integers in the order of the numbers. A round is two reductions of
32-bit integers, a dozen instructions for AMD's waves (a bitonic sort of 256 takes as many as eight rounds) and one for
Hopper's; where the numbers are bf16, which leave room for the index in the lower half, it is one reduction.
Bound by the latency of the rounds.
"""

import triton
import triton.language as tl

from wave64.ops.topk_softmax import LIMIT

LARGEST = tl.constexpr(LIMIT)
LOG2_E = tl.constexpr(1.4426950408889634)
#: Below the integer of any number, -inf among them.
LOWEST = tl.constexpr(-(2**31))
#: Behind any index.
BEHIND = tl.constexpr(2**31 - 1)
#: Indices that have room besides a bf16 number.
INDICES = tl.constexpr(2**16)


@triton.jit
def clean(x):
    """fp32 within the limit, NaN as the lowest."""
    x = x.to(tl.float32)
    return tl.minimum(tl.maximum(tl.where(x == x, x, -LARGEST), -LARGEST), LARGEST)


@triton.jit
def _sortable(x):
    """Integers in the order of the fp32 x, none of them NaN; zeros of both signs are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choose(x, ids, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BF16: tl.constexpr):
    """ids [BLOCK_K] of the TOP_K largest of x, largest first and of equals the lower id; then zeros. At least TOP_K
    of x are above -inf, which is never chosen. BF16: the numbers are bf16 and -inf, the ids below INDICES."""
    key = _sortable(x)
    if BF16:
        key = (key & -INDICES) | (INDICES - 1 - ids)
    offs_k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for j in range(TOP_K):
        best = tl.max(key, 0)
        if BF16:
            first = INDICES - 1 - (best & (INDICES - 1))
            key = tl.where(key == best, LOWEST, key)
        else:
            first = tl.min(tl.where(key == best, ids, BEHIND), 0)
            key = tl.where(ids == first, LOWEST, key)
        chosen = tl.where(offs_k == j, first, chosen)
    return chosen
