"""Prefill attention over a paged cache: the newest tokens of each sequence against all of its keys.

The trick: a running maximum and sum per query, so that scores never leave the registers, and separate loops, so that
only blocks on an edge (a window's start, the diagonal, the sequence's end) pay for masks.
Bound by: the matrix units for prompts; by reading keys and values for a few new tokens behind a long prefix.
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import prefill_attention
from wave64.triton_ops.attention import (
    LN_2,
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


@triton.jit
def _attend(q, peak, total, mixed, position, first, last, lowest, length, window, k_ptr, v_ptr, table_ptr, scale,
            logit_cap, stride_kp, stride_kn, stride_vp, stride_vn, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
            WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
            HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Takes the blocks of keys from `first`, a multiple of BLOCK_N, to `last` into peak, total and mixed.

    EDGE: some of the keys are hidden from some queries; those outside [lowest, length) may not even be read.
    """
    for block in range(first, last, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= lowest) & (offs_n < length)
        valid_n = tl.minimum(tl.maximum(offs_n, lowest), length - 1) if EDGE else offs_n
        pages = load_pages(table_ptr, block, valid_n, PAGE_SIZE, BLOCK_N, WIDE)
        k = load_rows(k_ptr, pages, valid_n, stride_kp, stride_kn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        s = base2_logits(dot(q, tl.trans(k.to(q.dtype))), scale, logit_cap, CAPPED)
        if EDGE:
            seen = mask_n[None, :]
            if CAUSAL:
                seen &= offs_n[None, :] <= position[:, None]
            if WINDOWED:
                seen &= offs_n[None, :] > position[:, None] - window
            s = tl.where(seen, s, float("-inf"))
        before, peak = peak, tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - peak[:, None])
        shrink = tl.exp2(before - peak)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, pages, valid_n, stride_vp, stride_vn, UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        mixed = dot(p.to(q.dtype), v.to(q.dtype), mixed * shrink[:, None])
    return peak, total, mixed


@triton.jit(do_not_specialize=["window", "room", "stride_qt", "stride_qh", "stride_kp", "stride_kn", "stride_kh",
                               "stride_vp", "stride_vn", "stride_vh", "stride_tb"])
