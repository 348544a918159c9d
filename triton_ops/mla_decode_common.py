"""What mla_decode's kernels share: their arguments, rotation, and rounding to the cache's dtype.

Arguments come as NamedTuples, whose fields keep their names in a kernel. Strides and the fields of a Split come one by
one: Triton specializes every integer of a tuple on its value, and none of these is worth another compilation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.quant import FP8
from wave64.triton_ops.attention import is_wide, tile_width, unit_of
from wave64.triton_ops.splits import Split, length_blocks

#: New tokens per sequence that are loaded at once: the fewest that a matrix instruction takes.
MAX_NEW = tl.constexpr(16)
#: In units of UNIT elements, which says all that a kernel can know of them.
STRIDES = ["stride_qb", "stride_qt", "stride_qh", "stride_pb", "stride_pt", "stride_ph", "stride_kp", "stride_kn",
           "stride_cb", "stride_ct", "stride_rb", "stride_rt", "stride_tb"]


class Outputs(NamedTuple):
    out_ptr: Tensor
    lse_ptr: Tensor | None
    partial_ptr: Tensor
    stats_ptr: Tensor


class Queries(NamedTuple):
    q_ptr: Tensor       # [B, NEW, HEADS, RANK]
    q_pe_ptr: Tensor    # [B, NEW, HEADS, ROPE]


class Cache(NamedTuple):
    kv_ptr: Tensor
    table_ptr: Tensor
    seq_lens_ptr: Tensor
    kv_scale_ptr: Tensor | None


class NewTokens(NamedTuple):
    """The newest tokens where they are not in the cache yet: the kernel rotates and stores them."""

    kv_c_ptr: Tensor    # [B, NEW, RANK]
    k_pe_ptr: Tensor    # [B, NEW, ROPE]
    slots_ptr: Tensor
    positions_ptr: Tensor
    angles_ptr: Tensor  # cos, then sin


class Shape(NamedTuple):
    """Compile-time."""

    HEADS: int
    NEW: int            # tokens per sequence that attend, the newest ones
    RANK: int
    ROPE: int
    PAGE_SIZE: int
    UNIT: int           # elements that strides count in
    WIDE: bool          # the pool has 2 GiB or more
    NEOX: bool
    LIMIT: float        # largest number of an FP8 cache; 0: the cache is not FP8


class Tile(NamedTuple):
    """Compile-time."""

    BLOCK_H: int
    BLOCK_N: int
    BLOCK_C: int        # columns of a latent, and below its rotated part, padded to a power of 2
    BLOCK_R: int
    BLOCK_B: int
    ONE_BLOCK_B: bool
    BANDS: int          # that columns lie in (CDNA)
    HALF_UP: bool       # round weights to bf16 with two instructions, where the architecture has none for it
    XCDS: int           # chiplets that programs go to in turn (CDNA)
    OVERLAP: bool       # let the merge be launched at once (Hopper)


class Call(NamedTuple):
    """Arguments of a launch, as the launchers of mla_decode.py give them."""

    queries: Queries
    cache: Cache
    new: NewTokens | None
    scale: float
    is_neox: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(num_seqs, new, heads, rank)"""
        return tuple(self.queries.q_ptr.shape)

    def strides(self) -> list[int]:
        (q, q_pe), kv, new = self.queries, self.cache.kv_ptr, self.new
        appended = (*new.kv_c_ptr.stride()[:2], *new.k_pe_ptr.stride()[:2]) if new else (0, 0, 0, 0)
        return [*q.stride()[:3], *q_pe.stride()[:3], *kv.stride()[:2], *appended]


def arguments(outputs: Outputs, call: Call, split: Split, config, block_h: int, xcds: int = 1) -> tuple:
    """Of both kernels, positional, but for the portable one's mode."""
    (_, new, heads, rank), rope, kv = call.shape, call.queries.q_pe_ptr.shape[3], call.cache.kv_ptr
    strides = call.strides()
    unit = unit_of(rank, *strides)
    limit = torch.finfo(kv.dtype).max if kv.dtype in FP8.values() else 0.0
    shape = Shape(heads, new, rank, rope, kv.shape[1], unit, is_wide(kv), call.is_neox, limit)
    width = 16 * max(1, config.bands)
    tile = Tile(block_h, config.block_n, max(width, tile_width(rank)), max(width, tile_width(rope)),
                *length_blocks(split.num_seqs, config.block_b), config.bands, config.half_up, xcds, split.overlap)
    return (outputs, call.queries, call.cache, call.new, call.scale, split.num_seqs, split.capacity, split.programs,
            split.min_keys, *(s // unit for s in strides), call.cache.table_ptr.stride(0), shape, tile)


@triton.jit
def rotated(x_ptr, offs_r, mask, angles_ptr, mask_angle, NEOX: tl.constexpr, ROPE: tl.constexpr):
    """Columns offs_r of rows at x_ptr, rotated by the angles at angles_ptr, in fp32. Each column loads its partner
    itself, so lanes exchange nothing."""
    half: tl.constexpr = ROPE // 2
    if NEOX:
        partner = tl.where(offs_r < half, offs_r + half, offs_r - half)
        pair = tl.where(offs_r < half, offs_r, offs_r - half)
        first = offs_r < half
    else:
        partner = offs_r ^ 1
        pair = offs_r // 2
        first = offs_r % 2 == 0
    x = tl.load(x_ptr + offs_r, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(angles_ptr + pair, mask=mask_angle, other=0.0).to(tl.float32)
    sin = tl.load(angles_ptr + half + pair, mask=mask_angle, other=0.0).to(tl.float32)
    return x * cos + tl.where(first, -y, y) * sin


@triton.jit
def rounded(x, factor, dtype: tl.constexpr, LIMIT: tl.constexpr):
    """x as the cache stores it: in FP8 (LIMIT > 0) divided by its scale and saturated."""
    if LIMIT > 0:
        x = tl.clamp(x.to(tl.float32) / factor, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)
