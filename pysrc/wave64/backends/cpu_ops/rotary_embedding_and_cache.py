"""RoPE and cache write on a CPU: the operators that it is made of, by their fastest backends there."""

from torch import Tensor

from wave64 import ops
from wave64.backends.cpu_ops.reshape_and_cache import reshape_and_cache


@ops.rotary_embedding_and_cache.backend("cpu")
def rotary_embedding_and_cache(positions: Tensor, query: Tensor, key: Tensor, value: Tensor, cos_sin_cache: Tensor,
                               key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, is_neox: bool = True,
                               k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    ops.rotary_embedding.reference(positions, query, key, query.shape[2], cos_sin_cache, is_neox)
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
