"""Ragged attention: packed sequences of queries, keys and values of different lengths, without padding or pages."""

from typing import Any

import torch
from torch import Tensor

from wave64 import platform
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.paged_attention import attend

#: The reference's bound on temporary memory: queries of a sequence at a time.
QUERIES_AT_ONCE = 256


def make_case(queries: list[int], keys: list[int], heads: int = 4, kv_heads: int = 2, qk_dim: int = 64, v_dim: int = 0,
              dtype: torch.dtype = torch.bfloat16, causal: bool = True) -> dict:
    v_dim = v_dim or qk_dim
    starts = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (queries, keys)]
    return dict(q=torch.randn(sum(queries), heads, qk_dim, dtype=dtype),
                k=torch.randn(sum(keys), kv_heads, qk_dim, dtype=dtype),
                v=torch.randn(sum(keys), kv_heads, v_dim, dtype=dtype), cu_seqlens_q=starts[0], cu_seqlens_k=starts[1],
                max_seqlen_q=max(queries, default=0), max_seqlen_k=max(keys, default=0), scale=qk_dim**-0.5,
                causal=causal)


def cases():
    half, full = torch.float16, torch.float32
    drawn = {
        "one-token": dict(queries=[1], keys=[1]),
        "whole": dict(queries=[37, 5], keys=[37, 5]),
        "ragged": dict(queries=[9, 1, 20, 40], keys=[50, 33, 20, 71]),
        "no-new-rows": dict(queries=[0, 7, 0], keys=[12, 7, 0]),
        "no-keys": dict(queries=[3, 2, 5], keys=[0, 7, 2]),
        "no-keys-full": dict(queries=[3, 2], keys=[0, 7], causal=False),
        "fp16": dict(queries=[19, 4], keys=[19, 64], dtype=half),
        "fp32": dict(queries=[19, 4], keys=[19, 65], dtype=full),
        "full": dict(queries=[19, 40], keys=[64, 9], causal=False),
        "mha": dict(queries=[20], keys=[33], heads=3, kv_heads=3),
        "mqa": dict(queries=[20], keys=[33], heads=5, kv_heads=1),
        "gqa-3": dict(queries=[20, 3], keys=[33, 5], heads=9, kv_heads=3),
        "mla": dict(queries=[40, 3], keys=[40, 9], heads=2, kv_heads=2, qk_dim=192, v_dim=128),
        "mla-fp32": dict(queries=[20, 3], keys=[20, 9], heads=1, kv_heads=1, qk_dim=192, v_dim=128, dtype=full),
        "latent": dict(queries=[5], keys=[20], kv_heads=1, qk_dim=576, v_dim=512),
        "wider-values": dict(queries=[20], keys=[20], qk_dim=40, v_dim=96),
        "dim-24": dict(queries=[20], keys=[20], qk_dim=24, dtype=full),
        "dim-33": dict(queries=[20], keys=[20], qk_dim=33),
        "dim-33-of-48": dict(queries=[20], keys=[20], qk_dim=48, v_dim=33, dtype=half),
        "dim-256": dict(queries=[20], keys=[20], qk_dim=256),
        "no-sequences": dict(queries=[], keys=[]),
    }
    for name, options in drawn.items():
        yield Case(name, lambda options=options: make_case(**options))
    yield Case("rising", lambda: _rising(make_case([70, 3], [150, 3], heads=2, kv_heads=1)))
    yield Case("strided", lambda: _strided(make_case([30, 9], [30, 9])))
    yield Case("mla-strided", lambda: _projected(make_case([30], [30], 3, 3, qk_dim=48, v_dim=32)))
    large: list[tuple[str, list[int], dict[str, Any]]] = [
        ("4x4096", [4096] * 4, dict(heads=32, kv_heads=8, qk_dim=128)),
        ("mla-4096", [4096], dict(heads=16, kv_heads=16, qk_dim=192, v_dim=128)),
        ("1x16384", [16384], dict(heads=32, kv_heads=8, qk_dim=128))]
    for name, lengths, options in large:
        yield Case(name, lambda lengths=lengths, options=options: make_case(lengths, lengths, **options), large=True)


def _rising(args: dict) -> dict:
    """Logits whose maximum grows from key to key."""
    keys = args["k"]
    return {**args, "k": keys * torch.linspace(0.1, 8, len(keys), dtype=keys.dtype)[:, None, None]}


def _strided(args: dict) -> dict:
    """Queries, keys and values as slices of one fused projection's rows, as models with as many of each pass them."""
    heads, kv_heads = args["q"].shape[1], args["k"].shape[1]
    fused = torch.cat([args["q"], args["k"], args["v"]], 1)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    return {**args, "q": q, "k": k, "v": v}


def _projected(args: dict) -> dict:
    """Keys and values side by side in each head of one projection, as MLA's: rows and heads of both are strided."""
    width, v_dim = args["k"].shape[2], args["v"].shape[2]
    k, v = torch.cat([args["k"], args["v"]], 2).split([width, v_dim], 2)
    return {**args, "k": k, "v": v}


