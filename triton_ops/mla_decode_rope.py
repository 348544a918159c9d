"""MLA decode with RoPE and cache write: mla_decode's kernels also rotate q_pe and k_pe and write the new latents.

The trick: one launch. The program that attends to the newest keys has the new tokens in registers and does not read
them back from the cache, so no program waits for another.
Bound by: the same as mla_decode.
"""

import dataclasses

import torch
from torch import Tensor

from wave64.ops import mla_decode_rope
from wave64.triton_ops import mla_decode
from wave64.triton_ops.mla_decode import key_of, launch, unsupported, with_queries
from wave64.triton_ops.mla_decode_common import Cache, Call, NewTokens, Queries


def key(q_nope: Tensor, kv_cache: Tensor, **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    return key_of(with_queries(q_nope, 4), kv_cache)


TUNING = dataclasses.replace(mla_decode.TUNING, key=key)


def call_of(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
            page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
            is_neox: bool = False, kv_scale: Tensor | None = None) -> Call:
    """The operator's arguments in the form that the kernels take."""
    return Call(Queries(with_queries(q_nope, 4), with_queries(q_pe, 4)),
                Cache(kv_cache, page_table, seq_lens, kv_scale),
                NewTokens(with_queries(kv_c, 3), with_queries(k_pe, 3), slot_mapping, positions, cos_sin_cache),
                scale, is_neox)


@mla_decode_rope.backend("triton", tuning=TUNING, supports=lambda q_nope, q_pe, kv_c, k_pe, kv_cache, *args, **kwargs:
                         unsupported(q_nope, kv_cache, q_nope.shape[-1], q_nope.shape[1] if q_nope.ndim == 4 else 1))
def run(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
        page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
        is_neox: bool = False, kv_scale: Tensor | None = None) -> Tensor:
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    call = call_of(q_nope, q_pe, kv_c, k_pe, kv_cache, slot_mapping, page_table, seq_lens, positions, cos_sin_cache,
                   scale, is_neox, kv_scale)
    launch(call, out, None, TUNING.choose(**key_of(call.queries.q_ptr, kv_cache)))
    return out
