from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, floats_only, launch


@bind(ops.apply_penalties, supports=lambda logits, *args, **kwargs: floats_only(logits))
def apply_penalties(logits: Tensor, prompt_ids: Tensor, output_ids: Tensor, presence_penalty: Tensor,
                    frequency_penalty: Tensor, repetition_penalty: Tensor) -> None:
    num_seqs, vocab_size = logits.shape
    launch("apply_penalties", logits=logits, prompt_ids=prompt_ids, output_ids=output_ids,
           presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
           repetition_penalty=repetition_penalty, logits_stride=logits.stride(0), num_seqs=num_seqs,
           vocab_size=vocab_size, prompt_width=prompt_ids.shape[1], output_width=output_ids.shape[1],
           dtype=logits.dtype)
