"""Prefill attention: the newest tokens of each sequence attend to all of its keys in a paged cache."""

import torch
from torch import Tensor

from wave64 import platform, pools
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.paged_attention import attend, check_kv, make_case, read_positions

#: The reference's bound on temporary memory: queries of a sequence at a time.
QUERIES_AT_ONCE = 256


def make_prefill(new: list[int], seq_lens: list[int], **options) -> dict:
    """`make_case` with the last `new[i]` tokens of each sequence as its queries."""
    window = options.get("sliding_window", -1)
    # The first query sees window - 1 keys before its own, so those must hold numbers, too.
    wider = {**options, "sliding_window": window + max(new, default=0)} if window > 0 else options
    args = make_case(seq_lens, **wider)
    heads, head_dim = args["query"].shape[1:]
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    args.update(query=torch.randn(sum(new), heads, head_dim, dtype=args["query"].dtype), cu_seqlens_q=starts,
                max_seqlen_q=max(new, default=0))
    return {**args, "sliding_window": window}


def cases():
    half, full = torch.float16, torch.float32
    drawn = {
        "one-token": dict(new=[1], seq_lens=[1]),
        "whole": dict(new=[37, 5], seq_lens=[37, 5]),
        "chunk": dict(new=[9, 1, 20], seq_lens=[50, 33, 20]),
        "empty-rows": dict(new=[0, 7, 2], seq_lens=[12, 7, 0]),
        "fp16": dict(new=[19, 4], seq_lens=[19, 64], dtype=half),
        "fp32": dict(new=[19, 4], seq_lens=[19, 65], dtype=full),
        "full": dict(new=[19, 4], seq_lens=[19, 40], causal=False),
        "full-window": dict(new=[19, 4], seq_lens=[19, 40], causal=False, sliding_window=6),
        "mha": dict(new=[20], seq_lens=[33], heads=3, kv_heads=3),
        "mqa": dict(new=[20], seq_lens=[33], heads=5, kv_heads=1),
        "page-1": dict(new=[10], seq_lens=[23], page_size=1),
        "page-5": dict(new=[10], seq_lens=[23], page_size=5),
        "page-64": dict(new=[34], seq_lens=[130], heads=2, page_size=64),
        "dim-24": dict(new=[20], seq_lens=[20], head_dim=24, dtype=full),
        "dim-33": dict(new=[20], seq_lens=[20], head_dim=33),
        "dim-80": dict(new=[20], seq_lens=[20], head_dim=80),
        "dim-120": dict(new=[20], seq_lens=[20], head_dim=120),
        "dim-192": dict(new=[20], seq_lens=[20], head_dim=192),
        "dim-256": dict(new=[20], seq_lens=[20], head_dim=256),
        "window": dict(new=[30, 9], seq_lens=[70, 9], sliding_window=13),
        "window-1": dict(new=[30, 9], seq_lens=[70, 9], sliding_window=1),
        "cap": dict(new=[30, 9], seq_lens=[70, 9], logit_cap=5.0),
        "sinks": dict(new=[30, 9], seq_lens=[70, 9], sinks=True),
        "fp8": dict(new=[30, 9], seq_lens=[70, 9], fp8=True),
        "fp8-per-head": dict(new=[30, 9], seq_lens=[70, 9], fp8=True, per_head=True),
        "all": dict(new=[30, 9], seq_lens=[70, 9], fp8=True, sinks=True, logit_cap=8.0, sliding_window=20),
        "tiles": dict(new=[70, 3], seq_lens=[150, 3], heads=2, kv_heads=1),
        "tiles-window": dict(new=[70], seq_lens=[190], heads=1, kv_heads=1, page_size=32, sliding_window=20,
                             sinks=True),
        "no-sequences": dict(new=[], seq_lens=[]),
    }
    for name, options in drawn.items():
        yield Case(name, lambda options=options: make_prefill(**options))
    yield from pools.cases(lambda **options: make_prefill([5, 1], [3 * options["page_size"] + 3, 2],
                                                          **options), ("key_cache", "value_cache"), ["page_table"])
    for name, new, lengths in [("4x4096", [4096] * 4, [4096] * 4), ("1x16384", [16384], [16384]),
                               ("chunk-2048-of-16384", [2048] * 2, [16384] * 2),
                               ("32x4-of-4096", [4] * 32, [4096] * 32), ("8x64-of-8192", [64] * 8, [8192] * 8),
                               ("ragged", [1, 300, 4096, 77, 1500], [4000, 300, 4096, 8000, 1700])]:
        yield Case(name, lambda new=new, lengths=lengths: make_prefill(
            new, lengths, heads=32, kv_heads=8, head_dim=128), large=True)


