import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch


@bind(ops.sample, supports=lambda logits, *args, **kwargs: floats_only(logits))
def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    launch("sample", logits, logits.data_ptr(), temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(),
           min_p.data_ptr(), uniform.data_ptr(), out.data_ptr(), logits.stride(0), *logits.shape, DTYPES[logits.dtype])
    return out
