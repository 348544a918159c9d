import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, launch, no_product, unaligned
from wave64.backends.hip_ops.mla_decode import absent
from wave64.backends.hip_ops.paged_attention import as_fp32, unsupported_pages

#: A block has 128 queries in four waves: of at most 64, half of them would only load.
MIN_SEQLEN_Q = 65


def unsupported(tensors: tuple[Tensor, ...], max_seqlen_q: int) -> str | None:
    """The reason why the kernels do not serve queries (the first of the tensors), keys and values, or None."""
    if max_seqlen_q < MIN_SEQLEN_Q:
        return f"takes 128 queries of a sequence at a time, and is for calls with more than {MIN_SEQLEN_Q - 1}"
    return no_product(tensors[0].dtype) or unaligned(*tensors)


def supports(query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, max_seqlen_q, scale, causal=True,
             sliding_window=-1, logit_cap=0.0, *args, **kwargs) -> str | None:
    if logit_cap > 0:
        return "has no logit_cap"
    return unsupported_pages(query, key_cache, value_cache) or unsupported((query,), max_seqlen_q)


@bind(ops.prefill_attention, supports=supports, absent=absent)
def prefill_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
                      seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
                      logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
                      v_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tokens, num_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, _ = key_cache.shape
    max_pages = page_table.shape[1] if num_pages else 0
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((tokens, num_heads), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    query_stride, query_head_stride, _ = query.stride()
    key_page_stride, key_row_stride, key_head_stride, _ = key_cache.stride()
    value_page_stride, value_row_stride, value_head_stride, _ = value_cache.stride()
    k_scale, v_scale, scale_stride = quant.kv_scales_of(k_scale, v_scale, num_kv_heads)
    launch("prefill_attention", query=query, key=key_cache, value=value_cache, page_table=page_table,
           cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, sinks=as_fp32(sinks), k_scale=as_fp32(k_scale),
           v_scale=as_fp32(v_scale), out=out, lse=lse, query_stride=query_stride, query_head_stride=query_head_stride,
           key_page_stride=key_page_stride, key_row_stride=key_row_stride, key_head_stride=key_head_stride,
           value_page_stride=value_page_stride, value_row_stride=value_row_stride,
           value_head_stride=value_head_stride, table_stride=page_table.stride(0), scale_stride=scale_stride,
           num_seqs=len(seq_lens), num_heads=num_heads, num_kv_heads=num_kv_heads, qk_dim=head_dim, v_dim=head_dim,
           page_size=page_size, max_pages=max_pages, max_seqlen_q=max_seqlen_q, causal=int(causal),
           window=min(sliding_window, max_pages * page_size), scale=scale, dtype=query.dtype,
           cache_dtype=key_cache.dtype)
    return out, lse
