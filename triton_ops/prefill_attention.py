"""Prefill attention over a paged cache: the newest tokens of each sequence against all of its keys.

The trick: online softmax, so that scores never leave the registers, and separate loops, so that only blocks at a
window's start, on the diagonal or at the sequence's end pay for masks. A score costs a maximum, a fused multiply-add,
an exponential, an add and half a conversion; page numbers are read a block ahead.
Bound by: the matrix units for prompts; by reading keys and values for a few new tokens after a long prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.arch import Arch
from wave64.ops import prefill_attention
from wave64.quant import kv_scales_of
from wave64.triton_ops.attention import (
    add_sink,
    assign_heads,
    attend_to_all,
    is_wide,
    load_query,
    split_width,
    store_rows,
    tile_width,
    unit_of,
    unsupported,
)
from wave64.triton_ops.geometry import matrix_options
from wave64.tuning import Tuning

POSITIVE, ANY_SIGN, CAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["window", "capacity", "stride_qt", "stride_qh", "stride_kp", "stride_kn", "stride_kh",
                               "stride_vp", "stride_vn", "stride_vh", "stride_tb"])
def _prefill_attention_kernel(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, starts_ptr, seq_lens_ptr, sinks_ptr,
                              k_scale_ptr, v_scale_ptr, scale, logit_cap, window, capacity, stride_qt, stride_qh,
                              stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh, stride_tb,
                              UNIT: tl.constexpr, GROUP: tl.constexpr, SCALE_STRIDE: tl.constexpr,
                              LOGITS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr,
                              SAME_STRIDES: tl.constexpr, HALF_UP: tl.constexpr, HEAD_DIM: tl.constexpr,
                              PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                              BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_M new tokens of one sequence, one head. LOGITS: POSITIVE, where neither scale is below 0 nor
    k_scale could be; ANY_SIGN; or CAPPED."""
    seq, heads = tl.program_id(2), tl.num_programs(0)
    head, kv_head = assign_heads(tl.program_id(0), heads, GROUP)
    start = tl.load(starts_ptr + seq)
    new = tl.load(starts_ptr + seq + 1) - start
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the queries with the most keys start first
    if row >= new:
        return
    length = tl.minimum(tl.load(seq_lens_ptr + seq), capacity)
    mask_m = row + tl.arange(0, BLOCK_M) < new
    token = (start + row).to(tl.int64)
    q, q_rest = load_query(q_ptr + (token * stride_qt + head * stride_qh) * UNIT, stride_qt * UNIT, mask_m, HEAD_DIM,
                           BLOCK_M, BLOCK_D, BLOCK_R)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + kv_head * SCALE_STRIDE)
    wide_head = kv_head.to(tl.int64) * UNIT
    keys = (k_ptr + wide_head * stride_kh, v_ptr + wide_head * stride_vh, table_ptr + seq.to(tl.int64) * stride_tb,
            stride_kp, stride_kn, stride_vp, stride_vn)
    row_max, row_sum, acc = attend_to_all(
        q, q_rest, row, new, length, window, scale, logit_cap, keys, LOGITS == ANY_SIGN, CAUSAL, WINDOWED,
        LOGITS == CAPPED, WIDE, SAME_STRIDES, HALF_UP, UNIT, HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
        BLOCK_R, BLOCK_V)
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + kv_head * SCALE_STRIDE)
    if sinks_ptr is not None:
        row_max, row_sum, rescale = add_sink(tl.load(sinks_ptr + head), row_max, row_sum)
        acc *= rescale[:, None]
    row_out = token * heads + head
    store_rows(out_ptr + row_out * HEAD_DIM, lse_ptr + row_out, heads, mask_m, row_max, row_sum, acc, HEAD_DIM, BLOCK_M,
               BLOCK_V)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    half_up: bool = False  # see attention.round_weights
    options: dict = field(default_factory=dict)


