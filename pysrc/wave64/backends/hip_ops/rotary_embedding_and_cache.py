from torch import Tensor

from wave64 import ops, quant
from wave64.backends.hip import bind, constants, launch, other_fp8
from wave64.backends.hip_ops.rotary_embedding import unsupported

CONSTANTS = constants("rotary_embedding_and_cache")


def supports(positions, query, key, value, cos_sin_cache, key_cache, *args, **kwargs) -> str | None:
    return unsupported(query.dtype, cos_sin_cache, CONSTANTS.MAX_ROT_DIM) or other_fp8(key_cache.dtype)


@bind(ops.rotary_embedding_and_cache, supports=supports)
def rotary_embedding_and_cache(positions: Tensor, query: Tensor, key: Tensor, value: Tensor, cos_sin_cache: Tensor,
                               key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, is_neox: bool = True,
                               k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    num_tokens, num_heads, head_dim = query.shape
    k_scale, v_scale, scale_stride = quant.kv_scales_of(k_scale, v_scale, key.shape[1])
    launch("rotary_embedding_and_cache", positions=positions, query=query, key=key, value=value, angles=cos_sin_cache,
           key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale,
           positions_stride=positions.stride(0), query_stride=query.stride(0), query_head_stride=query.stride(1),
           key_stride=key.stride(0), key_head_stride=key.stride(1), value_stride=value.stride(0),
           value_head_stride=value.stride(1), num_tokens=num_tokens, num_heads=num_heads, num_kv_heads=key.shape[1],
           head_dim=head_dim, rot_dim=cos_sin_cache.shape[1], is_neox=is_neox,
           position_bytes=positions.element_size(), scale_stride=scale_stride, dtype=query.dtype,
           angles_dtype=cos_sin_cache.dtype, cache_dtype=key_cache.dtype)
