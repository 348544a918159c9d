"""What mla_decode's kernels share: arguments, loads of queries and latents, the append of new tokens, the results.

The kernels take their arguments as NamedTuples and read the fields by name. Strides and the fields of a Split are plain
arguments: Triton would specialize every integer of a tuple on its value, and compile a kernel for each.

Columns of latents lie along the last axis of a tile: offs_c is [1, C] and rows come first, or, on CDNA, [BANDS, 1,
C / BANDS] with rows in the middle. Only in the portable kernel's swapped result are they first, [C, 1].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.quant import FP8
from wave64.triton_ops.attention import LN_2, is_wide, tile_width, unit_of
from wave64.triton_ops.splits import Split, converted_here, length_blocks, upcast

#: New tokens per sequence that are loaded at once: the minimum of a matrix instruction.
MAX_NEW = tl.constexpr(16)
#: In units of UNIT elements, so that kernels need not be specialized on their values.
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
    """The newest tokens, which are not in the cache yet: the kernel applies RoPE to them and writes them."""

    kv_c_ptr: Tensor    # [B, NEW, RANK]
    k_pe_ptr: Tensor    # [B, NEW, ROPE]
    slots_ptr: Tensor
    positions_ptr: Tensor
    angles_ptr: Tensor  # cos_sin_cache [max_position, ROPE]: cos, then sin


class Shape(NamedTuple):
    """Compile-time constants of the problem."""

    HEADS: int
    NEW: int            # tokens per sequence that attend, the newest ones
    RANK: int
    ROPE: int
    PAGE_SIZE: int
    UNIT: int           # elements per unit of the strides
    WIDE: bool          # the pool has 2 GiB or more: 64-bit offsets
    NEOX: bool
    LIMIT: float        # largest value of an FP8 cache; 0: the cache is not FP8


class Tile(NamedTuple):
    """Compile-time constants of the tiling."""

    BLOCK_H: int
    BLOCK_N: int
    BLOCK_C: int        # columns of kv_c, padded to a power of 2
    BLOCK_R: int        # columns of k_pe, padded to a power of 2
    BLOCK_B: int
    ONE_BLOCK_B: bool
    BANDS: int          # bands of columns, one per wave (CDNA); 0: the portable kernel
    HALF_UP: bool       # see attention.round_weights
    XCDS: int           # chiplets that programs are assigned to round robin (CDNA)
    OVERLAP: bool       # launch the merge early (Hopper)


class Call(NamedTuple):
    """Arguments of a launch, as mla_decode and mla_decode_rope pass them."""

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
        new_strides = (*new.kv_c_ptr.stride()[:2], *new.k_pe_ptr.stride()[:2]) if new else (0, 0, 0, 0)
        return [*q.stride()[:3], *q_pe.stride()[:3], *kv.stride()[:2], *new_strides]


def arguments(outputs: Outputs, call: Call, split: Split, config, block_h: int, xcds: int = 1) -> tuple:
    """The positional arguments of the CDNA and of the portable kernel; the latter also takes SWAP."""
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
    """Load columns offs_r of the rows at x_ptr and apply RoPE with the angles at angles_ptr, in fp32. Each column loads
    its partner itself, so lanes exchange nothing. hopper/mla_decode.py calls this, too, in Gluon's layouts."""
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
    """x in the cache's dtype: for FP8 (LIMIT > 0) divided by the cache's scale and saturated."""
    if LIMIT > 0:
        x = tl.clamp(x.to(tl.float32) / factor, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def along_rows(x, offs_c):
    """x [rows], expanded to broadcast against the columns offs_c; see the head of this file."""
    if len(offs_c.shape) == 3:
        x = x[None, :, None]
    elif offs_c.shape[0] == 1:
        x = x[:, None]
    else:
        x = x[None, :]
    return x


@triton.jit
def load_queries(q_ptr, q_pe_ptr, positions_ptr, angles_ptr, seq, row, offs_c, offs_r, stride_qb, stride_qt, stride_qh,
                 stride_pb, stride_pt, stride_ph, SHAPE: tl.constexpr):
    """(q_nope, q_pe) of the rows (heads of new tokens) of sequence `seq`. q_pe is rotated here, unless positions_ptr is
    None."""
    token, head = row // SHAPE.HEADS, row % SHAPE.HEADS
    mask_h = row < SHAPE.HEADS * SHAPE.NEW
    mask_q = along_rows(mask_h, offs_c)
    mask_r = mask_q & (offs_r < SHAPE.ROPE)
    q_ptr += along_rows(seq * stride_qb + token * stride_qt + head * stride_qh, offs_c) * SHAPE.UNIT
    q_pe_ptr += along_rows(seq * stride_pb + token * stride_pt + head * stride_ph, offs_c) * SHAPE.UNIT
    q_c = tl.load(q_ptr + offs_c, mask=mask_q & (offs_c < SHAPE.RANK), other=0.0)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + seq * SHAPE.NEW + token, mask=mask_h, other=0).to(tl.int64)
        q_r = rotated(q_pe_ptr, offs_r, mask_r, angles_ptr + along_rows(position, offs_c) * SHAPE.ROPE, mask_r,
                      SHAPE.NEOX, SHAPE.ROPE).to(q_c.dtype)
    else:
        q_r = tl.load(q_pe_ptr + offs_r, mask=mask_r, other=0.0)
    return q_c, q_r


