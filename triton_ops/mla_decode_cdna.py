"""mla_decode's kernel for CDNA.

The trick: the columns of the latents are split into bands, one per wave. Each wave computes its band's part of the
scores and of the output, so that no two waves load, multiply or hold the same data; the parts of the scores are added
through LDS. A wave holds the queries of 16 heads in 18 registers, where whole rows take 72. With two stages the next
block of latents is loaded to registers meanwhile, and one copy of a block in LDS serves both products. FP8 is converted
before it is stored to LDS, which Triton 3.6 cannot pipeline, so FP8 has one stage. Only a split's last blocks of keys
are masked and clamped.
Tiles of 32 rows take 210 vector registers, so two waves per SIMD; 64 rows would spill or leave one wave. All waves
together execute 33 to 51 instructions per key and 16 heads, where SGLang's kernel takes 83 on gfx942 and 62 on gfx950.
Bound by: reading the latents up to 16 heads; the matrix units from about 64 on.
"""

import triton
import triton.language as tl

from wave64.triton_ops.attention import LOG2_E, LOWEST, dot, load_pages, round_weights
from wave64.triton_ops.mla_decode_common import MAX_NEW, STRIDES, append_new, load_latents, load_queries, store_split
from wave64.triton_ops.splits import block_rows, find_split, page_numbers, split_range


@triton.jit
def _attend(q_c, q_r, c, r, visible, MASKED: tl.constexpr, scale, row_max, row_sums, acc, TILE: tl.constexpr):
    """Online softmax over a block of latents c [BANDS, N, C / BANDS] with k_pe r. Returns the updated row_max [H],
    row_sums ([H, N], which sums across no lanes, or [H]) and acc [BANDS, H, C / BANDS]. MASKED: only keys that are
    `visible` count."""
    s = tl.sum(dot(q_c, tl.permute(c, [0, 2, 1]), dot(q_r, tl.permute(r, [0, 2, 1]))), 0) * scale
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    old_max, row_max = row_max, tl.maximum(row_max, tl.max(s, 1))
    rescale = tl.exp2(old_max - row_max)
    p = tl.exp2(s - row_max[:, None])
    if len(row_sums.shape) == 2:
        row_sums = row_sums * rescale[:, None] + p
    else:
        row_sums = row_sums * rescale + tl.sum(p, 1)
    weights = round_weights(p, c.dtype, TILE.HALF_UP)
    BANDS: tl.constexpr = TILE.BANDS
    weights = tl.broadcast_to(weights[None], [BANDS, weights.shape[0], weights.shape[1]])
    acc = dot(weights, c, acc * rescale[:, None][None])
    return row_max, row_sums, acc


