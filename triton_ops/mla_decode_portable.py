"""mla_decode's kernel for architectures other than CDNA.

The trick: a block of latents is loaded once and serves as keys and as values, for all heads of a tile. With few heads
the operands are swapped (S^T = K Q^T, O^T = V^T P^T), so that the rows that waves are split over are keys and latent
columns, not 16 heads. SWAP stays a mode: it transposes the operands in a dozen lines, and a third kernel would repeat
all the others.
Bound by: reading the latents up to 16 heads; the matrix units from about 64 on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from wave64.triton_ops.attention import LOG2_E, LOWEST, dot, load_pages, round_weights
from wave64.triton_ops.mla_decode_common import MAX_NEW, STRIDES, append_new, load_latents, load_queries, store_split
from wave64.triton_ops.splits import find_split, split_range


@triton.jit
def _attend(q_c, q_r, c, r, visible, scale, row_max, row_sums, acc, SWAP: tl.constexpr, HALF_UP: tl.constexpr):
    """Online softmax over the `visible` ones of a block of latents c [N, C] with k_pe r [N, R]. Returns the updated
    row_max [H], row_sums and acc. `visible` is, or broadcasts to, [N, H] if SWAP, else [H, N]; row_sums has that shape,
    which sums across no lanes, or is [H]; acc is [C, H] if SWAP, else [H, C]."""
    if SWAP:
        s = dot(c, q_c, dot(r, q_r)) * scale
    else:
        s = dot(q_c, tl.trans(c), dot(q_r, tl.trans(r))) * scale
    s = tl.where(visible, s, float("-inf"))
    old_max, row_max = row_max, tl.maximum(row_max, tl.max(s, 0 if SWAP else 1))
    rescale = tl.exp2(old_max - row_max)
    p = tl.exp2(s - (row_max[None, :] if SWAP else row_max[:, None]))
    rescales = rescale[None, :] if SWAP else rescale[:, None]
    if len(row_sums.shape) == 2:
        row_sums = row_sums * rescales + p
    else:
        row_sums = row_sums * rescale + tl.sum(p, 0 if SWAP else 1)
    weights = round_weights(p, c.dtype, HALF_UP)
    if SWAP:
        acc = dot(tl.trans(c), weights, acc * rescales)
    else:
        acc = dot(weights, c, acc * rescales)
    return row_max, row_sums, acc


@triton.jit(do_not_specialize=["num_seqs", "capacity", "programs", "min_keys", *STRIDES])
def _mla_decode_portable_kernel(outputs, queries, cache, new, scale, num_seqs, capacity, programs, min_keys, stride_qb,
                                stride_qt, stride_qh, stride_pb, stride_pt, stride_ph, stride_kp, stride_kn, stride_cb,
                                stride_ct, stride_rb, stride_rt, stride_tb, SHAPE: tl.constexpr, TILE: tl.constexpr,
                                SWAP: tl.constexpr):
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
    BLOCK_C: tl.constexpr = TILE.BLOCK_C  # Triton 3.6 takes no field of a tuple in a shape
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    UNSPLIT: tl.constexpr = NEW if FUSED else 0  # keys that are not split: new tokens
    kv_ptr = cache.kv_ptr
    item, tile = tl.program_id(1), tl.program_id(0)
    seq, first_item, keys, num_splits = find_split(item, cache.seq_lens_ptr, num_seqs, capacity, -1, programs, min_keys,
                                                   UNSPLIT, TILE.BLOCK_B, TILE.ONE_BLOCK_B, False)
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
    token = row // SHAPE.HEADS
    column = tl.arange(0, BLOCK_C)
    offs_c, offs_r = column[None, :], tl.arange(0, BLOCK_R)[None, :]
    q_c, q_r = load_queries(queries.q_ptr, queries.q_pe_ptr, new.positions_ptr if FUSED else None,
                            new.angles_ptr if FUSED else None, seq, row, offs_c, offs_r, stride_qb, stride_qt,
                            stride_qh, stride_pb, stride_pt, stride_ph, SHAPE)
    kv_scale = 1.0
    if cache.kv_scale_ptr is not None:
        kv_scale = tl.load(cache.kv_scale_ptr)
    scale *= kv_scale * LOG2_E
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
        c, r = load_latents(kv_ptr, rows, offs_c, offs_r, q_c.dtype, SHAPE, TILE)
        visible = (offs_n < end)[:, None] if SWAP else (offs_n < end)[None, :]
        if not FUSED and NEW > 1:
            visible &= offs_n[:, None] < limit[None, :] if SWAP else offs_n[None, :] < limit[:, None]
        row_max, row_sums, acc = _attend(q_c, q_r, c, r, visible, scale, row_max, row_sums, acc, SWAP, TILE.HALF_UP)
    row_sum = tl.sum(row_sums, 0 if SWAP else 1)

    if FUSED:
        if split == num_splits - 1:
            length = tl.minimum(tl.load(cache.seq_lens_ptr + seq), capacity)
            new_c, new_r = append_new(kv_ptr, new.kv_c_ptr, new.k_pe_ptr, new.slots_ptr, new.positions_ptr,
                                      new.angles_ptr, seq, tile, kv_scale, offs_c, offs_r, stride_kp, stride_kn,
                                      stride_cb, stride_ct, stride_rb, stride_rt, q_c.dtype, SHAPE)
            offs_t = tl.arange(0, MAX_NEW)
            is_new = (offs_t < NEW) & (length - NEW + offs_t >= 0)
            if SWAP:
                visible = is_new[:, None] & (offs_t[:, None] <= token[None, :])
            else:
                visible = is_new[None, :] & (offs_t[None, :] <= token[:, None])
            row_max, row_sum, acc = _attend(q_c, q_r, new_c.to(q_c.dtype), new_r.to(q_c.dtype), visible, scale, row_max,
                                            row_sum, acc, SWAP, TILE.HALF_UP)
    acc *= kv_scale
    store_split(outputs.out_ptr, outputs.lse_ptr, outputs.partial_ptr, outputs.stats_ptr, item, num_splits, seq, row,
                row_max, row_sum, acc, column[:, None] if SWAP else offs_c, SHAPE)
