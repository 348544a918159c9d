import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch
from wave64.backends.hip_ops.mla_decode import absent
from wave64.backends.hip_ops.prefill_attention import unsupported

DIMS = ((64, 64), (128, 128), (192, 128))


def supports(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, *args, **kwargs) -> str | None:
    if (dims := (q.shape[2], v.shape[2])) not in DIMS:
        return f"serves heads of 64, 128, and 192 with values of 128, these have {dims[0]} and {dims[1]}"
    return unsupported((q, k, v), max_seqlen_q)


@bind(ops.varlen_attention, supports=supports, absent=absent)
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    tokens, num_heads, qk_dim = q.shape
    _, num_kv_heads, v_dim = v.shape
    out = torch.empty((tokens, num_heads, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, num_heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    launch("varlen_attention", query=q, key=k, value=v, page_table=None, cu_seqlens_q=cu_seqlens_q,
           seq_lens=cu_seqlens_k, sinks=None, k_scale=None, v_scale=None, out=out, lse=lse, query_stride=q.stride(0),
           query_head_stride=q.stride(1), key_page_stride=0, key_row_stride=k.stride(0), key_head_stride=k.stride(1),
           value_page_stride=0, value_row_stride=v.stride(0), value_head_stride=v.stride(1), table_stride=0,
           scale_stride=0, num_seqs=len(cu_seqlens_q) - 1, num_heads=num_heads, num_kv_heads=num_kv_heads,
           qk_dim=qk_dim, v_dim=v_dim, page_size=0, max_pages=0, max_seqlen_q=max_seqlen_q, causal=int(causal),
           window=-1, scale=scale, dtype=q.dtype, cache_dtype=k.dtype)
    return out, lse
