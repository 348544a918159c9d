import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.aiter import bind
from wave64.backends.aiter_ops.mla_decode import STAGE1, mla_decode, unsupported


def supports(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
             page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
             is_neox: bool = False, kv_scale: Tensor | None = None) -> str | None:
    rank = q_nope.shape[-1]
    return unsupported(q_nope.dtype, rank + q_pe.shape[-1], rank, kv_cache, kv_scale,
                       not (kv_cache.numel() and page_table.numel()))


@bind(ops.mla_decode_rope, {"mla_decode_stage1_asm_fwd": STAGE1}, supports=supports)
def mla_decode_rope(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                    page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
                    is_neox: bool = False, kv_scale: Tensor | None = None) -> Tensor:
    q, rope = torch.cat((q_nope, q_pe), -1), q_pe.shape[-1]
    ops.concat_and_cache_mla_rope_fused(positions.flatten(), q.flatten(0, -3)[..., -rope:],
                                        k_pe.reshape(-1, rope).clone(), kv_c.reshape(-1, kv_c.shape[-1]), cos_sin_cache,
                                        is_neox, slot_mapping.flatten(), kv_cache)
    return mla_decode(q, kv_cache, page_table, seq_lens, scale, q_nope.shape[-1])[0]
