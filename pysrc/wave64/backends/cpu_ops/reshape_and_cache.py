"""Cache write on a CPU: where no token is skipped, which costs little to see, rows are copied as they come."""

import torch
from torch import Tensor

from wave64 import ops
from wave64.ops.reshape_and_cache import FP8, as_stored, rows_of


@ops.reshape_and_cache.backend("cpu")
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
                      k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    if not (slot_mapping >= 0).all():
        ops.reshape_and_cache.reference(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
        return
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        stored = as_stored(new, cache, scale)
        rows_of(cache).index_copy_(0, slot_mapping, stored.view(torch.uint8) if cache.dtype in FP8 else stored)
