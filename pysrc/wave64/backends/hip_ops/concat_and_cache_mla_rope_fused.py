from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, FLOATS, bind, launch, other_fp8


def supports(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, scale=None) -> str | None:
    if cos_sin_cache.dtype not in FLOATS:
        return f"angles of dtype {cos_sin_cache.dtype}"
    if q_pe.shape[2] > 1024:
        return f"rope_dim {q_pe.shape[2]}, more than 1024"
    return other_fp8(kv_cache.dtype)


@bind(ops.concat_and_cache_mla_rope_fused, supports=supports)
def concat_and_cache_mla_rope_fused(positions: Tensor, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cos_sin_cache: Tensor,
                                    is_neox: bool, slot_mapping: Tensor, kv_cache: Tensor,
                                    scale: Tensor | None = None) -> None:
    tokens, heads, rope = q_pe.shape
    launch("concat_and_cache_mla_rope_fused", q_pe, positions.data_ptr(), q_pe.data_ptr(), k_pe.data_ptr(),
           kv_c.data_ptr(), cos_sin_cache.data_ptr(), slot_mapping.data_ptr(), kv_cache.data_ptr(),
           0 if scale is None else scale.data_ptr(), positions.stride(0), q_pe.stride(0), q_pe.stride(1),
           k_pe.stride(0), kv_c.stride(0), tokens, heads, kv_c.shape[1], rope, is_neox, positions.element_size(),
           DTYPES[q_pe.dtype], DTYPES[cos_sin_cache.dtype], DTYPES[kv_cache.dtype])
