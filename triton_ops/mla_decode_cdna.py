"""mla_decode's kernel for CDNA.

The trick: latent columns lie in bands, one per wave: each wave adds its band's part of the scores and multiplies its
band of the values, so no two waves load, multiply or hold the same. The price is the scores' sum through LDS. Of 16
heads' queries a wave holds 18 registers, where whole rows take 72. With two stages the next block of latents arrives in
registers meanwhile, and one copy of a block in LDS serves both products; FP8 is converted before it goes to LDS, which
Triton 3.6 cannot do in stages, so that it has one. Whole blocks of keys take neither masks nor clamps.
Tiles of 32 rows take 210 vector registers, so two waves per SIMD; 64 rows would spill or leave one wave. Instructions
per key and 16 heads, of all waves together, are 33 to 51, where SGLang's kernel takes 83 on gfx942 and 62 on gfx950.
Bound by: reading the latents up to 16 heads; the matrix units from about 64 on.
"""

import triton
import triton.language as tl

from wave64.triton_ops.attention import LN_2, LOG2_E, LOWEST, dot, load_pages, narrow
from wave64.triton_ops.mla_decode_common import MAX_NEW, STRIDES, rotated, rounded
from wave64.triton_ops.splits import (
    block_rows,
    converted_here,
    find_split,
    page_numbers,
    split_range,
    uniform,
    upcast,
)


@triton.jit
def _attend(q_c, q_r, c, r, seen, EDGE: tl.constexpr, scale, row_max, row_sums, acc, TILE: tl.constexpr):
    """Adds latents c [BANDS, N, C / BANDS] and their rotated parts r to row_max [H], row_sums ([H, N] or [H, 1]; [H, N]
    sums across no lanes) and acc [BANDS, H, C / BANDS], where `seen`; all of them unless EDGE."""
    s = tl.sum(dot(q_c, tl.permute(c, [0, 2, 1]), dot(q_r, tl.permute(r, [0, 2, 1]))), 0) * scale
    if EDGE:
        s = tl.where(seen, s, float("-inf"))
    before, row_max = row_max, tl.maximum(row_max, tl.max(s, 1))
    shrink = tl.exp2(before - row_max)
    p = tl.exp2(s - row_max[:, None])
    if len(row_sums.shape) == 2:
        row_sums = row_sums * shrink[:, None] + p
    else:
        row_sums = row_sums * shrink + tl.sum(p, 1)
    weights = narrow(p, c.dtype, TILE.HALF_UP)
    BANDS: tl.constexpr = TILE.BANDS
    weights = tl.broadcast_to(weights[None], [BANDS, weights.shape[0], weights.shape[1]])
    acc = dot(weights, c, acc * shrink[:, None][None])
    return row_max, row_sums, acc


