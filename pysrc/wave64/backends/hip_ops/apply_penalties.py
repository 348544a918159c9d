from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch


@bind(ops.apply_penalties, supports=lambda logits, *args, **kwargs: floats_only(logits))
def apply_penalties(logits: Tensor, prompt_ids: Tensor, output_ids: Tensor, presence_penalty: Tensor,
                    frequency_penalty: Tensor, repetition_penalty: Tensor) -> None:
    launch("apply_penalties", logits, logits.data_ptr(), prompt_ids.data_ptr(), output_ids.data_ptr(),
           presence_penalty.data_ptr(), frequency_penalty.data_ptr(), repetition_penalty.data_ptr(), logits.stride(0),
           *logits.shape, prompt_ids.shape[1], output_ids.shape[1], DTYPES[logits.dtype])
