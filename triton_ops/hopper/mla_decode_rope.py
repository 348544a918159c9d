"""MLA decode with RoPE and cache write on Hopper, by the kernel of hopper/mla_decode.py.

Bound by: the same as mla_decode. The two operators have separate tables, since their best configurations differ.
"""

import dataclasses

import torch
from torch import Tensor

from wave64.ops import mla_decode_rope
from wave64.triton_ops.hopper import mla_decode
from wave64.triton_ops.hopper.mla_decode import key_of, launch, unsupported
from wave64.triton_ops.mla_decode import with_queries
from wave64.triton_ops.mla_decode_rope import call_of


def key(q_nope: Tensor, **others) -> dict[str, int]:
    """The tuning key of a call."""
    return key_of(with_queries(q_nope, 4))


TUNING = dataclasses.replace(mla_decode.TUNING, op="mla_decode_rope", key=key)


@mla_decode_rope.backend("hopper", tuning=TUNING,
                         supports=lambda *args, **kwargs: unsupported(call_of(*args, **kwargs)))
def run(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
        page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
        is_neox: bool = False, kv_scale: Tensor | None = None) -> Tensor:
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    call = call_of(q_nope, q_pe, kv_c, k_pe, kv_cache, slot_mapping, page_table, seq_lens, positions, cos_sin_cache,
                   scale, is_neox)
    launch(call, out, None, TUNING.choose(**key_of(call.queries.q_ptr)))
    return out
