"""mla_decode's kernel for Hopper, in Gluon, which makes the order of copies and matrix products explicit.
mla_decode_rope launches it, too.

The trick: two blocks of latents are in shared memory, and the copy of the next block starts before the products of this
one, so that it overlaps with all of them. Triton's pipeliner starts it after them, and a third block does not fit. New
tokens come in through the same copy, which reads kv_c itself, and k_pe from where this program has stored it, rotated.
Bound by: the same as mla_decode. The split plan, the partial results and their merge are those of mla_decode.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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

from wave64.arch import Arch
from wave64.ops import mla_decode
from wave64.triton_ops import merge_splits
from wave64.triton_ops.attention import is_wide
from wave64.triton_ops.mla_decode import call_of, results, with_queries
from wave64.triton_ops.mla_decode_common import Call, Outputs, Shape, rotated
from wave64.triton_ops.splits import plan_splits, split_range
from wave64.tuning import Tuning

# Renamed after Triton 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
start_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e38)
MAX_NEW = gl.constexpr(8)  # tokens per sequence


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find_split(item, seq_lens_ptr, positions_ptr, num_seqs, capacity, programs, min_keys, BLOCK_B: gl.constexpr):
    """splits.find_split in Gluon's layouts, for at most BLOCK_B sequences: (seq, first, keys, num_splits), and the
    sequence's position unless positions_ptr is None. RoPE waits for the position, so all are loaded at once."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    offs_b = gl.arange(0, BLOCK_B, layout)
    if positions_ptr is not None:
        at = gl.load(positions_ptr + offs_b, mask=offs_b < num_seqs, other=0).to(gl.int32)
    keys = gl.minimum(gl.load(seq_lens_ptr + offs_b, mask=offs_b < num_seqs, other=0), capacity)
    keys = gl.maximum(keys, 0)
    keys_per_split = gl.maximum(min_keys, gl.cdiv(gl.sum(keys, 0), programs))
    num_splits = gl.maximum(1, (keys + keys_per_split // 2) // keys_per_split)
    splits = gl.where(offs_b < num_seqs, num_splits, 0)
    passed = (splits > 0) & (gl.associative_scan(splits, 0, _add) <= item)
    seq = gl.sum(passed.to(gl.int32), 0)
    first = gl.sum(gl.where(passed, splits, 0), 0)
    keys = gl.sum(gl.where(offs_b == seq, keys, 0), 0)
    position = 0
    if positions_ptr is not None:
        position = gl.sum(gl.where(offs_b == seq, at, 0), 0)
    return seq, first, keys, gl.maximum(1, (keys + keys_per_split // 2) // keys_per_split), position


@gluon.jit
def _pages(table_ptr, block, end, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Load the page numbers of a block of keys: one number where pages hold whole blocks, else one per position,
    clamped to the last position before `end`."""
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
    """Start to copy WIDTH columns of a block of keys to `lds`: new tokens from new_ptr, zeros from `end` on."""
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
    start_copy(lds, ptrs, mask=(offs_n < end)[:, None])


class Tile(NamedTuple):
    """Compile-time constants of the tiling."""

    BLOCK_B: int
    BLOCK_H: int
    BLOCK_N: int
    SWAP: bool
    STRIDE_KN: int


@gluon.jit
def _append_new(kv_ptr, kv_c_ptr, k_pe_ptr, rotated_ptr, slots_ptr, positions_ptr, angles_ptr, stride_kp,
                STRIDE_KN: gl.constexpr, stride_ct, stride_rt, SHAPE: gl.constexpr, c_layout: gl.constexpr,
                r_layout: gl.constexpr):
    """Apply RoPE to the new tokens' k_pe and store it in rotated_ptr; the program of tile 0 also writes [kv_c, k_pe] to
    the cache."""
    RANK: gl.constexpr = SHAPE.RANK
    ROPE: gl.constexpr = SHAPE.ROPE
    new = gl.arange(0, 4 * gl.num_warps(), gl.SliceLayout(1, r_layout))
    offs_r = gl.arange(0, ROPE, gl.SliceLayout(0, r_layout))
    is_new = new < SHAPE.NEW
    position = gl.load(positions_ptr + new, mask=is_new, other=0).to(gl.int64)
    r = rotated((k_pe_ptr + new * stride_rt)[:, None], offs_r[None, :], is_new[:, None],
                (angles_ptr + position * ROPE)[:, None], is_new[:, None], SHAPE.NEOX, ROPE).to(kv_ptr.dtype.element_ty)
    gl.store(rotated_ptr + new[:, None] * ROPE + offs_r[None, :], r, mask=is_new[:, None])
    if gl.program_id(0) == 0:
        slot = gl.load(slots_ptr + new, mask=is_new, other=-1)
        rows = kv_ptr + RANK + (slot // SHAPE.PAGE_SIZE * stride_kp + slot % SHAPE.PAGE_SIZE * STRIDE_KN)
        gl.store(rows[:, None] + offs_r[None, :], r, mask=(slot >= 0)[:, None])
        new_c = gl.arange(0, MAX_NEW, gl.SliceLayout(1, c_layout))
        offs_c = gl.arange(0, RANK, gl.SliceLayout(0, c_layout))
        slot_c = gl.load(slots_ptr + new_c, mask=new_c < SHAPE.NEW, other=-1)
        c = gl.load((kv_c_ptr + new_c * stride_ct)[:, None] + offs_c[None, :], mask=(slot_c >= 0)[:, None], other=0.0)
        rows_c = kv_ptr + (slot_c // SHAPE.PAGE_SIZE * stride_kp + slot_c % SHAPE.PAGE_SIZE * STRIDE_KN)
        gl.store(rows_c[:, None] + offs_c[None, :], c, mask=(slot_c >= 0)[:, None])


@gluon.jit
def _scores(q_c, q_r, c, r, SWAP: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Start the products of queries and latents in shared memory, asynchronously: [N, H] if SWAP, else [H, N]."""
    if SWAP:
        s = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout)
        s = warpgroup_mma(r, q_r.permute([1, 0]), s, use_acc=False, is_async=True)
        s = warpgroup_mma(c, q_c.permute([1, 0]), s, is_async=True)
    else:
        s = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, layout)
        s = warpgroup_mma(q_r, r.permute([1, 0]), s, use_acc=False, is_async=True)
        s = warpgroup_mma(q_c, c.permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def _store_split(out_ptr, lse_ptr, partial_ptr, stats_ptr, item, num_splits, seq, row0, row_max, row_sum, acc,
                 SHAPE: gl.constexpr, BLOCK_H: gl.constexpr, S_H: gl.constexpr, s_h: gl.constexpr, o_h: gl.constexpr,
                 o_layout: gl.constexpr):
    """mla_decode_common.store_split in Gluon's layouts: s_h and o_h are those of a row of scores and of results."""
    RANK: gl.constexpr = SHAPE.RANK
    rows: gl.constexpr = SHAPE.HEADS * SHAPE.NEW
    row = row0 + gl.arange(0, BLOCK_H, o_h)
    offs_o = gl.arange(0, RANK, gl.SliceLayout(1 - S_H, o_layout))
    inside = gl.expand_dims(row < rows, S_H)
    row_s = row0 + gl.arange(0, BLOCK_H, s_h)
    if num_splits == 1:
        divisor = gl.where(row_sum > 0, row_sum, 1.0)
        acc = acc / gl.expand_dims(gl.convert_layout(divisor, o_h), S_H)
        offs = gl.expand_dims((seq * rows + row) * RANK, S_H) + gl.expand_dims(offs_o, 1 - S_H)
        gl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=inside)
        if lse_ptr is not None:
            lse = gl.where(row_sum > 0, (row_max + gl.log2(divisor)) * LN_2, float("-inf"))
            gl.store(lse_ptr + seq * rows + row_s, lse, mask=row_s < rows)
    else:
        first_row = item.to(gl.int64) * rows
        offs = gl.expand_dims((first_row + row) * RANK, S_H) + gl.expand_dims(offs_o, 1 - S_H)
        gl.store(partial_ptr + offs, acc, mask=inside)
        gl.store(stats_ptr + (first_row + row_s) * 2, row_max, mask=row_s < rows)
        gl.store(stats_ptr + (first_row + row_s) * 2 + 1, row_sum, mask=row_s < rows)


@gluon.jit(do_not_specialize=["num_seqs", "capacity", "programs", "min_keys", "stride_qb", "stride_qt", "stride_qh",
                              "stride_pb", "stride_pt", "stride_ph", "stride_rb", "stride_rt", "stride_tb"])
def _mla_decode_hopper_kernel(outputs, queries, cache, new, rotated_ptr, scale, num_seqs, capacity, programs, min_keys,
                              stride_qb, stride_qt, stride_qh, stride_pb, stride_pt, stride_ph, stride_kp, stride_cb,
                              stride_ct, stride_rb, stride_rt, stride_tb, SHAPE: gl.constexpr, TILE: gl.constexpr):
    """One program: BLOCK_H rows (heads of new tokens) of one sequence, one split of its keys.

    new: None, or the newest NEW tokens of each sequence. Then the kernel also applies RoPE to q_pe and k_pe and writes
    the new tokens to the cache.
    """
    FUSED: gl.constexpr = new is not None
    HEADS: gl.constexpr = SHAPE.HEADS
    NEW: gl.constexpr = SHAPE.NEW
    RANK: gl.constexpr = SHAPE.RANK
    ROPE: gl.constexpr = SHAPE.ROPE
    PAGE_SIZE: gl.constexpr = SHAPE.PAGE_SIZE
    WIDE: gl.constexpr = SHAPE.WIDE
    BLOCK_H: gl.constexpr = TILE.BLOCK_H
    BLOCK_N: gl.constexpr = TILE.BLOCK_N
    SWAP: gl.constexpr = TILE.SWAP
    STRIDE_KN: gl.constexpr = TILE.STRIDE_KN
    NW: gl.constexpr = gl.num_warps()
    kv_ptr = cache.kv_ptr
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
    new_positions_ptr = new.positions_ptr if FUSED else None
    seq, first_item, keys, num_splits, position = _find_split(
        item, cache.seq_lens_ptr, new_positions_ptr if ONE else None, num_seqs, capacity, programs, min_keys,
        TILE.BLOCK_B)
    if seq >= num_seqs:
        return
    start, end = split_range(item - first_item, num_splits, 0, gl.cdiv(keys, BLOCK_N), BLOCK_N)
    end = gl.minimum(end, keys)
    seq = seq.to(gl.int64)
    table_ptr = cache.table_ptr + seq * stride_tb
    kv_c_ptr = new.kv_c_ptr + seq * stride_cb if FUSED else None

    first_new = keys - NEW
    pages_c = _pages(table_ptr, start, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, c_layout))
    pages_r = _pages(table_ptr, start, end, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, r_layout))

    # Load the queries; q_pe is rotated in registers.
    row0 = gl.program_id(0) * BLOCK_H
    row = row0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, c_layout))
    offs_c = gl.arange(0, RANK, gl.SliceLayout(0, c_layout))
    q_rows = queries.q_ptr + (seq * stride_qb + row // HEADS * stride_qt + row % HEADS * stride_qh)
    q_c = gl.load(q_rows[:, None] + offs_c[None, :], mask=(row < HEADS * NEW)[:, None], other=0.0)
    row = row0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, r_layout))
    offs_r = gl.arange(0, ROPE, gl.SliceLayout(0, r_layout))
    pe_rows = queries.q_pe_ptr + (seq * stride_pb + row // HEADS * stride_pt + row % HEADS * stride_ph)
    mask_h = row < HEADS * NEW
    if FUSED:
        positions_ptr = new.positions_ptr + seq * NEW
        rotated_ptr += seq * NEW * ROPE
        if ONE:
            at = gl.full([BLOCK_H], 0, gl.int64, gl.SliceLayout(1, r_layout)) + position
        else:
            at = gl.load(positions_ptr + row // HEADS, mask=mask_h, other=0).to(gl.int64)
        q_r = rotated(pe_rows[:, None], offs_r[None, :], mask_h[:, None], (new.angles_ptr + at * ROPE)[:, None],
                      mask_h[:, None], SHAPE.NEOX, ROPE).to(dtype)
        # Every program with new tokens among its keys rotates them for itself. The new tokens of a sequence can lie in
        # two splits, which then write the same values.
        if end > first_new:
            _append_new(kv_ptr, kv_c_ptr, new.k_pe_ptr + seq * stride_rb, rotated_ptr, new.slots_ptr + seq * NEW,
                        positions_ptr, new.angles_ptr, stride_kp, STRIDE_KN, stride_ct, stride_rt, SHAPE, c_layout,
                        r_layout)
            barrier()  # other lanes copy the rotated k_pe from memory
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
        row_sums = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, s_layout)
        acc = gl.zeros([RANK, BLOCK_H], gl.float32, o_layout)
    else:
        p_lds = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], p_layout)
        row_sums = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, s_layout)
        acc = gl.zeros([BLOCK_H, RANK], gl.float32, o_layout)
    row_max = gl.full([BLOCK_H], LOWEST, gl.float32, s_h)
    limit = gl.minimum(first_new + 1 + (row0 + gl.arange(0, BLOCK_H, s_h)) // HEADS, end)
    offs_s = gl.arange(0, BLOCK_N, gl.SliceLayout(1 - S_H, s_layout))

    buffer = 0
    for block in range(start, end, BLOCK_N):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        c, r = c_lds.index(buffer), r_lds.index(buffer)
        s = _scores(qc_lds, qr_lds, c, r, SWAP, BLOCK_H, BLOCK_N, s_layout)
        # From `end` on nothing is copied, yet without a branch, at which the compiler would wait for the products.
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
        old_max = row_max
        row_max = gl.maximum(row_max, gl.max(s, S_H))
        p = gl.exp2(s - gl.expand_dims(row_max, S_H))
        rescale = gl.exp2(old_max - row_max)
        row_sums = row_sums * gl.expand_dims(rescale, S_H) + p
        p_lds.store(p.to(dtype))
        acc = acc * gl.expand_dims(gl.convert_layout(rescale, o_h), S_H)
        fence_async_shared()
        barrier()
        if SWAP:
            acc = warpgroup_mma(c.permute([1, 0]), p_lds, acc, is_async=True)
        else:
            acc = warpgroup_mma(p_lds, c, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        buffer = 1 - buffer
    row_sum = gl.sum(row_sums, S_H)
    _store_split(outputs.out_ptr, outputs.lse_ptr, outputs.partial_ptr, outputs.stats_ptr, item, num_splits, seq, row0,
                 row_max, row_sum, acc, SHAPE, BLOCK_H, S_H, s_h, o_h, o_layout)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched; a block has 64 keys."""

    block_h: int        # at most
    num_warps: int
    programs: int       # per compute unit at a time
    min_keys: int       # per split, at least
    swap: bool          # keys, not heads, are the rows of the matrix products


def candidates(arch: Arch, rows: int, **others) -> Iterator[Config]:
    """What the tuner tries. Two blocks of 64 keys, for which the layouts are made, fill the shared memory."""
    for block_h, waves, swap in ((32, 4, True), (32, 8, True), (64, 8, True), (64, 8, False)):
        if rows > 32 or block_h == 32:
            for programs, min_keys in ((1, 64), (1, 128), (2, 64)):
                yield Config(block_h, waves, programs, min_keys, swap)


def work(config: Config, rows: int, **others) -> int:
    """(row, key) pairs that a block processes at a time."""
    return min(config.block_h, rows) * 64


def key_of(q_nope: Tensor) -> dict[str, int]:
    """The tuning key of queries [B, Q, H, ...]."""
    return {"rows": q_nope.shape[1] * q_nope.shape[2], "num_seqs": q_nope.shape[0]}


def key(q: Tensor, **others) -> dict[str, int]:
    """The tuning key of a call."""
    return key_of(with_queries(q, 4))


TUNING = Tuning("mla_decode", config=Config, key=key, buckets={"rows": (16, 32, 64), "num_seqs": (16,)},
                candidates=candidates, work=work, backend="hopper")


def unsupported(call: Call) -> str | None:
    """The reason why this kernel does not support these arguments, or None. It has layouts for one width, copies rows
    16 bytes at a time, and reads all lengths of a batch at once."""
    q, q_pe, kv = *call.queries, call.cache.kv_ptr
    if q.dtype not in (torch.bfloat16, torch.float16) or kv.dtype != q.dtype:
        return f"attends in bf16 or fp16 to a cache of the same dtype, not with {q.dtype} to {kv.dtype}"
    if (q.shape[3], q_pe.shape[3]) != (512, 64):
        return f"takes latents of 512 + 64 columns, not {q.shape[3]} + {q_pe.shape[3]}"
    if q.shape[0] > 1024 or q.shape[1] > MAX_NEW.value:
        return f"takes at most 1024 sequences of {MAX_NEW.value} new tokens, not {q.shape[0]} of {q.shape[1]}"
    for x in (kv, call.new.kv_c_ptr) if call.new else (kv,):
        if x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:-1]):
            return "copies latents 16 bytes at a time, these are not aligned to that"
    return None


def launch(call: Call, out: Tensor, lse: Tensor | None, config: Config, keys_per_split: int = 0) -> None:
    """Compute out, and lse unless it is None. keys_per_split: see splits.plan_splits."""
    (num_seqs, new, heads, rank), cache = call.shape, call.cache
    if out.numel() == 0:
        return
    rows, rope, page_size = new * heads, call.queries.q_pe_ptr.shape[3], cache.kv_ptr.shape[1]
    block_h = max(16, min(config.block_h, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_h)
    split = plan_splits(cache.table_ptr, page_size, tiles, config.programs, config.min_keys,
                        keys_per_split=keys_per_split)
    partial, stats = split.partials(rows, rank, out)
    rotated_k_pe = None
    if call.new:
        rotated_k_pe = torch.empty((num_seqs, new, rope), dtype=call.new.k_pe_ptr.dtype, device=out.device)
    *strides, stride_kp, stride_kn, stride_cb, stride_ct, stride_rb, stride_rt = call.strides()
    shape = Shape(heads, new, rank, rope, page_size, UNIT=1, WIDE=is_wide(cache.kv_ptr), NEOX=call.is_neox, LIMIT=0.0)
    tile = Tile(max(32, triton.next_power_of_2(num_seqs)), block_h, 64, config.swap, stride_kn)
    _mla_decode_hopper_kernel[tiles, split.num_items](
        Outputs(out, lse, partial, stats), call.queries, cache, call.new, rotated_k_pe, call.scale, num_seqs,
        split.capacity, split.programs, split.min_keys, *strides, stride_kp, stride_cb, stride_ct, stride_rb, stride_rt,
        cache.table_ptr.stride(0), shape, tile, num_warps=config.num_warps)
    if split.max_splits > 1:
        merge_splits.launch(out.view(num_seqs, rows, rank), lse, partial, stats, cache.seq_lens_ptr, None, split, 0)


@mla_decode.backend("hopper", tuning=TUNING, supports=lambda *args, **kwargs: unsupported(call_of(*args, **kwargs)))
def run(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
        kv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse = results(q, kv_lora_rank)
    call = call_of(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    launch(call, out, lse, TUNING.choose(**key_of(call.queries.q_ptr)))
    return out, lse
