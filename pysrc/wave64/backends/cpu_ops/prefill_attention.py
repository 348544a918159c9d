"""Prefill attention on a CPU: blocks of keys with a running maximum, each by torch's flash attention for CPUs.

Bound by that kernel; keys and values are gathered from their pages once per block of queries.
"""

import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.cpu_ops.paged_attention import KEYS_AT_ONCE, dequantize, read_keys

#: Bound on temporary memory: scores that are computed at a time.
SCORES_AT_ONCE = 2**23


@ops.prefill_attention.backend("cpu")
def prefill_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
                      seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
                      logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
                      v_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = query.shape
    _, page_size, kv_heads, _ = key_cache.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(query.shape)
    lse = query.new_full((tokens, heads), float("-inf"), dtype=wide)
    # Grouped by key head, so that keys and values are never expanded to the queries' heads.
    grouped = query.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    keys_at_once = max(16, KEYS_AT_ONCE // (kv_heads * head_dim))
    starts = cu_seqlens_q.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        before = length - starts[i + 1]  # position of a query = its row + before
        queries_at_once = max(16, SCORES_AT_ONCE // (heads * max(1, min(length, keys_at_once))))
        for row in range(starts[i], starts[i + 1], queries_at_once):
            end = min(row + queries_at_once, starts[i + 1])
            position = torch.arange(row + before, end + before)[:, None]
            # Maximum, sum and weighted values of the keys so far; a sink is where they start.
            row_max = lse.new_full((kv_heads, heads // kv_heads, end - row), float("-inf"))
            row_sum, acc = torch.zeros_like(row_max), lse.new_zeros(*row_max.shape, head_dim)
            if sinks is not None:
                row_max, row_sum = row_max.copy_(sinks.view(kv_heads, -1, 1)), row_sum.fill_(1)
            first = max(0, row + before - sliding_window + 1) if sliding_window > 0 else 0
            last = min(length, end + before) if causal else length
            for key in range(first, last, keys_at_once):
                at = torch.arange(key, min(key + keys_at_once, last))
                seen = torch.ones(end - row, len(at), dtype=torch.bool)
                if causal:
                    seen &= at <= position
                if sliding_window > 0:
                    seen &= at > position - sliding_window
                slots = page_table[i, at // page_size].long() * page_size + at % page_size
                keys, values = read_keys(key_cache, slots), read_keys(value_cache, slots)
                some = attend(grouped[:, :, row:end], keys, values, seen, scale, logit_cap, k_scale, v_scale)
                row_max, row_sum, acc = merge((row_max, row_sum, acc), some)
            out[row:end] = (acc / row_sum.masked_fill(row_sum == 0, 1)[..., None]).permute(2, 0, 1, 3).flatten(1, 2)
            lse[row:end] = (row_max + row_sum.log()).permute(2, 0, 1).flatten(1)
    return out, lse


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, logit_cap: float,
           k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """query [Hkv, G, N, D], keys and values [S, Hkv, D], seen [N, S] -> row_max [Hkv, G, N], row_sum [Hkv, G, N] of
    exp(logit - row_max), and acc [Hkv, G, N, D], the values weighted with it; -inf, 0 and 0 where nothing is seen."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query = query.to(wide)
    keys = dequantize(keys.transpose(0, 1), k_scale, wide)[:, None]
    values = dequantize(values.transpose(0, 1), v_scale, wide)[:, None]
    if not logit_cap:
        # Several times faster than the steps below, and as exact; its result is already divided by the sum.
        mask = torch.zeros(seen.shape, dtype=wide).masked_fill_(~seen, float("-inf"))
        acc, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, *(kv.expand(-1, query.shape[1], -1, -1) for kv in (keys, values)), attn_mask=mask, scale=scale)
        blind = ~seen.any(1)
        return lse.masked_fill(blind, float("-inf")), (~blind).to(wide).expand_as(lse), acc
    scores = query @ keys.transpose(2, 3) * scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores.masked_fill_(~seen, float("-inf"))
    row_max = scores.amax(-1)
    weights = scores.sub_(row_max.masked_fill(row_max == float("-inf"), 0)[..., None]).exp_()
    return row_max, weights.sum(-1), weights @ values


def merge(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(row_max, row_sum, acc) of two sets of keys together."""
    row_max = torch.maximum(one[0], other[0])
    base = row_max.masked_fill(row_max == float("-inf"), 0)  # nothing seen yet: exp(-inf - 0) = 0, not NaN
    a, b = (one[0] - base).exp(), (other[0] - base).exp()
    return row_max, one[1] * a + other[1] * b, one[2] * a[..., None] + other[2] * b[..., None]
