"""Decode attention over a paged cache, split along the keys.

The trick: the query heads of one KV head form one tile, so keys are read once, and the batch's keys are split evenly
among programs, each of which computes its split from the lengths (splits.py): a long sequence gets many programs, a
short one gets one, and the host does not have to know the lengths. A second kernel merges the splits of a sequence.
On CDNA a program is one wave: with several, each would repeat all of Q K^T and wait for the others at barriers. Four
programs per SIMD (118 registers, 4 KiB of LDS each) hide each other's loads. A key takes 15 instructions on gfx942 and
13 on gfx950, with an FP8 cache 20 and 15, where SGLang's four waves take 36 and 27.
Bound by: reading keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from wave64.arch import Arch
from wave64.ops import paged_attention
from wave64.quant import kv_scales_of
from wave64.triton_ops import merge_splits
from wave64.triton_ops.attention import (
    LOWEST,
    add_sink,
    base2_logits,
    dot,
    is_wide,
    load_pages,
    load_rows,
    round_weights,
    tile_width,
    unit_of,
    unsupported,
)
from wave64.triton_ops.geometry import matrix_options
from wave64.triton_ops.splits import SPLIT, find_split, length_blocks, plan_splits, split_range, upcast
from wave64.tuning import Tuning

#: In units of UNIT elements, so that kernels need not be specialized on their values.
STRIDES = ["stride_qb", "stride_qh", "stride_kp", "stride_kn", "stride_kh", "stride_vp", "stride_vn", "stride_vh",
           "stride_tb"]


@triton.jit(do_not_specialize=[*SPLIT, "heads", *STRIDES])
def _paged_attention_kernel(out_ptr, partial_ptr, stats_ptr, q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr,
                            sinks_ptr, k_scale_ptr, v_scale_ptr, scale, logit_cap, num_seqs, capacity, window,
                            programs, min_keys, heads, stride_qb, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp,
                            stride_vn, stride_vh, stride_tb, UNIT: tl.constexpr, GROUP: tl.constexpr,
                            HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CAPPED: tl.constexpr,
                            WIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, CDNA: tl.constexpr, HALF_UP: tl.constexpr,
                            OVERLAP: tl.constexpr, BLOCK_B: tl.constexpr, ONE_BLOCK_B: tl.constexpr,
                            BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_H heads of one group, one split of one sequence's keys."""
    item = tl.program_id(1)
    seq, first_item, keys, num_splits = find_split(item, seq_lens_ptr, num_seqs, capacity, window, programs, min_keys,
                                                   0, BLOCK_B, ONE_BLOCK_B, CDNA)
    if OVERLAP:
        gdc_launch_dependents()
    if seq >= num_seqs:
        return

    length = keys
    if window > 0:
        length = tl.maximum(0, tl.minimum(tl.load(seq_lens_ptr + seq), capacity))
    first_key = length - keys
    first_block = first_key // BLOCK_N
    blocks = tl.cdiv(length, BLOCK_N) - first_block
    start, end = split_range(item - first_item, num_splits, first_block, blocks, BLOCK_N)
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
        scale *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)

    EXACT: tl.constexpr = HALF_UP and k_ptr.dtype.element_ty.primitive_bitwidth == 8  # conversion of the cache
    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for block in range(start, end, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= first_key) & (offs_n < end)
        offs_n = tl.minimum(tl.maximum(offs_n, first_key), end - 1)
        pages = load_pages(table_ptr, block, offs_n, PAGE_SIZE, BLOCK_N, WIDE)
        k = load_rows(k_ptr, pages, offs_n, stride_kp, stride_kn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        v = load_rows(v_ptr, pages, offs_n, stride_vp, stride_vn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        k, v = upcast(k, q.dtype, EXACT), upcast(v, q.dtype, EXACT)
        s = base2_logits(dot(q, tl.trans(k)), scale, logit_cap, CAPPED)
        s = tl.where(mask_n, s, float("-inf"))
        old_max, row_max = row_max, tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - row_max[:, None])
        rescale = tl.exp2(old_max - row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = dot(round_weights(p, v.dtype, HALF_UP), v, acc * rescale[:, None])
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + kv_head * SCALE_STRIDE)

    if num_splits == 1:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + offs_h, mask=mask_h, other=0.0)
            row_max, row_sum, rescale = add_sink(sink, row_max, row_sum)
            acc *= rescale[:, None]
        acc /= tl.where(row_sum > 0, row_sum, 1)[:, None]
        row_out = seq * heads + offs_h
        tl.store(out_ptr + row_out[:, None] * HEAD_DIM + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_hd)
    else:
        row_out = item.to(tl.int64) * heads + offs_h
        tl.store(partial_ptr + row_out[:, None] * HEAD_DIM + offs_d, acc, mask=mask_hd)
        tl.store(stats_ptr + row_out * 2, row_max, mask=mask_h)
        tl.store(stats_ptr + row_out * 2 + 1, row_sum, mask=mask_h)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    block_h: int        # at most
    block_n: int
    num_warps: int
    num_stages: int
    programs: int       # per compute unit at a time
    min_keys: int       # per split, at least
    cdna: bool = False  # keep uniform values in scalar registers
    half_up: bool = False  # see attention.round_weights
    block_b: int = 0    # lengths read at a time; 0: chosen by batch size
    options: dict = field(default_factory=dict)