@triton.jit
def load_latents(kv_ptr, rows, offs_c, offs_r, dtype: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """(kv_c, k_pe) of the latents at kv_ptr + rows, converted to dtype."""
    if SHAPE.RANK < TILE.BLOCK_C:
        c = tl.load(kv_ptr + rows + offs_c, mask=offs_c < SHAPE.RANK, other=0.0)
    else:
        c = tl.load(kv_ptr + rows + offs_c)
    if SHAPE.ROPE < TILE.BLOCK_R:
        r = tl.load(kv_ptr + SHAPE.RANK + rows + offs_r, mask=offs_r < SHAPE.ROPE, other=0.0)
    else:
        r = tl.load(kv_ptr + SHAPE.RANK + rows + offs_r)
    if kv_ptr.dtype.element_ty != dtype:
        c = converted_here(upcast(c, dtype, TILE.HALF_UP), TILE.BANDS > 0)
        r = converted_here(upcast(r, dtype, TILE.HALF_UP), TILE.BANDS > 0)
    return c, r


@triton.jit
def append_new(kv_ptr, kv_c_ptr, k_pe_ptr, slots_ptr, positions_ptr, angles_ptr, seq, tile, kv_scale, offs_c, offs_r,
               stride_kp, stride_kn, stride_cb, stride_ct, stride_rb, stride_rt, dtype: tl.constexpr,
               SHAPE: tl.constexpr):
    """Apply RoPE to the k_pe of the sequence's new tokens; the program of tile 0 writes [kv_c, k_pe] to the cache.
    Returns (kv_c, k_pe) [MAX_NEW rows] as the cache holds them, in its dtype. dtype: that of the queries."""
    offs_t = tl.arange(0, MAX_NEW)
    mask_t = offs_t < SHAPE.NEW
    c_ptr = kv_c_ptr + along_rows(seq * stride_cb + offs_t * stride_ct, offs_c) * SHAPE.UNIT
    r_ptr = k_pe_ptr + along_rows(seq * stride_rb + offs_t * stride_rt, offs_c) * SHAPE.UNIT
    mask_new = along_rows(mask_t, offs_c)
    mask_c, mask_r = offs_c < SHAPE.RANK, offs_r < SHAPE.ROPE
    position = tl.load(positions_ptr + seq * SHAPE.NEW + offs_t, mask=mask_t, other=0).to(tl.int64)
    new_c = tl.load(c_ptr + offs_c, mask=mask_new & mask_c, other=0.0)
    new_r = rotated(r_ptr, offs_r, mask_new & mask_r, angles_ptr + along_rows(position, offs_c) * SHAPE.ROPE,
                    mask_new & mask_r, SHAPE.NEOX, SHAPE.ROPE).to(dtype)
    new_c = rounded(new_c, kv_scale, kv_ptr.dtype.element_ty, SHAPE.LIMIT)
    new_r = rounded(new_r, kv_scale, kv_ptr.dtype.element_ty, SHAPE.LIMIT)
    slot = tl.load(slots_ptr + seq * SHAPE.NEW + offs_t, mask=mask_t, other=-1)
    stored = along_rows(tl.where(tile == 0, slot, -1) >= 0, offs_c)
    rows = slot // SHAPE.PAGE_SIZE * stride_kp + slot % SHAPE.PAGE_SIZE * stride_kn
    rows_ptr = kv_ptr + along_rows(rows, offs_c) * SHAPE.UNIT
    tl.store(rows_ptr + offs_c, new_c, mask=stored & mask_c)
    tl.store(rows_ptr + SHAPE.RANK + offs_r, new_r, mask=stored & mask_r)
    return new_c, new_r


@triton.jit
def store_split(out_ptr, lse_ptr, partial_ptr, stats_ptr, item, num_splits, seq, row, row_max, row_sum, acc, offs_c,
                SHAPE: tl.constexpr):
    """Store the result of a split: out and lse if the sequence has no other, else its partial result."""
    num_rows: tl.constexpr = SHAPE.HEADS * SHAPE.NEW
    mask_h = row < num_rows
    mask = along_rows(mask_h, offs_c) & (offs_c < SHAPE.RANK)
    if num_splits == 1:
        divisor = tl.where(row_sum > 0, row_sum, 1)
        rows_ptr = out_ptr + along_rows((seq * num_rows + row) * SHAPE.RANK, offs_c)
        tl.store(rows_ptr + offs_c, (acc / along_rows(divisor, offs_c)).to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            lse = tl.where(row_sum > 0, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
            tl.store(lse_ptr + seq * num_rows + row, lse, mask=mask_h)
    else:
        offs_i = item.to(tl.int64) * num_rows + row
        tl.store(partial_ptr + along_rows(offs_i * SHAPE.RANK, offs_c) + offs_c, acc, mask=mask)
        tl.store(stats_ptr + offs_i * 2, row_max, mask=mask_h)
        tl.store(stats_ptr + offs_i * 2 + 1, row_sum, mask=mask_h)
