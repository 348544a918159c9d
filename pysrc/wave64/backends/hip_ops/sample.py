import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, constants, floats_only, launch

CONSTANTS = constants("sample")


@bind(ops.sample, supports=lambda logits, *args, **kwargs: floats_only(logits))
def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    num_seqs, vocab_size = logits.shape
    work_stride = vocab_size // CONSTANTS.WORK_LOGITS + CONSTANTS.MIN_WORK
    out = torch.empty(num_seqs, dtype=torch.int64, device=logits.device)
    work = torch.empty((num_seqs, work_stride), dtype=torch.float32, device=logits.device)
    launch("sample", logits=logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform,
           out=out, work=work, logits_stride=logits.stride(0), work_stride=work_stride, num_seqs=num_seqs,
           vocab_size=vocab_size, dtype=logits.dtype)
    return out
