import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch


@bind(ops.merge_attn_states, supports=None)
def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = out_a.shape
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    launch("merge_attn_states", a=out_a, lse_a=lse_a, b=out_b, lse_b=lse_b, out=out, lse=lse,
           a_stride=out_a.stride(0), a_head_stride=out_a.stride(1), lse_a_stride=lse_a.stride(0),
           lse_a_head_stride=lse_a.stride(1), b_stride=out_b.stride(0), b_head_stride=out_b.stride(1),
           lse_b_stride=lse_b.stride(0), lse_b_head_stride=lse_b.stride(1), num_tokens=num_tokens,
           num_heads=num_heads, head_dim=head_dim, dtype=out_a.dtype)
    return out, lse
