"""Decode attention on a CPU: many sequences at a time, by torch's own attention where it computes the same.

Bound by the gathering of keys and values from their pages. Sequences of one length, a batch of one above all, read
whole pages and need no mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import ops

#: Bound on temporary memory: elements of keys, and as many of values, that are gathered at a time.
KEYS_AT_ONCE = 2**21


def read_keys(cache: Tensor, slots: Tensor) -> Tensor:
    """cache[page, row] of every slot = page * page_size + row: [*slots.shape, num_kv_heads, head_dim]."""
    num_pages, page_size = cache.shape[:2]
    if not cache.is_contiguous():
        return cache[slots // page_size, slots % page_size]
    rows = cache.view(num_pages * page_size, -1)  # index_select copies whole rows: twice as fast as indexing
    return rows.index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[2:])


def _common_length(seq_lens: Tensor) -> int:
    """The length of all sequences; 0 where they differ."""
    lengths = set(seq_lens.tolist())
    return lengths.pop() if len(lengths) == 1 else 0


def read_pages(cache: Tensor, pages: Tensor) -> Tensor:
    """cache[pages], pages side by side: pages [B, P] -> [B, P * page_size, num_kv_heads, head_dim]."""
    return cache.index_select(0, pages.flatten()).view(pages.shape[0], -1, *cache.shape[2:])


def dequantize(kv: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """kv [num_kv_heads, S, D], or several of these, times scale, one number or one per head."""
    kv = kv.to(dtype)
    return kv if scale is None else kv * scale.to(dtype).view(-1, 1, 1)


@ops.paged_attention.backend("cpu")
def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
                    scale: float, sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None,
                    k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    num_seqs, heads, head_dim = query.shape
    num_pages, page_size, kv_heads, _ = key_cache.shape
    capacity = page_table.shape[1] * page_size
    if capacity == 0 or num_pages == 0 or num_seqs == 0:
        return query.new_zeros(query.shape)
    # Grouped by key head, so that keys and values are never expanded to the queries' heads.
    grouped = query.view(num_seqs, kv_heads, heads // kv_heads, head_dim)
    length = _common_length(seq_lens)
    if length and sliding_window <= 0 and num_seqs * length * kv_heads * head_dim <= KEYS_AT_ONCE:
        pages = page_table[:, :-(-length // page_size)]  # read whole, and nothing is masked
        keys, values = (read_pages(cache, pages)[:, :length].transpose(1, 2) for cache in (key_cache, value_cache))
        return attend(grouped, keys, values, None, scale, logit_cap, sinks, k_scale, v_scale).flatten(1, 2)
    in_page = torch.arange(page_size)
    keys_read = min(capacity, sliding_window) if sliding_window > 0 else capacity
    at_once = max(1, KEYS_AT_ONCE // (keys_read * kv_heads * head_dim))
    parts = []
    for first in range(0, num_seqs, at_once):
        some = slice(first, first + at_once)
        lengths = seq_lens[some, None]
        slots = (page_table[some, :, None] * page_size + in_page).flatten(1)  # of every position in the table
        positions = torch.arange(keys_read)
        if keys_read < capacity:
            positions = positions + (lengths - keys_read).clamp_(min=0)
            slots = slots.gather(1, positions)
        present = positions < lengths
        # A sequence with fewer keys reads its first one instead of the missing, never a slot that it does not own.
        slots = torch.where(present, slots, slots[:, :1]).clamp_(0, num_pages * page_size - 1)
        keys, values = (read_keys(cache, slots).transpose(1, 2) for cache in (key_cache, value_cache))
        result = attend(grouped[some], keys, values, present[:, None, None], scale, logit_cap, sinks, k_scale, v_scale)
        parts.append(result.masked_fill_((lengths == 0)[..., None, None], 0).flatten(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(query: Tensor, keys: Tensor, values: Tensor, present: Tensor | None, scale: float, logit_cap: float,
           sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> Tensor:
    """query [B, Hkv, G, D], keys and values [B, Hkv, S, D], present [B, 1, 1, S] (None: all) -> [B, Hkv, G, D]"""
    if keys.dtype == query.dtype and not logit_cap and sinks is None and k_scale is None and v_scale is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=present, scale=scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ dequantize(keys, k_scale, wide).transpose(2, 3) * scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    if present is not None:
        scores = scores.masked_fill(~present, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide).view(scores.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :keys.shape[2]]
    return (weights @ dequantize(values, v_scale, wide)).to(query.dtype)
