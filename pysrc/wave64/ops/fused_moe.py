"""Mixture of experts: each token through the gated MLPs that its router chose, weighted and summed up."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES
from wave64.quant import FP8, dequantize, fp8_dtype, quantize

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def make_case(tokens: int, experts: int = 4, top_k: int = 2, hidden: int = 64, inter: int = 32,
              dtype: torch.dtype = torch.bfloat16, scales: str = "", block_shape: list[int] | None = None,
              fp8: torch.dtype | None = None, routed: int = 0, dropped: float = 0.0, one: bool = False,
              padded: int = 0, **options) -> dict:
    """scales: "", or for FP8 weights "tensor", "channel" or "block". routed: experts that a map maps to the local ones,
    every second to none. dropped: fraction of the ids that are -1 or out of range. one: all go to the first experts.
    padded: numbers between rows of the weights."""
    def weight(rows, columns):
        drawn = torch.randn(experts, rows, columns + padded, dtype=torch.bfloat16 if scales else dtype)
        return drawn.to(fp8 or fp8_dtype())[..., :columns] if scales else drawn.mul_(columns**-0.5)[..., :columns]

    def scale(rows, columns):
        bn, bk = block_shape or [1, 1]
        shape = {"tensor": [experts], "channel": [experts, rows], "block": [experts, -(-rows // bn), -(-columns // bk)]}
        return (torch.rand(shape[scales]) + 0.5) * columns**-0.5

    if scales:
        options.update(w13_scale=scale(2 * inter, hidden), w2_scale=scale(hidden, inter), block_shape=block_shape)
    ids = torch.rand(tokens, routed or experts)
    if one:
        ids = ids.fill_(0.0).sub_(torch.arange(routed or experts))
    weights, ids = ids.softmax(-1).topk(top_k)
    if dropped:
        others = torch.tensor([-1, -2**31, routed or experts, 2**31 - 1])[torch.randint(4, ids.shape)]
        ids = torch.where(torch.rand(ids.shape) < dropped, others, ids)
    if routed:
        local = torch.arange(routed, dtype=torch.int32) // 2
        options.update(expert_map=torch.where((torch.arange(routed) % 2 == 0) & (local < experts), local, -1).int())
    return dict(x=torch.randn(tokens, hidden, dtype=dtype), w13=weight(2 * inter, hidden), w2=weight(hidden, inter),
                topk_weights=weights, topk_ids=ids.to(torch.int32), **options)


def cases():
    blocks = dict(scales="block", block_shape=[32, 32])
    wide: dict[str, Any] = dict(scales="block", block_shape=[128, 128])
    drawn = {
        "small": dict(tokens=5),
        "many": dict(tokens=33, experts=5),
        "one-token": dict(tokens=1, experts=8, top_k=3),
        "one-expert": dict(tokens=9, experts=1, top_k=1),
        "all-to-one": dict(tokens=25, one=True),
        "odd": dict(tokens=19, experts=3, hidden=75, inter=97),
        "odd-few": dict(tokens=3, experts=3, hidden=75, inter=97),
        "fp16": dict(tokens=7, dtype=torch.float16),
        "fp32": dict(tokens=21, dtype=torch.float32),
        "gelu": dict(tokens=4, dtype=torch.float32, activation="gelu"),
        "gelu-tanh": dict(tokens=4, dtype=torch.float32, activation="gelu_tanh"),
        "on-input": dict(tokens=20, top_k=1, apply_router_weight_on_input=True),
        "map": dict(tokens=18, routed=9),
        "map-few": dict(tokens=4, routed=9),
        "dropped": dict(tokens=20, dropped=0.4),
        "dropped-few": dict(tokens=6, dropped=0.4),
        "all-dropped": dict(tokens=3, dropped=1.0),
        "tensor": dict(tokens=20, scales="tensor"),
        "channel": dict(tokens=18, scales="channel"),
        "channel-few": dict(tokens=3, scales="channel"),
        "block": dict(tokens=20, inter=64, **blocks),
        "block-few": dict(tokens=3, inter=64, **blocks),
        "block-odd": dict(tokens=20, hidden=80, inter=48, **blocks),
        "block-odd-few": dict(tokens=2, hidden=80, inter=48, **blocks),
        "block-fp16": dict(tokens=3, dtype=torch.float16, **blocks),
        "ue8m0": dict(tokens=20, inter=64, scale_ue8m0=True, **blocks),
        "ue8m0-few": dict(tokens=3, inter=64, scale_ue8m0=True, **blocks),
        "padded": dict(tokens=3, padded=16),
        "block-128": dict(tokens=20, experts=5, hidden=384, inter=128, padded=16, **wide),
        "block-128-fp16": dict(tokens=36, top_k=1, hidden=128, inter=256, dtype=torch.float16, routed=9,
                               apply_router_weight_on_input=True, **wide),
        "block-128-some": dict(tokens=90, experts=3, hidden=384, inter=256, dropped=0.2, padded=16, **wide),
        "block-128-some-fp16": dict(tokens=40, experts=1, top_k=1, hidden=128, inter=128, dtype=torch.float16, **wide),
        "block-128-many": dict(tokens=150, experts=1, top_k=1, hidden=128, inter=128,
                               apply_router_weight_on_input=True, **wide),
        "block-128-many-fp16": dict(tokens=140, experts=1, top_k=1, hidden=128, inter=128, dtype=torch.float16, **wide),
        "no-tokens": dict(tokens=0),
    }
    for name, settings in drawn.items():
        yield Case(name, lambda settings=settings: make_case(**settings))
    for tokens in (1, 16, 64, 256, 1024, 4096):
        for name, kind in (("bf16", {}), ("fp8", wide)):
            yield Case(f"{tokens}x256x256-{name}", lambda t=tokens, kind=kind: make_case(t, 256, 8, 7168, 256, **kind),
                       large=True)
    yield Case("64x256x256-channel", lambda: make_case(64, 256, 8, 7168, 256, scales="channel"), large=True)
    yield Case("1x256x256-channel", lambda: make_case(1, 256, 8, 7168, 256, scales="channel"), large=True)
    for tokens in (64, 2048):
        yield Case(f"{tokens}x8x1792", lambda t=tokens: make_case(t, 8, 2, 4096, 1792), large=True)


def granularity(scale: Tensor | None, block_shape: list[int] | None) -> str:
    """The granularity of the scales: "tensor", "channel" or "block"; "" without scales."""
    return "" if scale is None else "block" if block_shape else "tensor" if scale.ndim == 1 else "channel"


def _check_scale(name: str, weight: Tensor, scale: Tensor | None, block_shape: list[int] | None) -> None:
    experts, rows, columns = weight.shape
    if weight.dtype not in FP8.values():
        if scale is not None:
            raise BadArgument(name, f"None for {weight.dtype} weights", scale, "scales belong to FP8 weights")
        return
    if block_shape:
        shapes = [[experts, -(-rows // block_shape[0]), -(-columns // block_shape[1])]]
        words = f"float32 {shapes[0]}, a number per block of {block_shape}"
    else:
        shapes = [[experts], [experts, rows], [experts, rows, 1]]
        words = f"float32 {shapes[0]}, a number per expert, or {shapes[1]}, one per channel"
    if scale is None:
        raise BadArgument(name, words, "None", "FP8 weights have scales")
    if scale.dtype != torch.float32 or list(scale.shape) not in shapes or not scale.is_contiguous():
        raise BadArgument(name, f"contiguous {words}", scale)


def check(x, w13, w2, topk_weights, topk_ids, w13_scale=None, w2_scale=None, block_shape=None, activation="silu",
          apply_router_weight_on_input=False, expert_map=None, scale_ue8m0=False):
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1 and x.shape[1] > 1:
        raise BadArgument("x", "[num_tokens, hidden] with a contiguous last dimension", x)
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    tokens, hidden = x.shape
    if w13.ndim != 3 or not w13.shape[0] or not w13.shape[1] or w13.shape[1] % 2 or w13.shape[2] != hidden:
        raise BadArgument("w13", f"[num_experts, 2 * inter, {hidden}]", w13)
    experts, inter = w13.shape[0], w13.shape[1] // 2
    if w2.shape != (experts, hidden, inter):
        raise BadArgument("w2", f"{[experts, hidden, inter]}, as w13 says", w2)
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.stride(2) != 1 and weight.shape[2] > 1:
            raise BadArgument(name, "a contiguous last dimension", weight)
    if w13.dtype != x.dtype and w13.dtype not in FP8.values():
        raise BadArgument("w13", f"dtype {x.dtype}, that of x, or float8_e4m3fn(uz)", w13)
    if w2.dtype != w13.dtype:
        raise BadArgument("w2", f"dtype {w13.dtype}, that of w13", w2)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != tokens or topk_ids.dtype != torch.int32 \
            or not topk_ids.is_contiguous():
        raise BadArgument("topk_ids", f"contiguous int32 [{tokens}, top_k]", topk_ids)
    if topk_weights.shape != topk_ids.shape or topk_weights.dtype != torch.float32 or not topk_weights.is_contiguous():
        raise BadArgument("topk_weights", f"contiguous float32 {list(topk_ids.shape)}, a number per id", topk_weights)
    if expert_map is not None and (expert_map.ndim != 1 or expert_map.dtype != torch.int32
                                   or not expert_map.is_contiguous()):
        raise BadArgument("expert_map", "contiguous int32 [num_global_experts]", expert_map)
    routed = experts if expert_map is None else expert_map.shape[0]
    if not 1 <= topk_ids.shape[1] <= routed:
        raise BadArgument("topk_ids", f"from 1 to {routed} ids a token, as there are experts", topk_ids)
    if block_shape is not None and (len(block_shape) != 2 or min(block_shape) < 1):
        raise BadArgument("block_shape", "two positive numbers, rows and columns of a block", block_shape)
    if scale_ue8m0 and block_shape is None:
        raise BadArgument("scale_ue8m0", "False without block_shape", "True", "such scales are of groups of columns")
    if block_shape is not None and w13.dtype == x.dtype:
        raise BadArgument("block_shape", f"None for {w13.dtype} weights", block_shape, "blocks belong to FP8 weights")
    _check_scale("w13_scale", w13, w13_scale, block_shape)
    _check_scale("w2_scale", w2, w2_scale, block_shape)
    if activation not in ACTIVATIONS:
        raise BadArgument("activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise BadArgument("apply_router_weight_on_input", f"False for {topk_ids.shape[1]} experts a token", "True",
                          "weights of several experts cannot go into one input")


def local_ids(topk_ids: Tensor, experts: int, expert_map: Tensor | None) -> Tensor:
    """The local expert of each id; -1: none."""
    routed = experts if expert_map is None else expert_map.shape[0]
    known = (topk_ids >= 0) & (topk_ids < routed)
    if expert_map is not None:
        topk_ids = expert_map[topk_ids.clamp(0, routed - 1).long()]
        known &= (topk_ids >= 0) & (topk_ids < experts)
    return torch.where(known, topk_ids, -1)


def cost(x, w13, w2, topk_weights, topk_ids, w13_scale=None, w2_scale=None, block_shape=None, activation="silu",
         apply_router_weight_on_input=False, expert_map=None, scale_ue8m0=False) -> Cost:
    """Weights of the experts that are chosen, each once."""
    ids = local_ids(topk_ids, w13.shape[0], expert_map)
    ids = ids[ids >= 0]
    each = w13[0].numel() + w2[0].numel()
    return Cost(bytes=2 * x.nbytes + ids.unique().numel() * each * w13.element_size(), flops=2 * ids.numel() * each)


def dequantized(weight: Tensor, scale: Tensor | None, block_shape: list[int] | None, wide: torch.dtype) -> Tensor:
    """One expert's weight [N, K]; its scale is a number, [N], [N, 1] or one of each block."""
    if scale is None:
        return weight.to(wide)
    return dequantize(weight, scale if block_shape or not scale.ndim else scale.view(-1, 1), block_shape, wide)