def key(query: Tensor, max_seqlen_q: int, logit_cap: float = 0.0, **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    return {"head_dim": query.shape[2], "fp32": query.dtype == torch.float32, "capped": logit_cap > 0,
            "max_seqlen_q": max_seqlen_q}


def work(config: Config, max_seqlen_q: int, **others) -> int:
    """(query, key) pairs that a block processes at a time, without rows beyond the last query."""
    return min(config.block_m, max_seqlen_q) * config.block_n


def blocks(arch: Arch, fp32: bool, max_seqlen_q: int, width: int, v_width: int) -> Iterator[Config]:
    """Candidates for queries and keys of `width` columns and values of `v_width`: block_m at most max_seqlen_q, and
    tiles that fit the LDS, as far as that is known before compiling."""
    if arch.matrix == "mfma":
        yield from _cdna_blocks(arch, fp32, max_seqlen_q)
        return
    if arch.matrix == "wgmma" and not fp32:
        # Two warpgroups of four waves, each with a product of 64 queries in flight; one, so that a multiprocessor runs
        # several blocks; four, with fewer registers each. Fewer keys at a time leave registers for a second block.
        shapes = [(128, 8, (128, 64, 32)), (64, 4, (128, 64, 32)), (256, 16, (32,))]
        if max_seqlen_q <= 64:  # below 64 queries the instructions are those of single waves, which split the keys
            shapes = [(64, 4, (128, 64, 32)), (32, 4, (128, 64)), (16, 4, (128, 64, 32)), (16, 2, (64, 32))]
            shapes = shapes[:2] if max_seqlen_q > 16 else shapes[2:] + shapes[:1]
        found = [(m, n, waves, stages) for m, waves, widths in shapes for n in widths for stages in (2, 3, 4)
                 if n * stages >= 96 or m < 64]
    else:
        rows = (16,) if max_seqlen_q <= 16 else (32, 64)
        found = [(m, n, waves, stages) for m in rows for n in (16, 32, 64) for waves in (4, 8) for stages in (1, 2)
                 if m * n <= 2048]
    for block_m, block_n, num_warps, num_stages in found:
        key_bytes = (4 if fp32 else 2) * (width + triton.next_power_of_2(v_width))  # and of a value
        lds_bytes = (4 if fp32 else 2) * width * block_m + num_stages * block_n * key_bytes
        if lds_bytes <= arch.lds_bytes:
            yield Config(block_m, block_n, num_warps, num_stages)


def _cdna_blocks(arch: Arch, fp32: bool, max_seqlen_q: int) -> Iterator[Config]:
    """Candidates for CDNA: (block_m, waves, queries of a matrix instruction) times (block_n, stages)."""
    if fp32:
        shapes = [(64, 4, 16), (32, 4, 16), (32, 8, 16), (16, 4, 16)]
    elif max_seqlen_q <= 16:
        shapes = [(16, 1, 16), (16, 2, 16), (16, 4, 16), (32, 1, 32)]
    elif max_seqlen_q <= 64:
        shapes = [(64, 4, 16), (64, 2, 32), (32, 2, 16), (32, 1, 32)]
    else:
        shapes = [(128, 4, 32), (128, 8, 16), (64, 2, 32), (64, 4, 16), (256, 8, 32)]
    for block_m, num_warps, size in shapes:
        for block_n, num_stages in ((16, 1), (32, 1)) if fp32 else ((32, 2), (32, 1), (64, 1), (16, 2)):
            yield Config(block_m, block_n, num_warps, num_stages, not fp32 and arch.name in ("gfx90a", "gfx942"),
                         matrix_options(arch, size))


def candidates(arch: Arch, head_dim: int, fp32: bool, max_seqlen_q: int, **others) -> Iterator[Config]:
    """What the tuner tries."""
    return blocks(arch, fp32, max_seqlen_q, head_dim, head_dim)


TUNING = Tuning("prefill_attention", config=Config, key=key, candidates=candidates, work=work,
                buckets={"head_dim": (64, 128, 192), "max_seqlen_q": (16, 64)})


def launch(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
           seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool, sliding_window: int, logit_cap: float,
           sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
           config: Config) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = query.shape
    _, page_size, kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=query.device)
    if out.numel() == 0 or max_seqlen_q == 0:
        return out, lse
    grid = (heads, triton.cdiv(max_seqlen_q, config.block_m), len(seq_lens))
    strides = (*query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3])
    unit = unit_of(head_dim, *strides)
    block_d, block_r = split_width(head_dim)
    k_scale, v_scale, scale_stride = kv_scales_of(k_scale, v_scale, kv_heads)
    logits = CAPPED if logit_cap > 0 else ANY_SIGN if scale < 0 or k_scale is not None else POSITIVE
    _prefill_attention_kernel[grid](
        out, lse, query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, sinks, k_scale, v_scale,
        float(scale), float(logit_cap), sliding_window, page_table.shape[1] * page_size, *(s // unit for s in strides),
        page_table.stride(0), UNIT=unit, GROUP=heads // kv_heads, SCALE_STRIDE=scale_stride, LOGITS=logits.value,
        CAUSAL=causal, WINDOWED=sliding_window > 0, WIDE=is_wide(key_cache, value_cache),
        SAME_STRIDES=key_cache.stride()[:2] == value_cache.stride()[:2], HALF_UP=config.half_up, HEAD_DIM=head_dim,
        PAGE_SIZE=page_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_R=block_r,
        BLOCK_V=tile_width(head_dim), num_warps=config.num_warps, num_stages=config.num_stages, **config.options)
    return out, lse


@prefill_attention.backend("triton", tuning=TUNING,
                           supports=lambda query, key_cache, *args, **kwargs: unsupported(query, key_cache))
def run(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
        seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
        logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return launch(query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, max_seqlen_q, scale, causal,
                  sliding_window, logit_cap, sinks, k_scale, v_scale,
                  TUNING.choose(**key(query, max_seqlen_q, logit_cap)))