def key(query: Tensor, key_cache: Tensor, **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    num_seqs, heads, head_dim = query.shape
    return {"head_dim": head_dim, "fp32": query.dtype == torch.float32, "fp8": key_cache.dtype.itemsize == 1,
            "group": heads // key_cache.shape[2], "num_seqs": num_seqs}


def work(config: Config, group: int, **others) -> int:
    """(query head, key) pairs that a block processes at a time, without rows beyond the group's heads."""
    return min(config.block_h, group) * config.block_n


def candidates(arch: Arch, head_dim: int, fp32: bool, **others) -> Iterator[Config]:
    """What the tuner tries."""
    if arch.matrix == "mfma":
        for block_n in (16, 32, 64):
            for num_warps, num_stages in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
                yield Config(32, block_n, num_warps, num_stages, programs=16 // num_warps, min_keys=64, cdna=True,
                             half_up=arch.name != "gfx950", options=matrix_options(arch, 16))
        return
    hopper = arch.matrix == "wgmma" and not fp32
    if hopper:
        # The keys of a block wait for its page numbers: with five stages, loads of two blocks of keys are in flight,
        # with seven, of three.
        shapes = [(32, 1, 5), (32, 2, 5), (64, 2, 5), (64, 4, 3), (64, 4, 5), (64, 2, 7), (128, 4, 3)]
    else:
        shapes = [(n, waves, stages) for n in (16, 32, 64) for waves in (2, 4) for stages in (1, 2)]
    for block_n, num_warps, num_stages in shapes:
        lds_bytes = (num_stages + 1) * block_n * triton.next_power_of_2(head_dim) * (4 if fp32 else 2)
        if lds_bytes <= arch.lds_bytes:
            # As many as fit, so that all run at once; or more and shorter ones, so that less is idle at the end.
            for programs in (2, 4, 8) if hopper else sorted({min(8, arch.lds_bytes // lds_bytes), 8}):
                yield Config(32, block_n, num_warps, num_stages, programs, min_keys=128)


#: With few sequences all are split, hence the buckets of num_seqs.
TUNING = Tuning("paged_attention", config=Config, key=key, candidates=candidates, work=work,
                buckets={"head_dim": (64, 128, 192), "group": (16,), "num_seqs": (16, 64)})


def launch(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
           sliding_window: int, logit_cap: float, sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
           config: Config, keys_per_split: int = 0) -> Tensor:
    """keys_per_split: see splits.plan_splits."""
    num_seqs, heads, head_dim = query.shape
    _, page_size, kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    k_scale, v_scale, scale_stride = kv_scales_of(k_scale, v_scale, kv_heads)
    group = heads // kv_heads
    block_h = max(16, min(config.block_h, triton.next_power_of_2(group)))
    block_d = tile_width(head_dim)
    tiles = kv_heads * triton.cdiv(group, block_h)
    split = plan_splits(page_table, page_size, tiles, config.programs, config.min_keys, sliding_window, keys_per_split)
    partial, stats = split.partials(heads, head_dim, out)
    strides = (*query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3])
    unit = unit_of(head_dim, *strides)
    _paged_attention_kernel[tiles, split.num_items](
        out, partial, stats, query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale, scale,
        logit_cap, *split, heads, *(s // unit for s in strides), page_table.stride(0), UNIT=unit, GROUP=group,
        HEAD_DIM=head_dim, PAGE_SIZE=page_size, CAPPED=logit_cap > 0, WIDE=is_wide(key_cache, value_cache),
        SCALE_STRIDE=scale_stride, CDNA=config.cdna, HALF_UP=config.half_up, OVERLAP=split.overlap,
        BLOCK_H=block_h, BLOCK_N=config.block_n, BLOCK_D=block_d,
        **length_blocks(num_seqs, config.block_b)._asdict(),
        num_warps=config.num_warps, num_stages=config.num_stages, **config.options)
    if split.max_splits > 1:
        merge_splits.launch(out, None, partial, stats, seq_lens, sinks, split, 0)
    return out


@paged_attention.backend("triton", tuning=TUNING,
                         supports=lambda query, key_cache, *args, **kwargs: unsupported(query, key_cache))
def run(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
        sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None) -> Tensor:
    return launch(query, key_cache, value_cache, page_table, seq_lens, scale, sliding_window, logit_cap, sinks, k_scale,
                  v_scale, TUNING.choose(**key(query, key_cache)))
