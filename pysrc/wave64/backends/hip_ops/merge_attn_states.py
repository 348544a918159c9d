import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, launch


@bind(ops.merge_attn_states, supports=None)
def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    launch("merge_attn_states", out_a, out_a.data_ptr(), lse_a.data_ptr(), out_b.data_ptr(), lse_b.data_ptr(),
           out.data_ptr(), lse.data_ptr(), *out_a.stride()[:2], *lse_a.stride(), *out_b.stride()[:2], *lse_b.stride(),
           *out_a.shape, DTYPES[out_a.dtype])
    return out, lse
