"""AITER's mixture of experts as pieces of work: the first stage of FP8 experts, and the gate's top-k."""

import functools
from collections.abc import Iterator

import numpy as np
from aiter_work import Arrays, Launch, Ours, Work, distance, fp8, of_fp8, preshuffled, slots, wide

from wave64.ops.fused_moe import make_case as our_moe

# ---- gate and up projections in FP8, scaled by blocks of 128, and silu(gate) * up of them

BLOCK = 128
ROWS, COLUMNS = 32, 256  # of a workgroup's result
WHOLE = "fmoe/silu/fmoe_bf16_blockscaleFp8_g1u1_vs_silu_1tg_32x256.co"


def sorted_by_expert(ids: np.ndarray, rows: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(which choice << 24 | which token, in blocks of `rows` of one expert each, padded; the blocks' experts)."""
    tokens, top_k = ids.shape
    entries: list[int] = []
    blocks: list[int] = []
    for expert in range(experts):
        chosen = [int(k) << 24 | int(t) for t, k in zip(*np.nonzero(ids == expert), strict=True)]
        chosen += [top_k << 24 | tokens] * (-len(chosen) % rows)
        entries += chosen
        blocks += [expert] * (len(chosen) // rows)
    return np.array(entries, np.int32), np.array(blocks, np.int32)


def _stage1(arch: str, tokens: int, hidden: int, inter: int, experts: int, rows: int = ROWS) -> Launch:
    """rows: of a workgroup's result."""
    random, mem = np.random.default_rng(5), Arrays()
    x, x_wide = fp8(random.standard_normal((tokens, hidden)) * 20, arch)
    weight, weight_wide = fp8(random.standard_normal((experts, 2 * inter, hidden)) * 20, arch)
    x_scale = (random.random((tokens, hidden // BLOCK)) * 1e-3 + 5e-4).astype(np.float32)
    w_scale = (random.random((experts, 2 * inter // BLOCK, hidden // BLOCK)) * 1e-3 + 5e-4).astype(np.float32)
    ids = random.integers(0, experts, (tokens, 1))
    entries, blocks = sorted_by_expert(ids, rows, experts)
    size = tokens * inter  # bytes of the result, and a scale for each 128 of them behind
    out = mem.new("out", (size + size // BLOCK * 4,), np.uint8, 0xFF)
    given = [mem.put(name, value) for name, value in (
        ("input", x), ("gate_up", preshuffled(weight)), ("num_valid_ids", np.array([len(entries), tokens], np.int32)),
        ("input_scale", np.ascontiguousarray(x_scale.T)), ("gate_up_scale", w_scale))]
    sorting = mem.put("sorted_token_ids", entries), mem.put("sorted_expert_ids", blocks)
    args = slots(out, *given, None, *sorting, hidden, inter, tokens, experts, hidden, hidden, inter,
                 2 * inter * hidden, w_scale[0].nbytes, inter // BLOCK * 4, 1, 0, 0, None)

    def error() -> float:
        by_block = np.repeat(x_scale.astype(np.float64), BLOCK, 1)
        products = np.stack([(weight_wide[e] * by_blocks(w_scale[e])) @ row
                             for e, row in zip(ids[:, 0], x_wide * by_block, strict=True)])
        gate, up = products[:, :inter], products[:, inter:]
        numbers = of_fp8(out[:size], arch).reshape(tokens, inter // BLOCK, BLOCK)
        scales = out[size:].view(np.float32).reshape(tokens, inter // BLOCK)
        return distance((numbers * scales[..., None]).reshape(tokens, inter), gate / (1 + np.exp(-gate)) * up)
    return Launch((-(-inter // COLUMNS), len(blocks), 1), 256, args, mem, error)


def whole(arch: str, tokens: int, hidden: int, inter: int, experts: int, top_k: int = 1) -> Launch:
    """All of a mixture of experts in one launch, whose workgroups add their parts up by atomics on bf16."""
    random, mem = np.random.default_rng(5), Arrays()

    def scales(*shape: int) -> np.ndarray:
        return (random.random(shape) * 1e-3 + 5e-4).astype(np.float32)

    x, x_wide = fp8(random.standard_normal((tokens, hidden)) * 20, arch)
    up, up_wide = fp8(random.standard_normal((experts, 2 * inter, hidden)) * 20, arch)
    down, down_wide = fp8(random.standard_normal((experts, hidden, inter)) * 20, arch)
    x_scale, up_scale = scales(tokens, hidden // BLOCK), scales(experts, 2 * inter // BLOCK, hidden // BLOCK) * 2
    down_scale = scales(experts, hidden // BLOCK, inter // BLOCK) * 20
    ids, routed = random.integers(0, experts, (tokens, 1)), random.random((tokens, top_k)).astype(np.float32)
    if top_k > 1:
        ids = random.random((tokens, experts)).argsort(1)[:, :top_k]
    entries, blocks = sorted_by_expert(ids, ROWS, experts)
    token, choice = entries & 0xFFFFFF, np.minimum(entries >> 24, top_k - 1)
    by_entry = np.where(token < tokens, routed[np.minimum(token, tokens - 1), choice], 0).astype(np.float32)
    out = mem.new("out", (tokens, hidden), np.uint16, 0)
    given = [mem.put(name, value) for name, value in (
        ("input", x), ("gate_up", preshuffled(up)), ("num_valid_ids", np.array([len(entries), tokens], np.int32)),
        ("down", preshuffled(down)), ("input_scale", np.ascontiguousarray(x_scale.T)), ("gate_up_scale", up_scale),
        ("down_scale", down_scale))]
    sorting = [mem.put(name, value) for name, value in (
        ("sorted_token_ids", entries), ("sorted_weights", by_entry), ("sorted_expert_ids", blocks))]
    args = slots(out, *given, None, *sorting, hidden, inter, tokens, experts, hidden, hidden, inter, hidden * 2,
                 2 * inter * hidden, inter * hidden, up_scale[0].nbytes, down_scale[0].nbytes, inter * 4, 1, 0,
                 -(-inter // COLUMNS))

    def error() -> float:
        want = np.zeros((tokens, hidden))
        for e in np.unique(ids):
            t, choice = np.nonzero(ids == e)
            rows = x_wide[t] * np.repeat(x_scale[t], BLOCK, 1)
            gate, value = np.split(rows @ (up_wide[e] * by_blocks(up_scale[e])).T, 2, 1)
            h = gate / (1 + np.exp(-gate)) * value
            want[t] += routed[t, choice, None] * (h @ (down_wide[e] * by_blocks(down_scale[e])).T)
        return distance(wide(out), want)
    return Launch((-(-inter // COLUMNS), len(blocks), 1), 256, args, mem, error)


def by_blocks(scale: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(scale.astype(np.float64), BLOCK, 0), BLOCK, 1)


def moe(arch: str, small: bool) -> Iterator[Work]:
    name = f"{arch}/fmoe_2stages/fmoe_stage1_bf16_pertokenFp8_blockscale_g1u1_{ROWS}x{COLUMNS}_2tg_pf2.co"
    for tokens, hidden, experts in [(16, 512, 2)] if small else [(16, 512, 2), (64, 1024, 8)]:
        inter = 256
        make = functools.partial(our_moe, tokens, experts, 1, hidden, inter, scales="block", block_shape=[BLOCK] * 2)
        what = f"FP8 experts' gate and up, {tokens} tokens, {experts} experts, {hidden} to 2 x {inter}"
        yield Work("moe", what, name, functools.partial(_stage1, arch, tokens, hidden, inter, experts), 3.2e-2,
                   Ours("fused_moe", make, "_up_"), "AITER's result is of FP8, ours of bf16")
        yield Work("moe", what.replace("gate and up", "all"), f"{arch}/{WHOLE}",
                   functools.partial(whole, arch, tokens, hidden, inter, experts), 5e-2, Ours("fused_moe", make))


# ---- top-k of the gate

def _gate(rows: int, experts: int, top_k: int) -> Launch:
    random, mem = np.random.default_rng(3), Arrays()
    gating = mem.put("gating_output", random.standard_normal((rows, experts)).astype(np.float32))
    weights = mem.new("topk_weights", (rows, top_k), np.float32, np.nan)
    ids = mem.new("topk_ids", (rows, top_k), np.int32, -1)
    args = slots(ids, weights, gating, rows, experts, top_k, 1, top_k * 4)

    def error() -> float:
        chances = np.exp(gating.astype(np.float64) - gating.max(1, keepdims=True))
        best = np.argsort(-chances, 1, kind="stable")[:, :top_k]
        want = np.take_along_axis(chances, best, 1)
        return distance(weights, want / want.sum(1, keepdims=True)) if (ids == best).all() else float("inf")
    return Launch((rows // 4, 1, 1), 256, args, mem, error)


def topk(arch: str, small: bool) -> Iterator[Work]:
    if arch != "gfx942":
        return
    for rows in [4] if small else [4, 64]:
        make = functools.partial(_logits, rows)
        yield Work("topk", f"softmax and top 8 of 128, {rows} tokens", "gfx942/topksoftmax/topksoftmax_4x128x8.co",
                   functools.partial(_gate, rows, 128, 8), 1e-5, Ours("topk_softmax", make))


def _logits(rows: int) -> dict:
    import torch

    return dict(gating=torch.randn(rows, 128), top_k=8, renormalize=True)
