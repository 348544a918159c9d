from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, floats_only, launch


@bind(ops.apply_token_bitmask, supports=lambda logits, *args, **kwargs: floats_only(logits))
def apply_token_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    launch("apply_token_bitmask", logits, logits.data_ptr(), bitmask.data_ptr(), logits.stride(0), bitmask.stride(0),
           *logits.shape, DTYPES[logits.dtype])
