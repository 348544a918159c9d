"""Decode attention over a paged cache, split along the keys.

The trick: the heads that share a key head form one tile, so keys are read once, and the batch's keys are dealt out in
shares of equal size, which each program works out for itself from the lengths: a long sequence gets many programs, a
short one one, and the host need not know which. A second kernel merges the shares of a sequence.
Bound by: reading keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import paged_attention
from wave64.quant import FP8
from wave64.triton_ops import merge_splits
from wave64.triton_ops.attention import (
    LOWEST,
    add_sink,
    base2_logits,
    dot,
    is_wide,
    load_pages,
    load_rows,
    narrow,
    tile_width,
    unit_of,
    unsupported,
)
from wave64.triton_ops.geometry import matrix_options
from wave64.triton_ops.splits import (
    LENGTHS,
    deal,
    looks,
    most_parts,
    overlaps,
    uniform,
    widened,
)
from wave64.tuning import choose

#: Say nothing that UNIT does not: none is worth another compilation.
STRIDES = ["stride_qb", "stride_qh", "stride_kp", "stride_kn", "stride_kh", "stride_vp", "stride_vn", "stride_vh",
           "stride_tb"]


@triton.jit(do_not_specialize=[*LENGTHS, "heads", *STRIDES])
def _paged_attention_kernel(out_ptr, partial_ptr, stats_ptr, q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr,
                            sinks_ptr, k_scale_ptr, v_scale_ptr, scale, logit_cap, num_seqs, room, window,
                            programs, least, heads, stride_qb, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp,
                            stride_vn, stride_vh, stride_tb, UNIT: tl.constexpr, GROUP: tl.constexpr,
                            HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CAPPED: tl.constexpr,
                            WIDE: tl.constexpr, FP8_CACHE: tl.constexpr, CDNA: tl.constexpr, HALF_UP: tl.constexpr,
                            OVERLAP: tl.constexpr, BLOCK_B: tl.constexpr, ONE_LOOK: tl.constexpr,
                            BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_H heads of one group, one part of one sequence's keys."""
    item = tl.program_id(1)
    seq, first_item, keys, parts = deal(item, seq_lens_ptr, num_seqs, room, window, programs, least, 0,
                                        BLOCK_B, ONE_LOOK)
    seq, first_item = uniform(seq, CDNA), uniform(first_item, CDNA)
    keys, parts = uniform(keys, CDNA), uniform(parts, CDNA)
    if OVERLAP:
        gdc_launch_dependents()
    if seq >= num_seqs:
        return

    length = keys
    if window > 0:
        length = tl.maximum(0, tl.minimum(tl.load(seq_lens_ptr + seq), room))
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
        k = load_rows(k_ptr, pages, offs_n, stride_kp, stride_kn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        v = load_rows(v_ptr, pages, offs_n, stride_vp, stride_vn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        k, v = widened(k, q.dtype, HALF_UP and FP8_CACHE), widened(v, q.dtype, HALF_UP and FP8_CACHE)
        s = base2_logits(dot(q, tl.trans(k)), scale, logit_cap, CAPPED)
        s = tl.where(mask_n, s, float("-inf"))
        before, peak = peak, tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - peak[:, None])
        shrink = tl.exp2(before - peak)
        total = total * shrink + tl.sum(p, 1)
        mixed = dot(narrow(p, v.dtype, HALF_UP), v, mixed * shrink[:, None])
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


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    block_h: int        # at most
    block_n: int
    num_warps: int
    num_stages: int
    programs: int       # that a compute unit holds at a time
    least: int          # fewest keys that a sequence is split for
    cdna: bool = False  # scalars kept in scalar registers
    half_up: bool = False  # round weights to bf16 with two instructions, where there is none for it
    block_b: int = 0    # lengths looked at at a time; 0: as suits the batch
    options: dict = field(default_factory=dict)


#: Bounds of the integer facts that the tuner takes for alike; a few sequences are all split.
BUCKETS = {"head_dim": (64, 128, 192), "group": (16,), "num_seqs": (16, 64)}


def facts(query: Tensor, key_cache: Tensor, **others) -> dict[str, int | bool]:
    """Of a call's arguments, by their names, what the choice of a configuration depends on."""
    num_seqs, heads, head_dim = query.shape
    return {"head_dim": head_dim, "fp32": query.dtype == torch.float32, "fp8": key_cache.dtype.itemsize == 1,
            "group": heads // key_cache.shape[2], "num_seqs": num_seqs}


def pairs(config: Config, group: int, **others) -> int:
    """Pairs of query head and key that a block takes at a time; rows beyond the group's heads do not count."""
    return min(config.block_h, group) * config.block_n


def candidates(arch: Arch, head_dim: int, fp32: bool, **others) -> Iterator[Config]:
    """What the tuner tries beside the present configuration."""
    if arch.matrix == "mfma":
        for block_n in (16, 32, 64):
            for num_warps, num_stages in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
                yield Config(32, block_n, num_warps, num_stages, programs=16 // num_warps, least=64, cdna=True,
                             half_up=arch.name != "gfx950", options=matrix_options(arch, 16))
        return
    hopper = arch.matrix == "wgmma" and not fp32
    if hopper:
        # A block's keys wait for its page numbers, so that five stages are two blocks of keys under way, seven three.
        shapes = [(32, 1, 5), (32, 2, 5), (64, 2, 5), (64, 4, 3), (64, 4, 5), (64, 2, 7), (128, 4, 3)]
    else:
        shapes = [(n, waves, stages) for n in (16, 32, 64) for waves in (2, 4) for stages in (1, 2)]
    for block_n, num_warps, num_stages in shapes:
        lds_bytes = (num_stages + 1) * block_n * triton.next_power_of_2(head_dim) * (4 if fp32 else 2)
        if lds_bytes <= arch.lds_bytes:
            # As many as fit, so that all run at once; or more, shorter ones, whose ends leave less idle.
            for programs in (2, 4, 8) if hopper else sorted({min(8, arch.lds_bytes // lds_bytes), 8}):
                yield Config(32, block_n, num_warps, num_stages, programs, least=128)


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
    block_d = tile_width(head_dim)
    tiles = kv_heads * triton.cdiv(group, block_h)
    room = page_table.shape[1] * page_size
    keys = min(room, sliding_window) if sliding_window > 0 else room
    least = keys_per_program or config.least
    # Where shares are fixed, more programs than any batch can use: then `least` decides.
    programs = 2**30 if keys_per_program else max(1, platform.compute_units() * config.programs // tiles)
    # Every sequence has a part; beyond that, at most one per share of the batch's keys: no need to know the lengths.
    most = most_parts(keys, least)
    items = min(num_seqs * most, num_seqs + programs)
    partial = stats = out  # unused where no sequence can have a second part
    if most > 1:
        partial = torch.empty((items, heads, head_dim), dtype=torch.float32, device=query.device)
        stats = torch.empty((items, heads, 2), dtype=torch.float32, device=query.device)
    lengths = (num_seqs, room, sliding_window, programs, least)
    strides = (*query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3])
    unit = unit_of(head_dim, *strides)
    overlap = most > 1 and overlaps()
    _paged_attention_kernel[tiles, items](
        out, partial, stats, query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale, scale,
        logit_cap, *lengths, heads, *(s // unit for s in strides), page_table.stride(0), UNIT=unit, GROUP=group,
        HEAD_DIM=head_dim, PAGE_SIZE=page_size, CAPPED=logit_cap > 0, WIDE=is_wide(key_cache, value_cache),
        FP8_CACHE=key_cache.dtype in FP8.values(), CDNA=config.cdna, HALF_UP=config.half_up, OVERLAP=overlap,
        BLOCK_H=block_h, BLOCK_N=config.block_n, BLOCK_D=block_d, **looks(num_seqs, config.block_b),
        num_warps=config.num_warps, num_stages=config.num_stages, **config.options)
    if most > 1:
        merge_splits.launch(out, None, partial, stats, seq_lens, sinks, lengths, 0, most, overlap)
    return out


@paged_attention.backend("triton", supports=lambda query, key_cache, *args, **kwargs: unsupported(query, key_cache))
def run(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
        sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None) -> Tensor:
    return launch(query, key_cache, value_cache, page_table, seq_lens, scale, sliding_window, logit_cap, sinks, k_scale,
                  v_scale, choose("paged_attention", Config, **facts(query, key_cache)))
