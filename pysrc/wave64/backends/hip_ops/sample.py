import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch, workspace


@bind(ops.sample, supports=lambda logits, *args, **kwargs: floats_only(logits))
def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    work = workspace(rows, vocab // 8 + 512, dtype=torch.float32, device=logits.device)
    launch("sample", logits, logits.data_ptr(), temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(),
           min_p.data_ptr(), uniform.data_ptr(), out.data_ptr(), work.data_ptr(), logits.stride(0), work.stride(0),
           rows, vocab, DTYPES[logits.dtype])
    return out
