"""mla_decode's kernel for Hopper, where the order of copies and matrix products decides: explicit, in Gluon.

The trick: two blocks of latents on chip, and the copy of the next begins before the products of this one, so that it
has their whole time to arrive. Triton's pipeliner begins it after them, and a third block does not fit. New tokens join
the others by where the copy reads from: kv_c itself, and k_pe where this program has just put it, rotated.
Bound by: as mla_decode. Splits, partial results and their merge are mla_decode's.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from wave64.triton_ops.attention import is_wide

# Renamed after Triton 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
begin_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e38)
MOST_NEW = gl.constexpr(8)  # tokens per sequence


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _deal(item, seq_lens_ptr, positions_ptr, num_seqs, room, programs, least, BLOCK_B: gl.constexpr):
    """(seq, first, keys, parts) as splits.deal has it, for batches that fit BLOCK_B; and the sequence's position, if
    there is one for each: angles wait for it, and so it is loaded before it is known which one is needed."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    offs_b = gl.arange(0, BLOCK_B, one)
    if positions_ptr is not None:
        at = gl.load(positions_ptr + offs_b, mask=offs_b < num_seqs, other=0).to(gl.int32)
    keys = gl.minimum(gl.load(seq_lens_ptr + offs_b, mask=offs_b < num_seqs, other=0), room)
    keys = gl.maximum(keys, 0)
    share = gl.maximum(least, gl.cdiv(gl.sum(keys, 0), programs))
    parts = gl.maximum(1, (keys + share // 2) // share)
    dealt = gl.where(offs_b < num_seqs, parts, 0)
    passed = (dealt > 0) & (gl.associative_scan(dealt, 0, _add) <= item)
    seq = gl.sum(passed.to(gl.int32), 0)
    first = gl.sum(gl.where(passed, dealt, 0), 0)
    keys = gl.sum(gl.where(offs_b == seq, keys, 0), 0)
    position = 0
    if positions_ptr is not None:
        position = gl.sum(gl.where(offs_b == seq, at, 0), 0)
    return seq, first, keys, gl.maximum(1, (keys + share // 2) // share), position


@gluon.jit
def _pages(table_ptr, block, end, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Page of a block that lies inside one; else of each position, from `end` on that of the last."""
    if PAGE_SIZE % BLOCK_N == 0:
        pages = gl.load(table_ptr + gl.minimum(block, gl.maximum(end - 1, 0)) // PAGE_SIZE, mask=end > 0, other=0)
    else:
        offs_n = gl.minimum(block + gl.arange(0, BLOCK_N, layout), gl.maximum(end - 1, 0))
        pages = gl.load(table_ptr + offs_n // PAGE_SIZE, mask=offs_n < end, other=0)
    return pages


@gluon.jit
def _copy(lds, kv_ptr, new_ptr, pages, block, end, first_new, stride_kp, STRIDE_KN: gl.constexpr, stride_new,
          FUSED: gl.constexpr, WIDTH: gl.constexpr, PAGE_SIZE: gl.constexpr, WIDE: gl.constexpr, BLOCK_N: gl.constexpr,
          layout: gl.constexpr):
    """Begins to copy WIDTH columns of a block: rows of new tokens from new_ptr, zeros from `end` on."""
    offs_n = block + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    if WIDE:
        pages = pages.to(gl.int64)
    if PAGE_SIZE % BLOCK_N == 0:
        rows = kv_ptr + (pages * stride_kp + block % PAGE_SIZE * STRIDE_KN)
        rows = rows + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout)) * STRIDE_KN
    else:
        rows = kv_ptr + (pages * stride_kp + offs_n % PAGE_SIZE * STRIDE_KN)
    if FUSED:
        rows = gl.where(offs_n >= first_new, new_ptr + (offs_n - first_new) * stride_new, rows)
    ptrs = gl.max_contiguous(gl.multiple_of(rows[:, None] + offs_d[None, :], [1, 16]), [1, 8])  # 16 bytes at a time
    begin_copy(lds, ptrs, mask=(offs_n < end)[:, None])


@gluon.jit
def _rotated(rows, offs, mask, angles, NEOX: gl.constexpr, ROPE: gl.constexpr):
    """Columns offs of rows, rotated by the angles at `angles`, in fp32."""
    half: gl.constexpr = ROPE // 2
    if NEOX:
        first = offs < half
        partner = gl.where(first, offs + half, offs - half)
        pair = gl.where(first, offs, offs - half)
    else:
        first = offs % 2 == 0
        partner = offs ^ 1
        pair = offs // 2
    x = gl.load(rows + offs, mask=mask, other=0.0).to(gl.float32)
    y = gl.load(rows + partner, mask=mask, other=0.0).to(gl.float32)
    cos = gl.load(angles + pair, mask=mask, other=0.0).to(gl.float32)
    sin = gl.load(angles + half + pair, mask=mask, other=0.0).to(gl.float32)
    return x * cos + gl.where(first, -y, y) * sin


@gluon.jit
def _keep_new(kv_ptr, kv_c_ptr, k_pe_ptr, rotated_ptr, slots_ptr, positions_ptr, angles_ptr, stride_kp,
              STRIDE_KN: gl.constexpr, stride_ct, stride_rt, NEW: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr,
              PAGE_SIZE: gl.constexpr, NEOX: gl.constexpr, c_layout: gl.constexpr, r_layout: gl.constexpr):
    """Rotates the new tokens' k_pe into rotated_ptr; the program of the first tile puts them into the cache."""
    new = gl.arange(0, 4 * gl.num_warps(), gl.SliceLayout(1, r_layout))
    offs_r = gl.arange(0, ROPE, gl.SliceLayout(0, r_layout))
    is_new = new < NEW
    at = gl.load(positions_ptr + new, mask=is_new, other=0).to(gl.int64)
    r = _rotated((k_pe_ptr + new * stride_rt)[:, None], offs_r[None, :], is_new[:, None],
                 (angles_ptr + at * ROPE)[:, None], NEOX, ROPE).to(kv_ptr.dtype.element_ty)
    gl.store(rotated_ptr + new[:, None] * ROPE + offs_r[None, :], r, mask=is_new[:, None])
    if gl.program_id(0) == 0:
        slot = gl.load(slots_ptr + new, mask=is_new, other=-1)
        lines = kv_ptr + RANK + (slot // PAGE_SIZE * stride_kp + slot % PAGE_SIZE * STRIDE_KN)
        gl.store(lines[:, None] + offs_r[None, :], r, mask=(slot >= 0)[:, None])
        new_c = gl.arange(0, MOST_NEW, gl.SliceLayout(1, c_layout))
        offs_c = gl.arange(0, RANK, gl.SliceLayout(0, c_layout))
        slot_c = gl.load(slots_ptr + new_c, mask=new_c < NEW, other=-1)
        c = gl.load((kv_c_ptr + new_c * stride_ct)[:, None] + offs_c[None, :], mask=(slot_c >= 0)[:, None], other=0.0)
        lines_c = kv_ptr + (slot_c // PAGE_SIZE * stride_kp + slot_c % PAGE_SIZE * STRIDE_KN)
        gl.store(lines_c[:, None] + offs_c[None, :], c, mask=(slot_c >= 0)[:, None])


@gluon.jit(do_not_specialize=["num_seqs", "room", "programs", "least", "stride_qb", "stride_qt", "stride_qh",
                              "stride_pb", "stride_pt", "stride_ph", "stride_rb", "stride_rt", "stride_tb"])
def _mla_decode_hopper_kernel(out_ptr, lse_ptr, partial_ptr, stats_ptr, q_ptr, q_pe_ptr, kv_ptr, table_ptr,
                              seq_lens_ptr, kv_c_ptr, k_pe_ptr, rotated_ptr, slots_ptr, positions_ptr, angles_ptr,
                              scale, num_seqs, room, programs, least, stride_qb, stride_qt, stride_qh, stride_pb,
                              stride_pt, stride_ph, stride_kp, STRIDE_KN: gl.constexpr, stride_cb, stride_ct,
                              stride_rb, stride_rt, stride_tb, HEADS: gl.constexpr, NEW: gl.constexpr,
                              RANK: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, FUSED: gl.constexpr,
                              NEOX: gl.constexpr, WIDE: gl.constexpr, SWAP: gl.constexpr, BLOCK_B: gl.constexpr,
                              BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr):
    """One program: BLOCK_H rows (heads of new tokens) of one sequence, one part of its keys."""
    NW: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = kv_ptr.dtype.element_ty
    c_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [NW, 1], [1, 0])
    r_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NW, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    if SWAP:
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, NW // 4], [16, BLOCK_H // (NW // 4), 16])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NW, 1], [16, BLOCK_H, 16])
        S_H: gl.constexpr = 0
        p_layout: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_H, 16, 2)
    else:
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, NW // 4], [16, BLOCK_N // (NW // 4), 16])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, NW // 4], [16, 256, 16])
        S_H: gl.constexpr = 1
        p_layout: gl.constexpr = shared
    s_h: gl.constexpr = gl.SliceLayout(S_H, s_layout)
    o_h: gl.constexpr = gl.SliceLayout(S_H, o_layout)

    gdc_launch_dependents()
    item = gl.program_id(1)
    ONE: gl.constexpr = FUSED and NEW == 1
    seq, first_item, keys, parts, position = _deal(item, seq_lens_ptr, positions_ptr if ONE else None, num_seqs, room,
                                                   programs, least, BLOCK_B)
    if seq >= num_seqs:
        return
    part = item - first_item
    blocks = gl.cdiv(keys, BLOCK_N)
    start = (part * (blocks // parts) + gl.minimum(part, blocks % parts)) * BLOCK_N
    end = start + (blocks // parts + (part < blocks % parts).to(gl.int32)) * BLOCK_N
    end = gl.minimum(end, keys)
    seq = seq.to(gl.int64)
    table_ptr += seq * stride_tb
    if FUSED:
        kv_c_ptr += seq * stride_cb

    first_new = keys - NEW
    pages_c = _pages(table_ptr, start, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, c_layout))
    pages_r = _pages(table_ptr, start, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, r_layout))

    # Queries: rotated in registers, then both parts on chip.
    row0 = gl.program_id(0) * BLOCK_H
    row = row0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, c_layout))
    offs_c = gl.arange(0, RANK, gl.SliceLayout(0, c_layout))
    q_rows = q_ptr + (seq * stride_qb + row // HEADS * stride_qt + row % HEADS * stride_qh)
    q_c = gl.load(q_rows[:, None] + offs_c[None, :], mask=(row < HEADS * NEW)[:, None], other=0.0)
    row = row0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, r_layout))
    offs_r = gl.arange(0, ROPE, gl.SliceLayout(0, r_layout))
    pe_rows = q_pe_ptr + (seq * stride_pb + row // HEADS * stride_pt + row % HEADS * stride_ph)
    mask_h = row < HEADS * NEW
    if FUSED:
        positions_ptr += seq * NEW
        rotated_ptr += seq * NEW * ROPE
        if ONE:
            at = gl.full([BLOCK_H], 0, gl.int64, gl.SliceLayout(1, r_layout)) + position
        else:
            at = gl.load(positions_ptr + row // HEADS, mask=mask_h, other=0).to(gl.int64)
        q_r = _rotated(pe_rows[:, None], offs_r[None, :], mask_h[:, None], (angles_ptr + at * ROPE)[:, None], NEOX,
                       ROPE).to(dtype)
        # New tokens among this program's keys are rotated once more for itself, and kept by the first tile. Several of
        # one sequence can lie in two parts, which then write the same.
        if end > first_new:
            _keep_new(kv_ptr, kv_c_ptr, k_pe_ptr + seq * stride_rb, rotated_ptr, slots_ptr + seq * NEW, positions_ptr,
                      angles_ptr, stride_kp, STRIDE_KN, stride_ct, stride_rt, NEW, RANK, ROPE, PAGE_SIZE, NEOX,
                      c_layout, r_layout)
            barrier()  # what was rotated is copied from memory, by other lanes
    else:
        q_r = gl.load(pe_rows[:, None] + offs_r[None, :], mask=mask_h[:, None], other=0.0)
    c_lds = gl.allocate_shared_memory(dtype, [2, BLOCK_N, RANK], shared)
    r_lds = gl.allocate_shared_memory(dtype, [2, BLOCK_N, ROPE], shared)
    _copy(c_lds.index(0), kv_ptr, kv_c_ptr, pages_c, start, end, first_new, stride_kp, STRIDE_KN, stride_ct, FUSED,
          RANK, PAGE_SIZE, WIDE, BLOCK_N, c_layout)
    _copy(r_lds.index(0), kv_ptr + RANK, rotated_ptr, pages_r, start, end, first_new, stride_kp, STRIDE_KN, ROPE, FUSED,
          ROPE, PAGE_SIZE, WIDE, BLOCK_N, r_layout)
    async_copy.commit_group()
    pages_c = _pages(table_ptr, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, c_layout))
    pages_r = _pages(table_ptr, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, r_layout))
    qc_lds = gl.allocate_shared_memory(dtype, [BLOCK_H, RANK], shared, q_c)
    qr_lds = gl.allocate_shared_memory(dtype, [BLOCK_H, ROPE], shared, q_r)
    scale *= LOG2_E

    if SWAP:
        p_lds = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_H], p_layout)
        totals = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, s_layout)
        mixed = gl.zeros([RANK, BLOCK_H], gl.float32, o_layout)
    else:
        p_lds = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], p_layout)
        totals = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, s_layout)
        mixed = gl.zeros([BLOCK_H, RANK], gl.float32, o_layout)
    peak = gl.full([BLOCK_H], LOWEST, gl.float32, s_h)
    limit = gl.minimum(first_new + 1 + (row0 + gl.arange(0, BLOCK_H, s_h)) // HEADS, end)
    offs_s = gl.arange(0, BLOCK_N, gl.SliceLayout(1 - S_H, s_layout))

    buffer = 0
    for block in range(start, end, BLOCK_N):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        c, r = c_lds.index(buffer), r_lds.index(buffer)
        if SWAP:
            s = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, s_layout)
            s = warpgroup_mma(r, qr_lds.permute([1, 0]), s, use_acc=False, is_async=True)
            s = warpgroup_mma(c, qc_lds.permute([1, 0]), s, is_async=True)
        else:
            s = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, s_layout)
            s = warpgroup_mma(qr_lds, r.permute([1, 0]), s, use_acc=False, is_async=True)
            s = warpgroup_mma(qc_lds, c.permute([1, 0]), s, is_async=True)
        # Beyond the end it copies nothing, but without a branch, at which the compiler would wait for the products.
        _copy(c_lds.index(1 - buffer), kv_ptr, kv_c_ptr, pages_c, block + BLOCK_N, end, first_new, stride_kp,
              STRIDE_KN, stride_ct, FUSED, RANK, PAGE_SIZE, WIDE, BLOCK_N, c_layout)
        _copy(r_lds.index(1 - buffer), kv_ptr + RANK, rotated_ptr, pages_r, block + BLOCK_N, end, first_new,
              stride_kp, STRIDE_KN, ROPE, FUSED, ROPE, PAGE_SIZE, WIDE, BLOCK_N, r_layout)
        async_copy.commit_group()
        pages_c = _pages(table_ptr, block + 2 * BLOCK_N, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, c_layout))
        pages_r = _pages(table_ptr, block + 2 * BLOCK_N, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, r_layout))
        s = warpgroup_mma_wait(0, deps=[s])
        at_n = gl.expand_dims(block + offs_s, 1 - S_H)
        s = gl.where(at_n < gl.expand_dims(limit, S_H), s * scale, float("-inf"))
        before = peak
        peak = gl.maximum(peak, gl.max(s, S_H))
        p = gl.exp2(s - gl.expand_dims(peak, S_H))
        shrink = gl.exp2(before - peak)
        totals = totals * gl.expand_dims(shrink, S_H) + p
        p_lds.store(p.to(dtype))
        mixed = mixed * gl.expand_dims(gl.convert_layout(shrink, o_h), S_H)
        fence_async_shared()
        barrier()
        if SWAP:
            mixed = warpgroup_mma(c.permute([1, 0]), p_lds, mixed, is_async=True)
        else:
            mixed = warpgroup_mma(p_lds, c, mixed, is_async=True)
        mixed = warpgroup_mma_wait(0, deps=[mixed])
        buffer = 1 - buffer
    total = gl.sum(totals, S_H)

    rows: gl.constexpr = HEADS * NEW
    row = row0 + gl.arange(0, BLOCK_H, o_h)
    offs_o = gl.arange(0, RANK, gl.SliceLayout(1 - S_H, o_layout))
    inside = gl.expand_dims(row < rows, S_H)
    row_s = row0 + gl.arange(0, BLOCK_H, s_h)
    if parts == 1:
        divisor = gl.where(total > 0, total, 1.0)
        mixed = mixed / gl.expand_dims(gl.convert_layout(divisor, o_h), S_H)
        place = gl.expand_dims((seq * rows + row) * RANK, S_H) + gl.expand_dims(offs_o, 1 - S_H)
        gl.store(out_ptr + place, mixed.to(out_ptr.dtype.element_ty), mask=inside)
        if lse_ptr is not None:
            lse = gl.where(total > 0, (peak + gl.log2(divisor)) * LN_2, float("-inf"))
            gl.store(lse_ptr + seq * rows + row_s, lse, mask=row_s < rows)
    else:
        line = item.to(gl.int64) * rows
        place = gl.expand_dims((line + row) * RANK, S_H) + gl.expand_dims(offs_o, 1 - S_H)
        gl.store(partial_ptr + place, mixed, mask=inside)
        gl.store(stats_ptr + (line + row_s) * 2, peak, mask=row_s < rows)
        gl.store(stats_ptr + (line + row_s) * 2 + 1, total, mask=row_s < rows)