def _prefill_attention_kernel(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, starts_ptr, seq_lens_ptr, sinks_ptr,
                              k_scale_ptr, v_scale_ptr, scale, logit_cap, window, room, stride_qt, stride_qh, stride_kp,
                              stride_kn, stride_kh, stride_vp, stride_vn, stride_vh, stride_tb, UNIT: tl.constexpr,
                              GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
                              WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_M new tokens of one sequence, one head."""
    head, seq = tl.program_id(0), tl.program_id(2)
    heads = tl.num_programs(0)
    start = tl.load(starts_ptr + seq)
    new = tl.load(starts_ptr + seq + 1) - start
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # those with most keys to see begin first
    if row >= new:
        return
    length = tl.minimum(tl.load(seq_lens_ptr + seq), room)
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < new
    mask_md = mask_m[:, None] & (offs_d < HEAD_DIM)
    token = start.to(tl.int64)
    q_ptr += (token * stride_qt + head * stride_qh) * UNIT
    q = tl.load(q_ptr + offs_m[:, None] * stride_qt * UNIT + offs_d, mask=mask_md, other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    k_ptr += kv_head * stride_kh * UNIT
    v_ptr += kv_head * stride_vh * UNIT
    table_ptr += seq.to(tl.int64) * stride_tb
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr)

    # Keys [lowest, end) are seen by some query of this block, blocks [inner, outer) by all of them.
    position = length - new + offs_m
    first_query = length - new + row
    last_query = tl.minimum(first_query + BLOCK_M, length) - 1
    end = tl.maximum(0, last_query + 1) if CAUSAL else length
    outer = (tl.maximum(0, first_query + 1) if CAUSAL else length) // BLOCK_N * BLOCK_N
    lowest = tl.maximum(0, first_query - window + 1) if WINDOWED else 0
    first = lowest // BLOCK_N * BLOCK_N
    inner = first
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOWED:
        inner = tl.minimum(tl.cdiv(tl.maximum(0, last_query - window + 1), BLOCK_N) * BLOCK_N, end)
        peak, total, mixed = _attend(
            q, peak, total, mixed, position, first, inner, lowest, length, window, k_ptr, v_ptr, table_ptr, scale,
            logit_cap, stride_kp, stride_kn, stride_vp, stride_vn, True, CAUSAL, WINDOWED, CAPPED, WIDE, UNIT,
            HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D)
    peak, total, mixed = _attend(
        q, peak, total, mixed, position, inner, outer, lowest, length, window, k_ptr, v_ptr, table_ptr, scale,
        logit_cap, stride_kp, stride_kn, stride_vp, stride_vn, False, CAUSAL, WINDOWED, CAPPED, WIDE, UNIT, HEAD_DIM,
        PAGE_SIZE, BLOCK_N, BLOCK_D)
    peak, total, mixed = _attend(
        q, peak, total, mixed, position, tl.maximum(inner, outer), end, lowest, length, window, k_ptr, v_ptr,
        table_ptr, scale, logit_cap, stride_kp, stride_kn, stride_vp, stride_vn, True, CAUSAL, WINDOWED, CAPPED, WIDE,
        UNIT, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D)

    if v_scale_ptr is not None:
        mixed *= tl.load(v_scale_ptr)
    if sinks_ptr is not None:
        peak, total, shrink = add_sink(tl.load(sinks_ptr + head), peak, total)
        mixed *= shrink[:, None]
    some = total > 0
    total = tl.where(some, total, 1)
    mixed /= total[:, None]
    out = (token + offs_m) * heads + head
    tl.store(out_ptr + out[:, None] * HEAD_DIM + offs_d, mixed.to(out_ptr.dtype.element_ty), mask=mask_md)
    tl.store(lse_ptr + out, tl.where(some, (peak + tl.log2(total)) * LN_2, float("-inf")), mask=mask_m)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    options: dict = field(default_factory=dict)


def config(arch: Arch | None, head_dim: int, dtype: torch.dtype, capped: bool) -> Config:
    """The configuration for an architecture (None: the interpreter)."""
    if arch is None:
        return Config(32, 32, 1, 1)
    if arch.matrix == "mfma":  # the largest blocks that leave two waves on a SIMD, without spills
        options = {"matrix_instr_nonkdim": 16}
        if dtype == torch.float32:
            return Config(64, 16, 4, 1, options) if head_dim <= 128 else Config(32, 16, 8, 1, options)
        if head_dim > 128:
            return Config(128, 16 if capped else 32, 8, 1, options)
        if capped:
            return Config(128, 32, 8, 1, options)
        return Config(128, 64, 8, 1 if arch.name == "gfx90a" else 2, options)
    if arch.vendor == "amd":
        return Config(16, 16, 8, 1) if dtype == torch.float32 else Config(64, 16, 4, 1)
    if dtype == torch.float32:
        return Config(32, 16, 8, 1)
    if arch.lds_bytes < 128 * 1024:
        return Config(32, 32, 4, 1)
    return Config(64, 64, 4, 3 if head_dim <= 128 else 2)


@prefill_attention.backend("triton", supports=lambda query, key_cache, *args, **kwargs: unsupported(query, key_cache))
def run(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
        seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
        logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = query.shape
    _, page_size, kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=query.device)
    if out.numel() == 0 or max_seqlen_q == 0:
        return out, lse
    chosen = config(platform.arch(), head_dim, query.dtype, logit_cap > 0)
    grid = (heads, triton.cdiv(max_seqlen_q, chosen.block_m), len(seq_lens))
    strides = (*query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3])
    unit = unit_of(head_dim, *strides)
    _prefill_attention_kernel[grid](
        out, lse, query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, sinks, k_scale, v_scale, scale,
        logit_cap, sliding_window, page_table.shape[1] * page_size, *(s // unit for s in strides),
        page_table.stride(0), UNIT=unit, GROUP=heads // kv_heads, CAUSAL=causal, WINDOWED=sliding_window > 0,
        CAPPED=logit_cap > 0, WIDE=is_wide(key_cache, value_cache), HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, **chosen.options)
    return out, lse
