"""MLA decode of new tokens: mla_decode's kernel also rotates the queries, and rotates and stores the new latents.

The trick: one launch, since the program that attends to the newest keys has the new tokens in hand anyway. They never
take the way through the cache, so no program waits for another.
Bound by: as mla_decode.
"""

import torch
from torch import Tensor

from wave64.ops import mla_decode_rope
from wave64.triton_ops.mla_decode import BUCKETS, Config, candidates, facts_of, launch, pairs, unsupported, with_queries
from wave64.tuning import choose

__all__ = ["BUCKETS", "Config", "candidates", "facts", "pairs"]  # what the tuner looks for


def facts(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, kv_cache: Tensor, **others) -> dict[str, int | bool]:
    """Of a call's arguments, by their names, what the choice of a configuration depends on."""
    return facts_of(with_queries(q_nope, 4), with_queries(q_pe, 4), kv_cache, with_queries(kv_c, 3))


@mla_decode_rope.backend("triton", supports=lambda q_nope, q_pe, kv_c, k_pe, kv_cache, *args, **kwargs:
                         unsupported(q_nope, kv_cache, q_nope.shape[-1], q_nope.shape[1] if q_nope.ndim == 4 else 1))
def run(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
        page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
        is_neox: bool = False, kv_scale: Tensor | None = None) -> Tensor:
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    q_nope, q_pe = with_queries(q_nope, 4), with_queries(q_pe, 4)
    kv_c, k_pe = with_queries(kv_c, 3), with_queries(k_pe, 3)
    launch(q_nope, q_pe, kv_cache, page_table, seq_lens, scale, kv_scale, out, None,
           (kv_c, k_pe, slot_mapping, positions, cos_sin_cache), is_neox,
           choose("mla_decode_rope", Config, **facts_of(q_nope, q_pe, kv_cache, kv_c)))
    return out
