from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, floats_only, launch


@bind(ops.apply_token_bitmask, supports=lambda logits, *args, **kwargs: floats_only(logits))
def apply_token_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    num_seqs, vocab_size = logits.shape
    launch("apply_token_bitmask", logits=logits, bitmask=bitmask, logits_stride=logits.stride(0),
           bitmask_stride=bitmask.stride(0), num_seqs=num_seqs, vocab_size=vocab_size, dtype=logits.dtype)