def check(query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, max_seqlen_q, scale, causal=True,
          sliding_window=-1, logit_cap=0.0, sinks=None, k_scale=None, v_scale=None):
    check_kv(query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale)
    entries = len(seq_lens) + 1
    if cu_seqlens_q.shape != (entries,) or cu_seqlens_q.dtype != torch.int32 or not cu_seqlens_q.is_contiguous():
        raise BadArgument("cu_seqlens_q", f"contiguous int32 [{entries}]: 0, then running sums", cu_seqlens_q)
    if not platform.on_gpu(cu_seqlens_q):  # there this would synchronize
        starts = cu_seqlens_q.tolist()
        new = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        if starts[0] != 0 or starts[-1] != query.shape[0] or min(new, default=0) < 0:
            raise BadArgument("cu_seqlens_q", f"running sums from 0 to {query.shape[0]}, the rows of query", starts)
        if max(new, default=0) > max_seqlen_q:
            raise BadArgument("max_seqlen_q", f"at least {max(new)}, the longest of cu_seqlens_q", max_seqlen_q)


def cost(query, key_cache, value_cache, page_table, cu_seqlens_q, seq_lens, max_seqlen_q, scale, causal=True,
         sliding_window=-1, logit_cap=0.0, sinks=None, k_scale=None, v_scale=None) -> Cost:
    pairs = keys = 0
    for new, length in zip(cu_seqlens_q.diff().tolist(), seq_lens.tolist(), strict=True):
        position = torch.arange(length - new, length)
        first = (position - sliding_window + 1).clamp(min=0) if sliding_window > 0 else torch.zeros_like(position)
        last = position + 1 if causal else torch.full_like(position, length)
        pairs += int((last - first).sum())
        keys += length - int(first.min()) if new else 0
    _, _, kv_heads, head_dim = key_cache.shape
    kv_bytes = 2 * keys * kv_heads * head_dim * key_cache.element_size()
    return Cost(bytes=kv_bytes + 2 * query.nbytes + 4 * query.shape[0] * query.shape[1],
                flops=4 * pairs * query.shape[1] * head_dim)


def fake(query, *args, **kwargs):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)


@op(cases=cases, check=check, cost=cost, fake=fake)
def prefill_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
                      seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
                      logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
                      v_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prefill and extend attention over a paged KV cache: the new tokens of each sequence, whose keys are already in
    the cache, attend to the keys of their sequence.

        out = softmax(cap(scale * query @ K.T)) @ V

    Rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of query are the last positions of sequence i. A query at position p
    attends to the keys up to p if causal, else to all; with sliding_window w > 0 only to those from p - w + 1 on. The
    result of a query without keys is 0. Cache, cap and precision are those of paged_attention.
    (Vaswani et al. 2017; in blocks with a running maximum: Milakov & Gimelshein 2018, Dao et al. 2022)

    query           [num_tokens, num_heads, head_dim]  bf16, fp16 or fp32; last dim contiguous
    key_cache       [num_pages, page_size, num_kv_heads, head_dim]  dtype of query, or the architecture's FP8
    value_cache     shape and dtype of key_cache
    page_table      [num_seqs, max_pages]  int32; entries of pages that are not read are ignored
    cu_seqlens_q    [num_seqs + 1]  int32; cumulative numbers of new tokens, from 0 to num_tokens. On a GPU the last
                    entry may be smaller, as in a padded batch of a captured graph: rows of query from there on are not
                    read, and those of out and lse are not written
    seq_lens        [num_seqs]  int32; length including the new tokens
    max_seqlen_q    at least the maximum number of new tokens of a sequence
    scale           factor on the logits, usually head_dim ** -0.5
    causal          whether a query attends only to keys up to its own position
    sliding_window, logit_cap, sinks, k_scale, v_scale  as in paged_attention
    returns         out [num_tokens, num_heads, head_dim]  dtype of query, contiguous, and
                    lse [num_tokens, num_heads]  fp32; natural log of the sum of exp(logit), sinks included; -inf for a
                    query without keys and sinks
    raises          BadArgument (a ValueError) for other dtypes, shapes or strides; on a CPU also for cu_seqlens_q that
                    do not fit query, max_seqlen_q or seq_lens that do not fit page_table
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:2], float("-inf"), dtype=wide)
    starts = cu_seqlens_q.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        before = length - starts[i + 1]  # position of a query = its row + before
        first = max(0, starts[i] + before - sliding_window + 1) if sliding_window > 0 else 0
        at = torch.arange(first, length, device=query.device)
        keys = read_positions(key_cache, page_table[i], at, k_scale, wide)
        values = read_positions(value_cache, page_table[i], at, v_scale, wide)
        for rows in torch.arange(starts[i], starts[i + 1], device=query.device).split(QUERIES_AT_ONCE):
            position = (rows + before)[:, None]
            seen = (at <= position) | (not causal)
            if sliding_window > 0:
                seen = seen & (at > position - sliding_window)
            result, lse[rows] = attend(query[rows].to(wide), keys, values, seen, scale, logit_cap, sinks)
            out[rows] = result.to(query.dtype)
    return out, lse
