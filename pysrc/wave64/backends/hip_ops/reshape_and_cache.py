from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, FLOATS, bind, launch, other_fp8


def supports(key, value, key_cache, value_cache, slot_mapping, k_scale=None, v_scale=None) -> str | None:
    if key.dtype not in FLOATS:
        return f"dtype {key.dtype}"
    if value.dtype != key.dtype or value.shape != key.shape:
        return f"values unlike keys: {value.dtype} {list(value.shape)}, {key.dtype} {list(key.shape)}"
    return other_fp8(key_cache.dtype)


@bind(ops.reshape_and_cache, supports=supports)
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
                      k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    if key_cache.numel() == 0:
        return  # no slot but -1
    launch("reshape_and_cache", key, key.data_ptr(), value.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
           slot_mapping.data_ptr(), 0 if k_scale is None else k_scale.data_ptr(),
           0 if v_scale is None else v_scale.data_ptr(), *key.stride()[:2], *value.stride()[:2], *key.shape,
           DTYPES[key.dtype], DTYPES[key_cache.dtype])
