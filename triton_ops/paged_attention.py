"""Decode attention over a paged cache, split along the keys.

The trick: the heads that share a key head form one tile, so keys are read once, and the batch's keys are dealt out in
shares of equal size, which each program works out for itself from the lengths: a long sequence gets many programs, a
short one one, and the host need not know which. A second kernel merges the shares of a sequence.
Bound by: reading keys and values.
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import paged_attention
from wave64.triton_ops.attention import (
    LOWEST,
    add_sink,
    base2_logits,
    dot,
    is_wide,
    load_pages,
    load_rows,
    unit_of,
    unsupported,
)

#: Arguments that vary from step to step or say nothing that UNIT does not: none of them is worth another compilation.
LENGTHS = ["num_seqs", "heads", "room", "window", "programs", "least"]
STRIDES = ["stride_qb", "stride_qh", "stride_kp", "stride_kn", "stride_kh", "stride_vp", "stride_vn", "stride_vh",
           "stride_tb"]


@triton.jit
def _keys(seq_lens_ptr, seq, num_seqs, room, window):
    """Keys that sequences `seq` read, 0 beyond the last: of their lengths, what the page table and the window allow."""
    keys = tl.minimum(tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0), room)
    return tl.where(window > 0, tl.minimum(keys, window), keys)


@triton.jit
def _share(seq_lens_ptr, num_seqs, room, window, programs, least, BLOCK_B: tl.constexpr):
    """Keys per program when the batch's keys are dealt out to `programs` of them, at least `least`."""
    total = 0
    for first in range(0, num_seqs, BLOCK_B):
        total += tl.sum(_keys(seq_lens_ptr, first + tl.arange(0, BLOCK_B), num_seqs, room, window))
    return tl.maximum(least, tl.cdiv(total, programs))


