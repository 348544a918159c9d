from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import FLOATS, bind, launch, other_fp8


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
        return  # every slot is -1
    num_tokens, num_heads, head_dim = key.shape
    k_scale, v_scale, scale_stride = quant.kv_scales_of(k_scale, v_scale, num_heads)
    launch("reshape_and_cache", key=key, value=value, key_cache=key_cache, value_cache=value_cache,
           slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale, key_stride=key.stride(0),
           key_head_stride=key.stride(1), value_stride=value.stride(0), value_head_stride=value.stride(1),
           num_tokens=num_tokens, num_heads=num_heads, head_dim=head_dim, scale_stride=scale_stride,
           dtype=key.dtype, cache_dtype=key_cache.dtype)
