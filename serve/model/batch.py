"""`Batch`: what the runner hands to the model, the one of the engine's four types that holds tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """The tensors of one forward pass over T tokens of B sequences, decodes first; all on the model's device."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: page * page_size + offset of the token in the KV pool, -1: none
    page_table: Tensor  # [B, max_pages] int32, only as wide as this batch needs
    seq_lens: Tensor  # [B] int32: length including this step's tokens (0 for a padding row)
    num_decodes: int  # the first num_decodes sequences have exactly one new token each
    cu_seqlens_q: Tensor  # [B - num_decodes + 1] int32: running sum of new tokens of the prefilling sequences
    max_seqlen_q: int  # longest of the prefilling sequences' new tokens, 0 if none
    logit_rows: Tensor  # [R] int64: rows of the T hidden states whose logits are wanted
    # What the prefilling sequences had before this step, for attention that reads it other than by the page table:
    prefix_slots: Tensor | None = None  # [P] int64: page * page_size + offset of their tokens, sequence by sequence
    cu_seqlens_prefix: Tensor | None = None  # [B - num_decodes + 1] int32: running sum of how many they are
    max_prefix: int = 0  # the longest, 0 if there are none
    # With data-parallel attention, what every attention group pads its tokens and its logits' rows to in this step:
    gathered_tokens: int = 0
    gathered_logits: int = 0
    logits: Tensor | None = None  # [rows of the logits, vocab_size] fp32: where they go, if that is settled
