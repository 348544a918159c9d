from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, constants, launch, other_fp8
from wave64.backends.hip_ops.rotary_embedding import unsupported

CONSTANTS = constants("concat_and_cache_mla_rope_fused")


def supports(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, scale=None) -> str | None:
    return unsupported(q_pe.dtype, cos_sin_cache, CONSTANTS.MAX_ROPE_DIM) or other_fp8(kv_cache.dtype)


@bind(ops.concat_and_cache_mla_rope_fused, supports=supports)
def concat_and_cache_mla_rope_fused(positions: Tensor, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cos_sin_cache: Tensor,
                                    is_neox: bool, slot_mapping: Tensor, kv_cache: Tensor,
                                    scale: Tensor | None = None) -> None:
    num_tokens, num_heads, rope_dim = q_pe.shape
    launch("concat_and_cache_mla_rope_fused", q_pe, positions=positions, q_pe=q_pe, k_pe=k_pe, kv_c=kv_c,
           angles=cos_sin_cache, slot_mapping=slot_mapping, kv_cache=kv_cache, scale=scale,
           positions_stride=positions.stride(0), q_pe_stride=q_pe.stride(0), q_pe_head_stride=q_pe.stride(1),
           k_pe_stride=k_pe.stride(0), kv_c_stride=kv_c.stride(0), num_tokens=num_tokens, num_heads=num_heads,
           kv_lora_rank=kv_c.shape[1], rope_dim=rope_dim, is_neox=is_neox, position_bytes=positions.element_size(),
           dtype=q_pe.dtype, angles_dtype=cos_sin_cache.dtype, cache_dtype=kv_cache.dtype)