def check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3 or tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise BadArgument(name, "[tokens, heads, head_dim] with a contiguous last dimension", tensor)
    if not q.dtype.is_floating_point or q.element_size() == 1:
        raise BadArgument("q", "bf16, fp16 or fp32", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise BadArgument(name, f"dtype {q.dtype}, that of q", tensor)
    if k.shape[2] != q.shape[2]:
        raise BadArgument("k", f"[total_k, num_kv_heads, {q.shape[2]}], heads as wide as those of q", k)
    if v.shape[:2] != k.shape[:2]:
        raise BadArgument("v", f"[{k.shape[0]}, {k.shape[1]}, v_dim], the tokens and heads of k", v)
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise BadArgument("q", f"a multiple of k's {k.shape[1]} heads", q)
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if starts.ndim != 1 or not len(starts) or starts.dtype != torch.int32 or not starts.is_contiguous():
            raise BadArgument(name, "contiguous int32 [num_seqs + 1]: 0, then running sums", starts)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise BadArgument("cu_seqlens_k", f"[{len(cu_seqlens_q)}], a number for each of cu_seqlens_q", cu_seqlens_k)
    if platform.on_gpu(q):  # what follows would synchronize
        return
    for side, tensor, starts, bound in (("q", q, cu_seqlens_q, max_seqlen_q), ("k", k, cu_seqlens_k, max_seqlen_k)):
        sums, lengths = starts.tolist(), starts.diff().tolist()
        if sums[0] != 0 or sums[-1] != tensor.shape[0] or min(lengths, default=0) < 0:
            expected = f"running sums from 0 to {tensor.shape[0]}, the tokens of {side}"
            raise BadArgument(f"cu_seqlens_{side}", expected, sums)
        if max(lengths, default=0) > bound:
            expected = f"at least {max(lengths)}, the longest of cu_seqlens_{side}"
            raise BadArgument(f"max_seqlen_{side}", expected, bound)


def cost(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True) -> Cost:
    pairs = keys = 0
    for queries, length in zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True):
        seeing = min(queries, length)  # of causal queries: the i-th from the end sees all keys but i
        pairs += seeing * length - seeing * (seeing - 1) // 2 if causal else queries * length
        keys += length if queries else 0
    tokens, heads, qk_dim = q.shape
    v_dim = v.shape[2]
    return Cost(bytes=(keys * k.shape[1] + tokens * heads) * (qk_dim + v_dim) * q.element_size() + 4 * tokens * heads,
                flops=2 * pairs * heads * (qk_dim + v_dim))


def fake(q, k, v, *args, **kwargs):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=wide)


@op(cases=cases, check=check, cost=cost, fake=fake)
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences of different lengths: rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q attend to
    rows cu_seqlens_k[i] to cu_seqlens_k[i + 1] of k and v.

        out = softmax(scale * q @ k.T) @ v

    The causal mask is aligned to the end: the last query of a sequence attends to all keys, the one before it to
    all but the last key, and so on. The result of a query without keys is 0. Softmax is computed in fp32; products take
    the inputs' dtype and accumulate in fp32; the result is rounded once.
    (Vaswani et al. 2017; in blocks with a running maximum: Milakov & Gimelshein 2018, Dao et al. 2022; keys wider than
    values: DeepSeek-AI 2024)

    q               [total_q, num_heads, qk_dim]  bf16, fp16 or fp32; last dim contiguous, the others strided
    k               [total_k, num_kv_heads, qk_dim]  dtype of q; num_heads is a multiple of num_kv_heads
    v               [total_k, num_kv_heads, v_dim]  dtype of q
    cu_seqlens_q    [num_seqs + 1]  int32; cumulative numbers of queries, from 0 to total_q. On a GPU the last entry may
                    be smaller, as in a padded batch of a captured graph: rows of q from there on are not read, and
                    those of out and lse are not written
    cu_seqlens_k    [num_seqs + 1]  int32; cumulative numbers of keys, from 0 to total_k
    max_seqlen_q    at least the maximum number of queries of a sequence
    max_seqlen_k    at least the maximum number of keys of a sequence
    scale           factor on the logits, usually qk_dim ** -0.5
    causal          whether the causal mask applies
    returns         out [total_q, num_heads, v_dim]  dtype of q, contiguous, and lse [total_q, num_heads]  fp32; natural
                    log of the sum of exp(logit); -inf for a query without keys
    raises          BadArgument (a ValueError) for other dtypes, shapes or strides; on a CPU also for cu_seqlens that do
                    not fit the tensors or the max_seqlens
    """
    out, lse = fake(q, k, v)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        keys, values = (x[starts_k[i]:starts_k[i + 1]].to(lse.dtype) for x in (k, v))
        at, before = torch.arange(len(keys), device=q.device), len(keys) - starts_q[i + 1]
        for rows in torch.arange(starts_q[i], starts_q[i + 1], device=q.device).split(QUERIES_AT_ONCE):
            seen = (at <= (rows + before)[:, None]) | (not causal)
            result, lse[rows] = attend(q[rows].to(lse.dtype), keys, values, seen, scale)
            out[rows] = result.to(q.dtype)
    return out, lse
