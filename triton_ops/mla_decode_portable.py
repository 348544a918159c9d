"""mla_decode's kernel for architectures other than CDNA.

The trick: a block of latents is loaded once and serves as key and as value, for all heads of a tile. With few heads the
operands are swapped (S' = K Q', O' = V' P'), so that keys and latent columns, not 16 heads, are the rows that waves
divide among them. SWAP stays a mode: what it changes is where each operand lies, in a dozen places, and a third copy of
the rest would have to be kept equal.
Bound by: reading the latents up to 16 heads; the matrix units from about 64 on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from wave64.triton_ops.attention import LN_2, LOG2_E, LOWEST, dot, load_pages, narrow
from wave64.triton_ops.mla_decode_common import MAX_NEW, STRIDES, rotated, rounded
from wave64.triton_ops.splits import find_split, split_range, upcast


@triton.jit
def _attend(q_c, q_r, c, r, seen, scale, row_max, row_sums, acc, SWAP: tl.constexpr, HALF_UP: tl.constexpr):
    """Adds latents c [N, C] and their rotated parts r [N, R] to row_max [H], row_sums and acc, where `seen`. That is
    [N, H] if SWAP, else [H, N], or broadcasts to it; row_sums has that shape (and sums across no lanes), or is [H];
    acc is [C, H] if SWAP, else [H, C]."""
    if SWAP:
        s = dot(c, q_c, dot(r, q_r)) * scale
    else:
        s = dot(q_c, tl.trans(c), dot(q_r, tl.trans(r))) * scale
    s = tl.where(seen, s, float("-inf"))
    before, row_max = row_max, tl.maximum(row_max, tl.max(s, 0 if SWAP else 1))
    shrink = tl.exp2(before - row_max)
    p = tl.exp2(s - (row_max[None, :] if SWAP else row_max[:, None]))
    shrinks = shrink[None, :] if SWAP else shrink[:, None]
    if len(row_sums.shape) == 2:
        row_sums = row_sums * shrinks + p
    else:
        row_sums = row_sums * shrink + tl.sum(p, 0 if SWAP else 1)
    weights = narrow(p, c.dtype, HALF_UP)
    if SWAP:
        acc = dot(tl.trans(c), weights, acc * shrinks)
    else:
        acc = dot(weights, c, acc * shrinks)
    return row_max, row_sums, acc


@triton.jit(do_not_specialize=["num_seqs", "capacity", "programs", "min_keys", *STRIDES])
def _mla_decode_portable_kernel(outputs, queries, cache, new, scale, num_seqs, capacity, programs, min_keys, stride_qb,
                                stride_qt, stride_qh, stride_pb, stride_pt, stride_ph, stride_kp, stride_kn, stride_cb,
                                stride_ct, stride_rb, stride_rt, stride_tb, SHAPE: tl.constexpr, TILE: tl.constexpr,
                                SWAP: tl.constexpr):
    """One program: BLOCK_H rows (heads of new tokens) of one sequence, one split of its keys.

    new: None, or the NEW newest tokens, which are rotated with the queries and stored by the program of the last split.
    """
    FUSED: tl.constexpr = new is not None
    NEW: tl.constexpr = SHAPE.NEW
    RANK: tl.constexpr = SHAPE.RANK
    ROPE: tl.constexpr = SHAPE.ROPE
    UNIT: tl.constexpr = SHAPE.UNIT
    PAGE_SIZE: tl.constexpr = SHAPE.PAGE_SIZE
    BLOCK_H: tl.constexpr = TILE.BLOCK_H
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_C: tl.constexpr = TILE.BLOCK_C  # a name for what shapes hold: Triton 3.6 takes no field of a tuple there
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    APART: tl.constexpr = NEW if FUSED else 0  # new tokens are not among the keys that are split
    kv_ptr = cache.kv_ptr
    item, tile = tl.program_id(1), tl.program_id(0)
    seq, first_item, keys, num_splits = find_split(item, cache.seq_lens_ptr, num_seqs, capacity, -1, programs, min_keys,
                                                   APART, TILE.BLOCK_B, TILE.ONE_BLOCK_B)
    if TILE.OVERLAP:
        gdc_launch_dependents()
    if seq >= num_seqs:
        return
    split = item - first_item
    start, end = split_range(split, num_splits, 0, tl.cdiv(keys, BLOCK_N), BLOCK_N)
    end = tl.minimum(end, keys)

    seq = seq.to(tl.int64)
    table_ptr = cache.table_ptr + seq * stride_tb
    row = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    token, head = row // SHAPE.HEADS, row % SHAPE.HEADS
    mask_h = row < SHAPE.HEADS * NEW
    column = tl.arange(0, BLOCK_C)
    offs_c, offs_r = column[None, :], tl.arange(0, BLOCK_R)[None, :]
    mask_c, mask_r = offs_c < RANK, offs_r < ROPE
    mask_q = mask_h[:, None]
    q_ptr = queries.q_ptr + (seq * stride_qb + token * stride_qt + head * stride_qh)[:, None] * UNIT
    q_pe_ptr = queries.q_pe_ptr + (seq * stride_pb + token * stride_pt + head * stride_ph)[:, None] * UNIT
    q_c = tl.load(q_ptr + offs_c, mask=mask_q & mask_c, other=0.0)
    if FUSED:
        position = tl.load(new.positions_ptr + seq * NEW + token, mask=mask_h, other=0).to(tl.int64)
        q_r = rotated(q_pe_ptr, offs_r, mask_q & mask_r, new.angles_ptr + position[:, None] * ROPE, mask_q & mask_r,
                      SHAPE.NEOX, ROPE).to(q_c.dtype)
    else:
        q_r = tl.load(q_pe_ptr + offs_r, mask=mask_q & mask_r, other=0.0)
    factor = 1.0
    if cache.kv_scale_ptr is not None:
        factor = tl.load(cache.kv_scale_ptr)
    scale *= factor * LOG2_E
    limit = keys - NEW + 1 + token  # keys that a row attends to, unless FUSED

    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    if SWAP:
        q_c, q_r = tl.trans(q_c), tl.trans(q_r)
        row_sums = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    else:
        row_sums = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for block in range(start, end, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        valid_n = tl.minimum(offs_n, end - 1)
        pages = load_pages(table_ptr, block, valid_n, PAGE_SIZE, BLOCK_N, SHAPE.WIDE)
        rows = ((pages * stride_kp + valid_n % PAGE_SIZE * stride_kn) * UNIT)[:, None]
        if RANK < BLOCK_C:
            c = tl.load(kv_ptr + rows + offs_c, mask=mask_c, other=0.0)
        else:
            c = tl.load(kv_ptr + rows + offs_c)
        if ROPE < BLOCK_R:
            r = tl.load(kv_ptr + RANK + rows + offs_r, mask=mask_r, other=0.0)
        else:
            r = tl.load(kv_ptr + RANK + rows + offs_r)
        if kv_ptr.dtype.element_ty != q_c.dtype:
            c, r = upcast(c, q_c.dtype, TILE.HALF_UP), upcast(r, q_c.dtype, TILE.HALF_UP)
        seen = (offs_n < end)[:, None] if SWAP else (offs_n < end)[None, :]
        if not FUSED and NEW > 1:
            seen &= offs_n[:, None] < limit[None, :] if SWAP else offs_n[None, :] < limit[:, None]
        row_max, row_sums, acc = _attend(q_c, q_r, c, r, seen, scale, row_max, row_sums, acc, SWAP, TILE.HALF_UP)
    row_sum = tl.sum(row_sums, 0 if SWAP else 1)

    if FUSED:
        if split == num_splits - 1:
            length = tl.minimum(tl.load(cache.seq_lens_ptr + seq), capacity)
            offs_t = tl.arange(0, MAX_NEW)
            mask_t = offs_t < NEW
            c_ptr = new.kv_c_ptr + (seq * stride_cb + offs_t * stride_ct)[:, None] * UNIT
            r_ptr = new.k_pe_ptr + (seq * stride_rb + offs_t * stride_rt)[:, None] * UNIT
            mask_new = mask_t[:, None]
            position_t = tl.load(new.positions_ptr + seq * NEW + offs_t, mask=mask_t, other=0).to(tl.int64)
            new_c = tl.load(c_ptr + offs_c, mask=mask_new & mask_c, other=0.0)
            new_r = rotated(r_ptr, offs_r, mask_new & mask_r, new.angles_ptr + position_t[:, None] * ROPE,
                            mask_new & mask_r, SHAPE.NEOX, ROPE).to(q_c.dtype)
            new_c = rounded(new_c, factor, kv_ptr.dtype.element_ty, SHAPE.LIMIT)
            new_r = rounded(new_r, factor, kv_ptr.dtype.element_ty, SHAPE.LIMIT)
            slot = tl.load(new.slots_ptr + seq * NEW + offs_t, mask=mask_t, other=-1)
            kept = (tl.where(tile == 0, slot, -1) >= 0)[:, None]
            rows_ptr = kv_ptr + (slot // PAGE_SIZE * stride_kp + slot % PAGE_SIZE * stride_kn)[:, None] * UNIT
            tl.store(rows_ptr + offs_c, new_c, mask=kept & mask_c)
            tl.store(rows_ptr + RANK + offs_r, new_r, mask=kept & mask_r)
            there = mask_t & (length - NEW + offs_t >= 0)
            if SWAP:
                seen_t = there[:, None] & (offs_t[:, None] <= token[None, :])
            else:
                seen_t = there[None, :] & (offs_t[None, :] <= token[:, None])
            row_max, row_sum, acc = _attend(q_c, q_r, new_c.to(q_c.dtype), new_r.to(q_c.dtype), seen_t, scale, row_max,
                                            row_sum, acc, SWAP, TILE.HALF_UP)
    acc *= factor

    num_rows: tl.constexpr = SHAPE.HEADS * NEW
    if SWAP:
        mask_o = mask_h[None, :] & (column < RANK)[:, None]
    else:
        mask_o = mask_q & mask_c
    if num_splits == 1:
        divisor = tl.where(row_sum > 0, row_sum, 1)
        offs_o = (seq * num_rows + row) * RANK
        out_ptr, lse_ptr = outputs.out_ptr, outputs.lse_ptr
        if SWAP:
            tl.store(out_ptr + offs_o[None, :] + column[:, None],
                     (acc / divisor[None, :]).to(out_ptr.dtype.element_ty), mask=mask_o)
        else:
            tl.store(out_ptr + offs_o[:, None] + offs_c, (acc / divisor[:, None]).to(out_ptr.dtype.element_ty),
                     mask=mask_o)
        if lse_ptr is not None:
            lse = tl.where(row_sum > 0, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
            tl.store(lse_ptr + seq * num_rows + row, lse, mask=mask_h)
    else:
        offs_i = item.to(tl.int64) * num_rows + row
        if SWAP:
            tl.store(outputs.partial_ptr + (offs_i * RANK)[None, :] + column[:, None], acc, mask=mask_o)
        else:
            tl.store(outputs.partial_ptr + (offs_i * RANK)[:, None] + offs_c, acc, mask=mask_o)
        tl.store(outputs.stats_ptr + offs_i * 2, row_max, mask=mask_h)
        tl.store(outputs.stats_ptr + offs_i * 2 + 1, row_sum, mask=mask_h)
