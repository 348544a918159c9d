from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch
from wave64.backends.hip_ops import rotary_embedding
from wave64.backends.hip_ops.mla_decode import CONSTANTS, absent, fields, unsupported, with_tokens


def supports(q_nope, q_pe, kv_c, k_pe, kv_cache, slot_mapping, page_table, seq_lens, positions, cos_sin_cache, scale,
             is_neox=False, kv_scale=None) -> str | None:
    if q_nope.ndim == 4 and q_nope.shape[1] > CONSTANTS.MAX_NEW_TOKENS:
        return f"takes at most {CONSTANTS.MAX_NEW_TOKENS} new tokens per sequence, these are {q_nope.shape[1]}"
    return (unsupported(q_nope, q_pe, kv_cache, (kv_c, k_pe))
            or rotary_embedding.unsupported(q_pe.dtype, cos_sin_cache, CONSTANTS.ROPE))


@bind(ops.mla_decode_rope, supports=supports, absent=absent)
def mla_decode_rope(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                    page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
                    is_neox: bool = False, kv_scale: Tensor | None = None) -> Tensor:
    shape = q_nope.shape
    given = fields(with_tokens(q_nope, 4), with_tokens(q_pe, 4), kv_cache, page_table, seq_lens, scale, kv_scale)
    if given["out"].numel():
        kv_c, k_pe = with_tokens(kv_c, 3), with_tokens(k_pe, 3)
        launch("mla_decode_rope", **given, lse=None, angles_dtype=cos_sin_cache.dtype, kv_c=kv_c, k_pe=k_pe,
               slots=slot_mapping, positions=positions, angles=cos_sin_cache, kv_c_stride=kv_c.stride(0),
               kv_c_token_stride=kv_c.stride(1), k_pe_stride=k_pe.stride(0), k_pe_token_stride=k_pe.stride(1),
               is_neox=is_neox, position_bytes=positions.element_size())
    return given["out"].view(shape)