@triton.jit
def _parts(keys, share):
    """Programs that so many keys of a sequence go to, each with about `share`, at most 1.5 times that; at least one."""
    return tl.maximum(1, (keys + share // 2) // share)


@triton.jit(do_not_specialize=[*LENGTHS, *STRIDES])
def _paged_attention_kernel(out_ptr, partial_ptr, stats_ptr, q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr,
                            sinks_ptr, k_scale_ptr, v_scale_ptr, scale, logit_cap, num_seqs, heads, room, window,
                            programs, least, stride_qb, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp,
                            stride_vn, stride_vh, stride_tb, UNIT: tl.constexpr, GROUP: tl.constexpr,
                            HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CAPPED: tl.constexpr,
                            WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_D: tl.constexpr):
    """One program: BLOCK_H heads of one group, one part of one sequence's keys."""
    item = tl.program_id(1)
    share = _share(seq_lens_ptr, num_seqs, room, window, programs, least, BLOCK_B)
    seq, first_item, dealt = 0, 0, 0  # the sequence whose parts, counted through the batch, include `item`
    for first in range(0, num_seqs, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        parts = _parts(_keys(seq_lens_ptr, offs_b, num_seqs, room, window), share)
        parts = tl.where(offs_b < num_seqs, parts, 0)
        passed = (parts > 0) & (dealt + tl.cumsum(parts) <= item)
        seq += tl.sum(passed.to(tl.int32))
        first_item += tl.sum(tl.where(passed, parts, 0))
        dealt += tl.sum(parts)
    if seq >= num_seqs:
        return

    length = tl.maximum(0, tl.minimum(tl.load(seq_lens_ptr + seq), room))
    keys = _keys(seq_lens_ptr, seq, num_seqs, room, window)
    parts = _parts(keys, share)
    first_key = length - keys
    # Whole blocks are dealt out, to the first parts one more each. They begin at multiples of BLOCK_N, so that each
    # lies inside one page where pages hold whole blocks.
    part, first_block = item - first_item, first_key // BLOCK_N
    blocks = tl.cdiv(length, BLOCK_N) - first_block
    start = (first_block + part * (blocks // parts) + tl.minimum(part, blocks % parts)) * BLOCK_N
    end = start + (blocks // parts + (part < blocks % parts).to(tl.int32)) * BLOCK_N
    end = tl.minimum(end, length)

    tiles: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // tiles
    wide_head = kv_head.to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_h = kv_head * GROUP + row
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = row < GROUP
    mask_d = offs_d < HEAD_DIM
    mask_hd = mask_h[:, None] & mask_d
    seq = seq.to(tl.int64)
    q = tl.load(q_ptr + (seq * stride_qb + offs_h * stride_qh)[:, None] * UNIT + offs_d, mask=mask_hd, other=0.0)
    k_ptr += wide_head * stride_kh * UNIT
    v_ptr += wide_head * stride_vh * UNIT
    table_ptr += seq * stride_tb
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr)

    peak = tl.full([BLOCK_H], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for block in range(start, end, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= first_key) & (offs_n < end)
        offs_n = tl.minimum(tl.maximum(offs_n, first_key), end - 1)
        pages = load_pages(table_ptr, block, offs_n, PAGE_SIZE, BLOCK_N, WIDE)
        k = load_rows(k_ptr, pages, offs_n, stride_kp, stride_kn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D).to(q.dtype)
        v = load_rows(v_ptr, pages, offs_n, stride_vp, stride_vn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D).to(q.dtype)
        s = base2_logits(dot(q, tl.trans(k)), scale, logit_cap, CAPPED)
        s = tl.where(mask_n, s, float("-inf"))
        before, peak = peak, tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - peak[:, None])
        shrink = tl.exp2(before - peak)
        total = total * shrink + tl.sum(p, 1)
        mixed = dot(p.to(v.dtype), v, mixed * shrink[:, None])
    if v_scale_ptr is not None:
        mixed *= tl.load(v_scale_ptr)

    if parts == 1:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + offs_h, mask=mask_h, other=0.0)
            peak, total, shrink = add_sink(sink, peak, total)
            mixed *= shrink[:, None]
        mixed /= tl.where(total > 0, total, 1)[:, None]
        line = seq * heads + offs_h
        tl.store(out_ptr + line[:, None] * HEAD_DIM + offs_d, mixed.to(out_ptr.dtype.element_ty), mask=mask_hd)
    else:
        line = item.to(tl.int64) * heads + offs_h
        tl.store(partial_ptr + line[:, None] * HEAD_DIM + offs_d, mixed, mask=mask_hd)
        tl.store(stats_ptr + line * 2, peak, mask=mask_h)
        tl.store(stats_ptr + line * 2 + 1, total, mask=mask_h)


@triton.jit(do_not_specialize=LENGTHS)
def _paged_attention_merge_kernel(out_ptr, partial_ptr, stats_ptr, seq_lens_ptr, sinks_ptr, num_seqs, heads, room,
                                  window, programs, least, HEAD_DIM: tl.constexpr, BLOCK_B: tl.constexpr,
                                  BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: one head of one sequence, if its keys went to several programs."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    share = _share(seq_lens_ptr, num_seqs, room, window, programs, least, BLOCK_B)
    last_part = _parts(_keys(seq_lens_ptr, seq, num_seqs, room, window), share)
    if last_part == 1:
        return
    first_item = 0
    for first in range(0, seq, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        parts = _parts(_keys(seq_lens_ptr, offs_b, num_seqs, room, window), share)
        first_item += tl.sum(tl.where(offs_b < seq, parts, 0))

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    peak, total = tl.full([], LOWEST, tl.float32), 0.0
    mixed = tl.zeros([BLOCK_D], tl.float32)
    for part in range(0, last_part, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)
        mask_p = offs_p < last_part
        line = (first_item + offs_p).to(tl.int64) * heads + head
        peaks = tl.load(stats_ptr + line * 2, mask=mask_p, other=float("-inf"))
        totals = tl.load(stats_ptr + line * 2 + 1, mask=mask_p, other=0.0)
        partial = tl.load(partial_ptr + line[:, None] * HEAD_DIM + offs_d, mask=mask_p[:, None] & mask_d, other=0.0)
        before, peak = peak, tl.maximum(peak, tl.max(peaks, 0))
        weights = tl.exp2(peaks - peak)
        shrink = tl.exp2(before - peak)
        total = total * shrink + tl.sum(weights * totals, 0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * partial, 0)
    if sinks_ptr is not None:
        peak, total, shrink = add_sink(tl.load(sinks_ptr + head), peak, total)
        mixed *= shrink
    mixed /= tl.where(total > 0, total, 1.0)
    out_ptr += (seq.to(tl.int64) * heads + head) * HEAD_DIM + offs_d
    tl.store(out_ptr, mixed.to(out_ptr.dtype.element_ty), mask=mask_d)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    block_h: int        # at most
    block_n: int
    num_warps: int
    num_stages: int
    programs: int       # that a compute unit holds at a time
    least: int          # fewest keys that a sequence is split for
    block_b: int = 256  # lengths looked at at a time
    options: dict = field(default_factory=dict)


def config(arch: Arch | None, head_dim: int, dtype: torch.dtype) -> Config:
    """The configuration for an architecture (None: the interpreter).

    On CDNA a program is one wave: with several, each would repeat the whole of Q K' and wait for the others at
    barriers; four or more of them on a SIMD hide each other's loads.
    """
    if arch is None:
        return Config(64, 32, 1, 1, programs=8, least=32)
    if arch.matrix == "mfma":
        return Config(32, 16, 1, 1, programs=16, least=64, options={"matrix_instr_nonkdim": 16})
    if arch.vendor == "amd":
        return Config(16, 16, 4, 1, programs=8, least=128)
    if dtype == torch.float32 or arch.lds_bytes < 128 * 1024:
        return Config(16, 16, 4, 2, programs=4, least=128)
    return Config(64, 64 if head_dim <= 128 else 32, 4, 3, programs=8, least=128)


def launch(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
           sliding_window: int, logit_cap: float, sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
           config: Config, keys_per_program: int = 0) -> Tensor:
    """keys_per_program > 0 fixes how sequences are split, so that none's result depends on its batch mates."""
    num_seqs, heads, head_dim = query.shape
    _, page_size, kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    block_h = max(16, min(config.block_h, triton.next_power_of_2(group)))
    block_d = max(16, triton.next_power_of_2(head_dim))
    tiles = kv_heads * triton.cdiv(group, block_h)
    room = page_table.shape[1] * page_size
    keys = min(room, sliding_window) if sliding_window > 0 else room
    least = keys_per_program or config.least
    # Where shares are fixed, more programs than any batch can use: then `least` decides.
    programs = 2**30 if keys_per_program else max(1, platform.compute_units() * config.programs // tiles)
    # Every sequence has a part; beyond that, at most one per share of the batch's keys: no need to know the lengths.
    most = max(1, (keys + least // 2) // least)
    items = min(num_seqs * most, num_seqs + programs)
    partial = stats = out  # unused where no sequence can have a second part
    if most > 1:
        partial = torch.empty((items, heads, head_dim), dtype=torch.float32, device=query.device)
        stats = torch.empty((items, heads, 2), dtype=torch.float32, device=query.device)
    lengths = (num_seqs, heads, room, sliding_window, programs, least)
    strides = (*query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3])
    unit = unit_of(head_dim, *strides)
    _paged_attention_kernel[tiles, items](
        out, partial, stats, query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale, scale,
        logit_cap, *lengths, *(s // unit for s in strides), page_table.stride(0), UNIT=unit, GROUP=group,
        HEAD_DIM=head_dim, PAGE_SIZE=page_size, CAPPED=logit_cap > 0, WIDE=is_wide(key_cache, value_cache),
        BLOCK_B=config.block_b, BLOCK_H=block_h, BLOCK_N=config.block_n, BLOCK_D=block_d, num_warps=config.num_warps,
        num_stages=config.num_stages, **config.options)
    if most > 1:
        _paged_attention_merge_kernel[heads, num_seqs](
            out, partial, stats, seq_lens, sinks, *lengths, HEAD_DIM=head_dim, BLOCK_B=config.block_b, BLOCK_P=16,
            BLOCK_D=block_d, num_warps=4)
    return out


@paged_attention.backend("triton", supports=lambda query, key_cache, *args, **kwargs: unsupported(query, key_cache))
def run(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
        sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None) -> Tensor:
    return launch(query, key_cache, value_cache, page_table, seq_lens, scale, sliding_window, logit_cap, sinks, k_scale,
                  v_scale, config(platform.arch(), query.shape[2], query.dtype))
