"""AITER's paged_attention_v1, compiled from its HIP source as it is first called, on pages as ours are, "NHD". The
assembly in its wheel (`pa_fwd_asm`) wants keys and values in other layouts, in which a pool would have to be copied at
each call, and is not called.

What lies in a sequence's last page behind its last token is multiplied by 0, and has to be numbers: a pool begins as
zeros, as the server's does."""

import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.aiter import HALVES, bind, call
from wave64.backends.hip import unaligned
from wave64.quant import FP8

GIVEN = ("out", "workspace_buffer", "query", "key_cache", "value_cache", "scale", "block_tables", "cu_query_lens",
         "context_lens", "max_context_len", "alibi_slopes", "kv_cache_dtype", "kv_cache_layout", "logits_soft_cap",
         "k_scale", "v_scale", "partition_size", "sliding_window")
HEAD_DIMS, PAGES, MAX_GROUP = (64, 128), (16, 32), 16
PARTITION = 256  # keys of a workgroup


def supports(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
             sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None,
             k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> str | None:
    _, page_size, kv_heads, dim = key_cache.shape
    if query.dtype not in HALVES or key_cache.dtype not in (query.dtype, *FP8.values()):
        return f"takes bf16 and fp16, and FP8 in the cache, not {query.dtype} and {key_cache.dtype}"
    if dim not in HEAD_DIMS or page_size not in PAGES:
        return f"takes heads of 64 or 128 and pages of 16 or 32, these are {dim} and {page_size}"
    if query.shape[1] > MAX_GROUP * kv_heads:
        return f"takes at most {MAX_GROUP} heads of queries on one of keys, these are {query.shape[1] // kv_heads}"
    if sinks is not None:
        return "has no sinks"
    if key_cache.dtype == query.dtype and not (k_scale is None and v_scale is None):
        return "takes scales for a cache in FP8 alone"
    if any(s is not None and s.numel() > 1 for s in (k_scale, v_scale)):
        return "takes one scale of keys and one of values, these are one a head"
    if sliding_window >= 0 and logit_cap > 0:
        return "caps the logits of keys outside the window, too, which then count"
    if not (page_table.is_contiguous() and query.stride(1) == dim and key_cache.stride() == value_cache.stride()):
        return "takes a contiguous page table, heads one after another, and caches of the same strides"
    if not (key_cache.numel() and page_table.numel()):
        return "takes no empty cache and no empty page table"
    return unaligned(query, key_cache, value_cache)


@bind(ops.paged_attention, {"paged_attention_v1": GIVEN}, supports=supports)
def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
                    scale: float, sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None,
                    k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    rows, heads, dim = query.shape
    longest = page_table.shape[1] * key_cache.shape[1]
    partitions = rows * heads * -(-longest // PARTITION)
    ones = torch.ones(1, dtype=torch.float32, device=query.device)
    is_fp8 = key_cache.dtype != query.dtype
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    call("paged_attention_v1", out=out, query=query, scale=scale, block_tables=page_table, context_lens=seq_lens,
         workspace_buffer=torch.empty(partitions * (dim * query.element_size() + 8), dtype=torch.uint8,
                                      device=query.device),  # a part and two fp32 numbers a partition
         key_cache=key_cache.view(torch.uint8) if is_fp8 else key_cache,
         value_cache=value_cache.view(torch.uint8) if is_fp8 else value_cache, cu_query_lens=None,
         max_context_len=longest, alibi_slopes=None, kv_cache_dtype="fp8" if is_fp8 else "auto", kv_cache_layout="NHD",
         logits_soft_cap=logit_cap, k_scale=ones if k_scale is None else k_scale.float(),
         v_scale=ones if v_scale is None else v_scale.float(), partition_size=PARTITION,
         sliding_window=max(0, sliding_window))
    return out.masked_fill_((seq_lens == 0)[:, None, None], 0)