def as_read(x: Tensor, fp8: torch.dtype, block_shape: list[int] | None, ue8m0: bool = False) -> Tensor:
    """x [rows, columns] in fp32 as a product with FP8 weights reads it: quantized by rows or groups of columns."""
    columns = x.shape[1]
    group = block_shape[1] if block_shape else columns
    q, scale = quantize(F.pad(x.float(), (0, -columns % group)).unflatten(1, (-1, group)), -1, fp8, ue8m0)
    return (q.float() * scale).flatten(1)[:, :columns]


def activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(
        gate, approximate="tanh" if activation == "gelu_tanh" else "none")


@op(cases=cases, check=check, cost=cost, fake=lambda x, *_, **__: x.new_empty(x.shape))
def fused_moe(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
              w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
              activation: str = "silu", apply_router_weight_on_input: bool = False,
              expert_map: Tensor | None = None, scale_ue8m0: bool = False) -> Tensor:
    """Mixture of experts with gated MLPs: each token's output is the weighted sum over its top_k experts,

        y[t] = sum over j of topk_weights[t, j] W2 h,  h = act(G x[t]) * (U x[t])

    with the weights of expert topk_ids[t, j]: G is the first and U the second half of the rows of w13, W2 is w2. An id
    that is -1, out of range or mapped to -1 contributes nothing; a token with no other ids gets zeros.
    (Shazeer et al. 2017; gated: Shazeer 2020, GLU variants)

    x             [num_tokens, hidden]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    w13           [num_experts, 2 * inter, hidden]  dtype of x, or the architecture's FP8; last dim contiguous, experts
                  and rows may be strided
    w2            [num_experts, hidden, inter]      like w13
    topk_weights  [num_tokens, top_k]   fp32
    topk_ids      [num_tokens, top_k]   int32
    w13_scale     for FP8 weights, fp32, weight = stored * scale: [num_experts]; or, per channel,
                  [num_experts, 2 * inter] or [num_experts, 2 * inter, 1]; or, with block_shape [bn, bk], one per block,
                  partial ones included, [num_experts, ceil(2 * inter / bn), ceil(hidden / bk)]
    w2_scale      like w13_scale, for the shape of w2
    activation    silu, gelu (with erf), gelu_tanh
    apply_router_weight_on_input  multiply G x and U x by the weight, not y (Llama 4); top_k 1 only
    expert_map    [num_global_experts]  int32: the local expert of a global id, or -1
    scale_ue8m0   with block_shape: the scales of x and h are rounded up to powers of two (DeepSeek-V3.1)
    returns       [num_tokens, hidden]  dtype of x, contiguous
    raises        BadArgument (a ValueError) for other shapes, dtypes, strides, devices or names

    Sums are in fp32, h is rounded to the dtype of x. With FP8 weights x and h are quantized as wave64.quant says: by
    rows, or with block_shape by groups of bk columns, each with a scale of its own.
    In fp64, which is for comparison, nothing is rounded or quantized; FP8 weights are stored * scale.

    Error bound. |M| has the magnitudes of M; u is the dtype's unit roundoff (2^-8 in bf16, 2^-11 in fp16, 2^-24 in
    fp32); s(K) bounds the relative error of a sum of K products: K 2^-23, plus 2^-7 in FP8, whose products Hopper
    aligns to 14 bits before it adds a block of 128. Rounding v to FP8 has an error of d(v) = 2^-4 |v| + 2^-18 max |v|:
    half a step of the 3 fraction bits, or half of the smallest step, 2^-10 of 448 or 2^-11 of 240, to which the group's
    largest value is scaled; without FP8 d = 0. Element by element and to first order, the errors are
      of G x         e_G = |G| d(x) + s |G| |x|   and e_U of U x, the same with U;
      of h           e_h = |act(Gx)| e_U + 1.13 e_G (|Ux| + e_U) + (u + 2^-20) (|Gx| |Ux|), for |act(a)| <= |a| and
                     |act'| <= 1.13 (the maximum of gelu's; silu's is 1.10);
      of W2 h        e = |W2| (e_h + d(|h| + e_h)) + s |W2| (|h| + e_h) + u |W2 h|, the last where pairs are stored;
      of y           the sum over j of |topk_weights[t, j]| (e + (u + top_k 2^-23) |W2 h|).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    quantized = w13.dtype in FP8.values() and wide != torch.float64
    ids = local_ids(topk_ids, w13.shape[0], expert_map)
    read = as_read(x, w13.dtype, block_shape, scale_ue8m0) if quantized else x.to(wide)
    pairs = x.new_zeros((*topk_ids.shape, x.shape[1]), dtype=wide)
    # Experts without tokens are skipped: of hundreds of experts they are nearly all.
    for e in ids.unique().tolist():
        if e < 0:
            continue
        token, slot = (ids == e).nonzero(as_tuple=True)
        weight = topk_weights[token, slot, None].to(wide)
        scales = [None if scale is None else scale[e] for scale in (w13_scale, w2_scale)]
        both = read[token] @ dequantized(w13[e], scales[0], block_shape, wide).T
        gate, up = (both * weight if apply_router_weight_on_input else both).chunk(2, -1)
        h = (activated(gate, activation) * up).to(x.dtype)
        h = as_read(h, w2.dtype, block_shape, scale_ue8m0) if quantized else h.to(wide)
        y = h @ dequantized(w2[e], scales[1], block_shape, wide).T
        pairs[token, slot] = y if apply_router_weight_on_input else y * weight
    return pairs.sum(1).to(x.dtype)
