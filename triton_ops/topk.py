"""What the expert gates share: top-k of a row, one maximum per round.

The trick: a row stays in the registers of one wave, as integers in the order of the logits. A round is two reductions
of 32-bit integers, a dozen instructions for AMD's waves (a bitonic sort of 256 takes as many as eight rounds) and one
for Hopper's. A bf16 logit leaves the lower 16 bits for its index, and then a round is one reduction.
Bound by the latency of the rounds.
"""

import triton
import triton.language as tl

from wave64.ops.topk_softmax import LIMIT

LARGEST = tl.constexpr(LIMIT)
LOG2_E = tl.constexpr(1.4426950408889634)
#: Below the integer of any logit, -inf included.
MIN_INT = tl.constexpr(-(2**31))
#: Above any index.
MAX_INT = tl.constexpr(2**31 - 1)
#: Indices that fit into 32 bits with a bf16 logit.
MAX_IDS = tl.constexpr(2**16)


@triton.jit
def clean(x):
    """x in fp32, clamped to the limit; NaN becomes the minimum."""
    x = x.to(tl.float32)
    return tl.minimum(tl.maximum(tl.where(x == x, x, -LARGEST), -LARGEST), LARGEST)


@triton.jit
def _sortable(x):
    """Integers in the order of x, fp32 without NaN; 0 and -0 are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choose(x, ids, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BF16: tl.constexpr):
    """ids [BLOCK_K] of the TOP_K largest of x, largest first, lower ids first among equals; padded with zeros. At least
    TOP_K of x must be above -inf, which is never chosen. BF16: x is bf16 or -inf, and ids are below MAX_IDS."""
    key = _sortable(x)
    if BF16:
        key = (key & -MAX_IDS) | (MAX_IDS - 1 - ids)
    offs_k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for j in range(TOP_K):
        best = tl.max(key, 0)
        if BF16:
            first = MAX_IDS - 1 - (best & (MAX_IDS - 1))
            key = tl.where(key == best, MIN_INT, key)
        else:
            first = tl.min(tl.where(key == best, ids, MAX_INT), 0)
            key = tl.where(ids == first, MIN_INT, key)
        chosen = tl.where(offs_k == j, first, chosen)
    return chosen
