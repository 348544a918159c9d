"""Ragged attention: keys and values of all sequences are concatenated, without pages. The loop of prefill_attention.

The trick: a head_dim that is not a power of two (MLA's 192 = 128 + 64) is multiplied as two tiles, without padding.
Bound by: the matrix units.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.arch import Arch
from wave64.ops import varlen_attention
from wave64.triton_ops.attention import (
    assign_heads,
    attend_to_all,
    is_wide,
    load_query,
    split_width,
    store_rows,
    tile_width,
    unit_of,
)
from wave64.triton_ops.prefill_attention import Config, blocks, work
from wave64.tuning import Tuning


@triton.jit(do_not_specialize=["stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh"])
def _varlen_attention_kernel(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, starts_q_ptr, starts_k_ptr, scale, stride_qt,
                             stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, UNIT: tl.constexpr,
                             GROUP: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, CAUSAL: tl.constexpr,
                             WIDE: tl.constexpr, SAME_STRIDES: tl.constexpr, HALF_UP: tl.constexpr,
                             QK_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_M queries of one sequence, one head."""
    seq, heads = tl.program_id(2), tl.num_programs(0)
    head, kv_head = assign_heads(tl.program_id(0), heads, GROUP)
    start = tl.load(starts_q_ptr + seq)
    new = tl.load(starts_q_ptr + seq + 1) - start
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the queries with the most keys start first
    if row >= new:
        return
    first_key = tl.load(starts_k_ptr + seq)
    length = tl.load(starts_k_ptr + seq + 1) - first_key
    mask_m = row + tl.arange(0, BLOCK_M) < new
    token, first_key = (start + row).to(tl.int64), first_key.to(tl.int64)
    q, q_rest = load_query(q_ptr + (token * stride_qt + head * stride_qh) * UNIT, stride_qt * UNIT, mask_m, QK_DIM,
                           BLOCK_M, BLOCK_D, BLOCK_R)
    keys = (k_ptr + (first_key * stride_kt + kv_head * stride_kh) * UNIT,
            v_ptr + (first_key * stride_vt + kv_head * stride_vh) * UNIT, None, 0, stride_kt, 0, stride_vt)
    row_max, row_sum, acc = attend_to_all(
        q, q_rest, row, new, length, 0, scale, 0.0, keys, NEGATIVE_SCALE, CAUSAL, False, False, WIDE, SAME_STRIDES,
        HALF_UP, UNIT, QK_DIM, V_DIM, 0, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V)
    row_out = token * heads + head
    store_rows(out_ptr + row_out * V_DIM, lse_ptr + row_out, heads, mask_m, row_max, row_sum, acc, V_DIM, BLOCK_M,
               BLOCK_V)


def unsupported(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> str | None:
    """The reason why the Triton kernel does not support these arguments, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {q.dtype} attention"
    widest = max(q.shape[2], v.shape[2])
    return f"keeps heads of at most 256 in registers, these have {widest}" if widest > 256 else None


def key(q: Tensor, v: Tensor, max_seqlen_q: int, **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    return {"qk_dim": q.shape[2], "v_dim": v.shape[2], "fp32": q.dtype == torch.float32, "max_seqlen_q": max_seqlen_q}


def candidates(arch: Arch, qk_dim: int, v_dim: int, fp32: bool, max_seqlen_q: int) -> Iterator[Config]:
    """What the tuner tries."""
    return blocks(arch, fp32, max_seqlen_q, qk_dim, v_dim)


TUNING = Tuning("varlen_attention", config=Config, key=key, candidates=candidates, work=work,
                buckets={"qk_dim": (64, 128, 192), "v_dim": (64, 128), "max_seqlen_q": (16, 64)})


def launch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
           max_seqlen_k: int, scale: float, causal: bool, config: Config) -> tuple[Tensor, Tensor]:
    tokens, heads, qk_dim = q.shape
    v_dim = v.shape[2]
    out = torch.empty((tokens, heads, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or max_seqlen_q == 0:
        return out, lse
    grid = (heads, triton.cdiv(max_seqlen_q, config.block_m), len(cu_seqlens_q) - 1)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    unit = unit_of(qk_dim, v_dim, *strides)
    block_d, block_r = split_width(qk_dim)
    _varlen_attention_kernel[grid](
        out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, float(scale), *(s // unit for s in strides), UNIT=unit,
        GROUP=heads // k.shape[1], NEGATIVE_SCALE=scale < 0, CAUSAL=causal, WIDE=is_wide(k, v),
        SAME_STRIDES=k.stride(0) == v.stride(0), HALF_UP=config.half_up, QK_DIM=qk_dim, V_DIM=v_dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_V=tile_width(v_dim),
        num_warps=config.num_warps, num_stages=config.num_stages, **config.options)
    return out, lse


@varlen_attention.backend("triton", tuning=TUNING, supports=unsupported)
def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    return launch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                  TUNING.choose(**key(q, v, max_seqlen_q)))
