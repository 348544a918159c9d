"""AITER's attention as pieces of work: MLA decode, paged attention, the forward pass."""

import functools
from collections.abc import Iterator

import numpy as np
from aiter_work import Arrays, Launch, Ours, Work, bf16, distance, slots, wide

from wave64.ops.mla_decode import make_case as our_mla
from wave64.ops.paged_attention import make_case as our_paged_attention
from wave64.ops.varlen_attention import make_case as our_attention


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# ---- MLA decode: 16 heads on latents of 512 + 64, pages of one token, in splits that another kernel merges

HEADS, LATENT, VALUES = 16, 576, 512


def _mla(keys: int, splits: int) -> Launch:
    random, mem = np.random.default_rng(0), Arrays()
    pages, scale = keys + 7, 192**-0.5
    q = mem.put("q", bf16(random.standard_normal((1, HEADS, LATENT))))
    kv = mem.put("kv", bf16(random.standard_normal((pages, 1, 1, LATENT)) * 0.5))
    indices = mem.put("kv_page_indices", random.permutation(pages)[:keys].astype(np.int32))
    starts = {name: mem.put(name, np.array([0, end], np.int32))
              for name, end in (("kv_indptr", keys), ("qo_indptr", 1), ("num_kv_splits_indptr", splits))}
    last = mem.put("kv_last_page_lens", np.ones(1, np.int32))
    out = mem.new("splitData", (splits, HEADS, VALUES), np.float32, np.nan)
    lse = mem.new("splitLse", (splits, HEADS), np.float32, np.nan)
    args = slots(out, lse, q, kv, starts["kv_indptr"], indices, last, scale, HEADS, splits, HEADS * LATENT * 2,
                 LATENT * 2, 0, starts["qo_indptr"], starts["num_kv_splits_indptr"], None, None, None, 0)

    def error() -> float:
        k = wide(kv).reshape(pages, LATENT)[indices]
        want = softmax(wide(q)[0] @ k.T * scale) @ k[:, :VALUES]
        weights = np.exp(lse.astype(np.float64) - lse.max(0))
        merged = (weights[..., None] * out).sum(0) / weights.sum(0)[:, None]
        return distance(merged, want)
    return Launch((1, 1, splits), 256, args, mem, error)


def mla(arch: str, small: bool) -> Iterator[Work]:
    if arch == "gfx942":
        name = "gfx942/mla/mla_dec_stage1_bf16_a16w16_subQ16_mqa16.co"
    else:
        name = "gfx950/mla/mla_a16w16_qh16_m16x4_n16x1_coex0_mask1.co"
    for keys, splits in [(256, 4)] if small else [(256, 4), (1024, 16)]:
        yield Work("mla", f"MLA decode, 16 heads, {keys} keys in {splits} splits", name,
                   functools.partial(_mla, keys, splits), 1e-2,
                   Ours("mla_decode", functools.partial(our_mla, [keys], heads=16, page_size=64)),
                   "AITER's merge of the splits is another kernel, and not counted")


# ---- paged attention: 8 query heads on one of keys, pages of 16 tokens, keys and values in their own layouts

GROUP, DIM, TOKENS = 8, 128, 16


def _paged(keys: int) -> Launch:
    random, mem = np.random.default_rng(4), Arrays()
    used = -(-keys // TOKENS)
    pages = used + 5
    q = mem.put("q", bf16(random.standard_normal((1, GROUP, DIM))))
    k, v = (bf16(random.standard_normal((pages, 1, TOKENS, DIM))) for _ in range(2))
    keys_ = mem.put("k", np.ascontiguousarray(k.reshape(pages, 1, TOKENS, DIM // 8, 8).transpose(0, 1, 3, 2, 4)))
    values = mem.put("v", np.ascontiguousarray(
        v.transpose(0, 1, 3, 2).reshape(pages, 1, DIM, TOKENS // 8, 8).transpose(0, 1, 3, 2, 4)))
    table = mem.put("block_tables", random.permutation(pages)[:used].reshape(1, used).astype(np.int32))
    lengths = mem.put("context_lens", np.array([keys], np.int32))
    out = mem.new("out", (1, GROUP, DIM), np.uint16, 0xFFFF)
    page_bytes = TOKENS * DIM * 2
    args = slots(out, q, keys_, values, table, lengths, None, None, float(np.log2(np.e) * DIM**-0.5), used, 1,
                 GROUP * DIM * 2, page_bytes, page_bytes, GROUP, None)

    def error() -> float:
        k_, v_ = (wide(x[table[0], 0]).reshape(-1, DIM)[:keys] for x in (k, v))
        return distance(wide(out)[0], softmax(wide(q)[0] @ k_.T * DIM**-0.5) @ v_)
    return Launch((1, 1, 1), 256, args, mem, error)


def pa(arch: str, small: bool) -> Iterator[Work]:
    for keys in [512] if small else [512, 4096]:
        yield Work("pa", f"paged attention, 8 heads on 1, {keys} keys", f"{arch}/pa/pa_bf16_noquant_gqa8_1tg_4w.co",
                   functools.partial(_paged, keys), 2e-2,
                   Ours("paged_attention", functools.partial(our_paged_attention, [keys], heads=GROUP, kv_heads=1,
                                                             head_dim=DIM, page_size=TOKENS)))


# ---- the forward pass: one head, 256 queries a workgroup

QUERIES = 256


def _forward(keys: int, causal: bool) -> Launch:
    random, mem = np.random.default_rng(2), Arrays()
    q, k, v = (mem.put(name, bf16(random.standard_normal((length, DIM))))
               for name, length in (("q", QUERIES), ("k", keys), ("v", keys)))
    out = mem.new("out", (QUERIES, DIM), np.uint16, 0xFFFF)
    lse = mem.new("lse", (QUERIES,), np.float32, np.nan)
    row, scale = DIM * 2, DIM**-0.5
    tensor = (row, row, QUERIES * row), (row, row, keys * row)  # bytes between tokens, heads, sequences
    args = slots(out, q, k, v, lse, scale, QUERIES, row, QUERIES * row, row, QUERIES * row, 1, *tensor[1], 5, 1, keys,
                 DIM, DIM, 1, *tensor[1], *tensor[0], None, None, QUERIES * 4, *[None] * 5, *[0] * 6)

    def error() -> float:
        scores = wide(q) @ wide(k).T * scale
        if causal:
            scores[np.arange(keys)[None] > np.arange(QUERIES)[:, None] + keys - QUERIES] = -np.inf
        return distance(wide(out), softmax(scores) @ wide(v))
    return Launch((1, 1, 1), 512, args, mem, error)


def fmha(arch: str, small: bool) -> Iterator[Work]:
    folder = f"{arch}/fmha_v3_fwd/" + ("MI300/" if arch == "gfx942" else "")
    for keys in [256] if small else [256, 1024]:
        for causal in [False] if small else [False, True]:
            rounding = "_rtne" if arch == "gfx942" else ""
            name = f"fwd_hd128_bf16{'_causal' if causal else ''}{rounding}.co"
            yield Work("fmha", f"attention, {'causal, ' if causal else ''}{QUERIES} queries on {keys} keys",
                       folder + name, functools.partial(_forward, keys, causal), 1e-2,
                       Ours("varlen_attention", functools.partial(our_attention, [QUERIES], [keys], heads=1, kv_heads=1,
                                                                  qk_dim=DIM, causal=causal)))