@triton.jit
def _latents(kv_ptr, rows, offs_c, offs_r, dtype: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """(c, r): the latents at kv_ptr + rows, without and with rotation, in dtype."""
    if SHAPE.RANK < TILE.BLOCK_C:
        c = tl.load(kv_ptr + rows + offs_c, mask=offs_c < SHAPE.RANK, other=0.0)
    else:
        c = tl.load(kv_ptr + rows + offs_c)
    if SHAPE.ROPE < TILE.BLOCK_R:
        r = tl.load(kv_ptr + SHAPE.RANK + rows + offs_r, mask=offs_r < SHAPE.ROPE, other=0.0)
    else:
        r = tl.load(kv_ptr + SHAPE.RANK + rows + offs_r)
    if kv_ptr.dtype.element_ty != dtype:
        c = converted_here(upcast(c, dtype, TILE.HALF_UP), True)
        r = converted_here(upcast(r, dtype, TILE.HALF_UP), True)
    return c, r


@triton.jit
def _edge(kv_ptr, table_ptr, block, end, limit, stride_kp, stride_kn, offs_c, offs_r, dtype: tl.constexpr,
          CAUSAL: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """(c, r, seen) of a block with keys beyond `end`, or, if CAUSAL, beyond a row's `limit`."""
    offs_n = block + tl.arange(0, TILE.BLOCK_N)
    valid_n = tl.minimum(offs_n, end - 1)
    pages = load_pages(table_ptr, block, valid_n, SHAPE.PAGE_SIZE, TILE.BLOCK_N, SHAPE.WIDE)
    rows = (pages * stride_kp + valid_n % SHAPE.PAGE_SIZE * stride_kn) * SHAPE.UNIT
    c, r = _latents(kv_ptr, rows[None, :, None], offs_c, offs_r, dtype, SHAPE, TILE)
    seen = (offs_n < end)[None, :]
    if CAUSAL:
        seen &= offs_n[None, :] < limit[:, None]
    return c, r, seen


@triton.jit(do_not_specialize=["num_seqs", "capacity", "programs", "min_keys", *STRIDES])
def _mla_decode_cdna_kernel(outputs, queries, cache, new, scale, num_seqs, capacity, programs, min_keys, stride_qb,
                            stride_qt, stride_qh, stride_pb, stride_pt, stride_ph, stride_kp, stride_kn, stride_cb,
                            stride_ct, stride_rb, stride_rt, stride_tb, SHAPE: tl.constexpr, TILE: tl.constexpr):
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
    BANDS: tl.constexpr = TILE.BANDS
    XCDS: tl.constexpr = TILE.XCDS
    APART: tl.constexpr = NEW if FUSED else 0  # new tokens are not among the keys that are split
    BAND_C: tl.constexpr = TILE.BLOCK_C // BANDS
    BAND_R: tl.constexpr = TILE.BLOCK_R // BANDS
    kv_ptr = cache.kv_ptr
    item, tile = tl.program_id(1), tl.program_id(0)
    if XCDS > 1:  # programs go to chiplets in turn: those of one item go to one, and share its cache
        number = item * tl.num_programs(0) + tile
        tile = number // XCDS % tl.num_programs(0)
        item = number // (XCDS * tl.num_programs(0)) * XCDS + number % XCDS
    seq, first_item, keys, num_splits = find_split(item, cache.seq_lens_ptr, num_seqs, capacity, -1, programs, min_keys,
                                                   APART, TILE.BLOCK_B, TILE.ONE_BLOCK_B)
    seq, first_item = uniform(seq, True), uniform(first_item, True)
    keys, num_splits = uniform(keys, True), uniform(num_splits, True)
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
    # Columns lie along the first and the last dimension, rows along the second.
    band = tl.arange(0, BANDS)[:, None, None]
    offs_c = band * BAND_C + tl.arange(0, BAND_C)[None, None, :]
    offs_r = band * BAND_R + tl.arange(0, BAND_R)[None, None, :]
    mask_c, mask_r = offs_c < RANK, offs_r < ROPE
    mask_q = mask_h[None, :, None]
    q_ptr = queries.q_ptr + (seq * stride_qb + token * stride_qt + head * stride_qh)[None, :, None] * UNIT
    q_pe_ptr = queries.q_pe_ptr + (seq * stride_pb + token * stride_pt + head * stride_ph)[None, :, None] * UNIT
    q_c = tl.load(q_ptr + offs_c, mask=mask_q & mask_c, other=0.0)
    if FUSED:
        position = tl.load(new.positions_ptr + seq * NEW + token, mask=mask_h, other=0).to(tl.int64)
        q_r = rotated(q_pe_ptr, offs_r, mask_q & mask_r, new.angles_ptr + position[None, :, None] * ROPE,
                      mask_q & mask_r, SHAPE.NEOX, ROPE).to(q_c.dtype)
    else:
        q_r = tl.load(q_pe_ptr + offs_r, mask=mask_q & mask_r, other=0.0)
    factor = 1.0
    if cache.kv_scale_ptr is not None:
        factor = tl.load(cache.kv_scale_ptr)
    scale *= factor * LOG2_E
    limit = keys - NEW + 1 + token  # keys that a row attends to, unless FUSED

    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    row_sums = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BANDS, BLOCK_H, BAND_C], tl.float32)
    edge = tl.minimum(end, keys if FUSED else keys - NEW + 1) // BLOCK_N * BLOCK_N
    edge = tl.maximum(edge, start)  # every row attends to all of the blocks before it
    pages = page_numbers(table_ptr, start, edge, PAGE_SIZE, BLOCK_N)
    for block in range(start, edge, BLOCK_N):
        # The next block's pages, so that the loads of latents never wait for them.
        page, following = pages, tl.minimum(block + BLOCK_N, edge - BLOCK_N)
        pages = page_numbers(table_ptr, following, None, PAGE_SIZE, BLOCK_N)
        base, rows = block_rows(kv_ptr, page, block, stride_kp, stride_kn, UNIT, PAGE_SIZE, BLOCK_N, SHAPE.WIDE)
        c, r = _latents(base, rows[None, :, None], offs_c, offs_r, q_c.dtype, SHAPE, TILE)
        row_max, row_sums, acc = _attend(q_c, q_r, c, r, True, False, scale, row_max, row_sums, acc, TILE)
    for i in tl.static_range((BLOCK_N + (1 if FUSED else NEW) - 2) // BLOCK_N + 1):  # the few that are left
        if edge + i * BLOCK_N < end:
            c, r, seen = _edge(kv_ptr, table_ptr, edge + i * BLOCK_N, end, limit, stride_kp, stride_kn, offs_c, offs_r,
                               q_c.dtype, not FUSED and NEW > 1, SHAPE, TILE)
            row_max, row_sums, acc = _attend(q_c, q_r, c, r, seen, True, scale, row_max, row_sums, acc, TILE)
    row_sum = tl.sum(row_sums, 1)

    if FUSED:
        if split == num_splits - 1:
            length = tl.minimum(tl.load(cache.seq_lens_ptr + seq), capacity)
            offs_t = tl.arange(0, MAX_NEW)
            mask_t = offs_t < NEW
            c_ptr = new.kv_c_ptr + (seq * stride_cb + offs_t * stride_ct)[None, :, None] * UNIT
            r_ptr = new.k_pe_ptr + (seq * stride_rb + offs_t * stride_rt)[None, :, None] * UNIT
            mask_new = mask_t[None, :, None]
            position_t = tl.load(new.positions_ptr + seq * NEW + offs_t, mask=mask_t, other=0).to(tl.int64)
            new_c = tl.load(c_ptr + offs_c, mask=mask_new & mask_c, other=0.0)
            new_r = rotated(r_ptr, offs_r, mask_new & mask_r, new.angles_ptr + position_t[None, :, None] * ROPE,
                            mask_new & mask_r, SHAPE.NEOX, ROPE).to(q_c.dtype)
            new_c = rounded(new_c, factor, kv_ptr.dtype.element_ty, SHAPE.LIMIT)
            new_r = rounded(new_r, factor, kv_ptr.dtype.element_ty, SHAPE.LIMIT)
            slot = tl.load(new.slots_ptr + seq * NEW + offs_t, mask=mask_t, other=-1)
            kept = (tl.where(tile == 0, slot, -1) >= 0)[None, :, None]
            rows_ptr = kv_ptr + (slot // PAGE_SIZE * stride_kp + slot % PAGE_SIZE * stride_kn)[None, :, None] * UNIT
            tl.store(rows_ptr + offs_c, new_c, mask=kept & mask_c)
            tl.store(rows_ptr + RANK + offs_r, new_r, mask=kept & mask_r)
            seen_t = (mask_t & (length - NEW + offs_t >= 0))[None, :] & (offs_t[None, :] <= token[:, None])
            row_max, row_sum, acc = _attend(q_c, q_r, new_c.to(q_c.dtype), new_r.to(q_c.dtype), seen_t, True, scale,
                                            row_max, row_sum, acc, TILE)
    acc *= factor

    num_rows: tl.constexpr = SHAPE.HEADS * NEW
    if num_splits == 1:
        divisor = tl.where(row_sum > 0, row_sum, 1)
        offs_o = ((seq * num_rows + row) * RANK)[None, :, None]
        out_ptr, lse_ptr = outputs.out_ptr, outputs.lse_ptr
        tl.store(out_ptr + offs_o + offs_c, (acc / divisor[None, :, None]).to(out_ptr.dtype.element_ty),
                 mask=mask_q & mask_c)
        if lse_ptr is not None:
            lse = tl.where(row_sum > 0, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
            tl.store(lse_ptr + seq * num_rows + row, lse, mask=mask_h)
    else:
        offs_i = item.to(tl.int64) * num_rows + row
        tl.store(outputs.partial_ptr + (offs_i * RANK)[None, :, None] + offs_c, acc, mask=mask_q & mask_c)
        tl.store(outputs.stats_ptr + offs_i * 2, row_max, mask=mask_h)
        tl.store(outputs.stats_ptr + offs_i * 2 + 1, row_sum, mask=mask_h)