@triton.jit
def _masked_block(kv_ptr, table_ptr, block, end, limit, stride_kp, stride_kn, offs_c, offs_r, dtype: tl.constexpr,
                  CAUSAL: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """(c, r, visible) of a block with keys beyond `end`, or, if CAUSAL, beyond a row's `limit`."""
    offs_n = block + tl.arange(0, TILE.BLOCK_N)
    valid_n = tl.minimum(offs_n, end - 1)
    pages = load_pages(table_ptr, block, valid_n, SHAPE.PAGE_SIZE, TILE.BLOCK_N, SHAPE.WIDE)
    rows = (pages * stride_kp + valid_n % SHAPE.PAGE_SIZE * stride_kn) * SHAPE.UNIT
    c, r = load_latents(kv_ptr, rows[None, :, None], offs_c, offs_r, dtype, SHAPE, TILE)
    visible = (offs_n < end)[None, :]
    if CAUSAL:
        visible &= offs_n[None, :] < limit[:, None]
    return c, r, visible


@triton.jit(do_not_specialize=["num_seqs", "capacity", "programs", "min_keys", *STRIDES])
def _mla_decode_cdna_kernel(outputs, queries, cache, new, scale, num_seqs, capacity, programs, min_keys, stride_qb,
                            stride_qt, stride_qh, stride_pb, stride_pt, stride_ph, stride_kp, stride_kn, stride_cb,
                            stride_ct, stride_rb, stride_rt, stride_tb, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """One program: BLOCK_H rows (heads of new tokens) of one sequence, one split of its keys.

    new: None, or the newest NEW tokens of each sequence. Then the kernel also applies RoPE to q_pe and k_pe, and the
    programs of the last split write the new tokens to the cache.
    """
    FUSED: tl.constexpr = new is not None
    NEW: tl.constexpr = SHAPE.NEW
    UNIT: tl.constexpr = SHAPE.UNIT
    PAGE_SIZE: tl.constexpr = SHAPE.PAGE_SIZE
    BLOCK_H: tl.constexpr = TILE.BLOCK_H
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BANDS: tl.constexpr = TILE.BANDS
    XCDS: tl.constexpr = TILE.XCDS
    UNSPLIT: tl.constexpr = NEW if FUSED else 0  # keys that are not split: new tokens
    BAND_C: tl.constexpr = TILE.BLOCK_C // BANDS
    BAND_R: tl.constexpr = TILE.BLOCK_R // BANDS
    kv_ptr = cache.kv_ptr
    item, tile = tl.program_id(1), tl.program_id(0)
    if XCDS > 1:  # programs are assigned to chiplets round robin: map those of one item to one chiplet and its L2
        number = item * tl.num_programs(0) + tile
        tile = number // XCDS % tl.num_programs(0)
        item = number // (XCDS * tl.num_programs(0)) * XCDS + number % XCDS
    seq, first_item, keys, num_splits = find_split(item, cache.seq_lens_ptr, num_seqs, capacity, -1, programs, min_keys,
                                                   UNSPLIT, TILE.BLOCK_B, TILE.ONE_BLOCK_B, True)
    if seq >= num_seqs:
        return
    split = item - first_item
    start, end = split_range(split, num_splits, 0, tl.cdiv(keys, BLOCK_N), BLOCK_N)
    end = tl.minimum(end, keys)

    seq = seq.to(tl.int64)
    table_ptr = cache.table_ptr + seq * stride_tb
    row = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    token = row // SHAPE.HEADS
    # Columns lie along the first and the last dimension, rows along the second.
    band = tl.arange(0, BANDS)[:, None, None]
    offs_c = band * BAND_C + tl.arange(0, BAND_C)[None, None, :]
    offs_r = band * BAND_R + tl.arange(0, BAND_R)[None, None, :]
    q_c, q_r = load_queries(queries.q_ptr, queries.q_pe_ptr, new.positions_ptr if FUSED else None,
                            new.angles_ptr if FUSED else None, seq, row, offs_c, offs_r, stride_qb, stride_qt,
                            stride_qh, stride_pb, stride_pt, stride_ph, SHAPE)
    kv_scale = 1.0
    if cache.kv_scale_ptr is not None:
        kv_scale = tl.load(cache.kv_scale_ptr)
    scale *= kv_scale * LOG2_E
    limit = keys - NEW + 1 + token  # keys that a row attends to, unless FUSED

    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    row_sums = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BANDS, BLOCK_H, BAND_C], tl.float32)
    first_masked = tl.minimum(end, keys if FUSED else keys - NEW + 1) // BLOCK_N * BLOCK_N
    first_masked = tl.maximum(first_masked, start)  # every row attends to all keys before it
    pages = page_numbers(table_ptr, start, first_masked, PAGE_SIZE, BLOCK_N)
    for block in range(start, first_masked, BLOCK_N):
        # Load the next block's page numbers, so that the loads of latents never wait for them.
        page, next_block = pages, tl.minimum(block + BLOCK_N, first_masked - BLOCK_N)
        pages = page_numbers(table_ptr, next_block, None, PAGE_SIZE, BLOCK_N)
        base, rows = block_rows(kv_ptr, page, block, stride_kp, stride_kn, UNIT, PAGE_SIZE, BLOCK_N, SHAPE.WIDE)
        c, r = load_latents(base, rows[None, :, None], offs_c, offs_r, q_c.dtype, SHAPE, TILE)
        row_max, row_sums, acc = _attend(q_c, q_r, c, r, True, False, scale, row_max, row_sums, acc, TILE)
    for i in tl.static_range((BLOCK_N + (1 if FUSED else NEW) - 2) // BLOCK_N + 1):  # the remaining blocks
        if first_masked + i * BLOCK_N < end:
            c, r, visible = _masked_block(kv_ptr, table_ptr, first_masked + i * BLOCK_N, end, limit, stride_kp,
                                          stride_kn, offs_c, offs_r, q_c.dtype, not FUSED and NEW > 1, SHAPE, TILE)
            row_max, row_sums, acc = _attend(q_c, q_r, c, r, visible, True, scale, row_max, row_sums, acc, TILE)
    row_sum = tl.sum(row_sums, 1)

    if FUSED:
        if split == num_splits - 1:
            length = tl.minimum(tl.load(cache.seq_lens_ptr + seq), capacity)
            new_c, new_r = append_new(kv_ptr, new.kv_c_ptr, new.k_pe_ptr, new.slots_ptr, new.positions_ptr,
                                      new.angles_ptr, seq, tile, kv_scale, offs_c, offs_r, stride_kp, stride_kn,
                                      stride_cb, stride_ct, stride_rb, stride_rt, q_c.dtype, SHAPE)
            offs_t = tl.arange(0, MAX_NEW)
            is_new = (offs_t < NEW) & (length - NEW + offs_t >= 0)
            visible = is_new[None, :] & (offs_t[None, :] <= token[:, None])
            row_max, row_sum, acc = _attend(q_c, q_r, new_c.to(q_c.dtype), new_r.to(q_c.dtype), visible, True, scale,
                                            row_max, row_sum, acc, TILE)
    acc *= kv_scale
    store_split(outputs.out_ptr, outputs.lse_ptr, outputs.partial_ptr, outputs.stats_ptr, item, num_splits, seq, row,
                row_max, row_sum, acc, offs_c, SHAPE)