def serves(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, kv_c: Tensor | None) -> bool:
    """True where this kernel can stand in for mla_decode's: the widths its layouts are for, rows that can be copied 16
    bytes at a time, and a batch whose lengths are looked at at once. q_nope, q_pe [B, Q, H, ...]."""
    copied = [kv_cache] if kv_c is None else [kv_cache, kv_c]
    return (q_nope.dtype in (torch.bfloat16, torch.float16) and kv_cache.dtype == q_nope.dtype
            and q_nope.shape[3] == 512 and q_pe.shape[3] == 64
            and q_nope.shape[0] <= 1024 and q_nope.shape[1] <= MOST_NEW.value
            and all(x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1]) for x in copied))


def launch(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
           out: Tensor, lse: Tensor | None, partial: Tensor, stats: Tensor, new_tokens: tuple[Tensor, ...] | None,
           is_neox: bool, lengths: tuple[int, ...], grid: tuple[int, int], swap: bool, block_h: int,
           num_warps: int) -> None:
    """Arguments as mla_decode.launch has them, what it dealt out, and where it wants parts."""
    num_seqs, room, _, programs, least = lengths
    _, new, heads, rank = q_nope.shape
    rope = q_pe.shape[3]
    kv_c, k_pe, slots, positions, angles = new_tokens or (None,) * 5
    rotated, strides = None, (0, 0, 0, 0)
    if new_tokens:
        rotated = torch.empty((num_seqs, new, rope), dtype=k_pe.dtype, device=k_pe.device)
        strides = (*kv_c.stride()[:2], *k_pe.stride()[:2])
    _mla_decode_hopper_kernel[grid](
        out, lse, partial, stats, q_nope, q_pe, kv_cache, page_table, seq_lens, kv_c, k_pe, rotated, slots, positions,
        angles, scale, num_seqs, room, programs, least, *q_nope.stride()[:3], *q_pe.stride()[:3],
        *kv_cache.stride()[:2], *strides, page_table.stride(0), HEADS=heads, NEW=new, RANK=rank, ROPE=rope,
        PAGE_SIZE=kv_cache.shape[1], FUSED=new_tokens is not None, NEOX=is_neox, WIDE=is_wide(kv_cache), SWAP=swap,
        BLOCK_B=max(32, triton.next_power_of_2(num_seqs)), BLOCK_H=block_h, BLOCK_N=64, num_warps=num_warps)
