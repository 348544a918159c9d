"""DeepSeek's gate of a mixture of experts: the best experts of each token, out of its best groups of experts only."""

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES
from wave64.ops.topk_softmax import broken_rows, check_gating, clean, largest

SCORING = ("softmax", "sigmoid")


def _v2(tokens, experts=160, top_k=6, groups=8, topk_group=3, dtype=torch.float32, renormalize=False, scaling=16.0):
    return dict(gating=torch.randn(tokens, experts).to(dtype), top_k=top_k, num_expert_group=groups,
                topk_group=topk_group, renormalize=renormalize, routed_scaling_factor=scaling)


def _v3(tokens, experts=256, top_k=8, groups=8, topk_group=4, dtype=torch.float32, renormalize=True, scaling=2.5):
    return _v2(tokens, experts, top_k, groups, topk_group, dtype, renormalize, scaling) | dict(
        scoring_func="sigmoid", correction_bias=torch.randn(experts) * 0.1)


def _far_above():
    """One expert far above the others, in every row another: whoever subtracts less than it overflows."""
    return _v2(40, 160, 1, 1, 1) | dict(gating=100 * torch.eye(40, 160, dtype=torch.bfloat16)[:, torch.randperm(160)])


def cases():
    for dtype in DTYPES:
        yield Case(f"v2-{dtype}", lambda d=dtype: _v2(3, dtype=d))
        yield Case(f"v3-{dtype}", lambda d=dtype: _v3(3, dtype=d))
        # more experts of a group to a lane, in the HIP kernels: 8, 16
        for experts in (320, 576):
            yield Case(f"2x{experts}-{dtype}", lambda d=dtype, n=experts: _v3(2, n, dtype=d))
    yield Case("2x64-bf16", lambda: _v3(2, 64, dtype=torch.bfloat16))
    yield Case("one-token", lambda: _v3(1))
    yield Case("no-tokens", lambda: _v3(0))
    yield Case("no-groups", lambda: _v3(3, 384, 8, 1, 1))
    yield Case("all-groups", lambda: _v3(4, 72, 6, 6, 6))
    yield Case("odd-groups", lambda: _v3(5, 60, 7, 5, 2))
    yield Case("one-group", lambda: _v2(5, 60, 12, 5, 1))
    yield Case("many-groups", lambda: _v2(3, 64, 5, 32, 9))
    yield Case("groups-of-one", lambda: _v2(3, 12, 4, 12, 5))
    yield Case("all-experts", lambda: _v3(3, 16, 16, 4, 4))
    yield Case("softmax-renormalized", lambda: _v2(4, 160, renormalize=True, scaling=1.0))
    yield Case("softmax-with-bias", lambda: _v3(4, 48, 6, 4, 2) | dict(scoring_func="softmax"))
    yield Case("sigmoid-without-bias", lambda: _v3(4, 48, 6, 4, 2) | dict(correction_bias=None))
    yield Case("sigmoid-as-it-is", lambda: _v3(4, 48, 6, 4, 2, renormalize=False))
    yield Case("far-above", _far_above)
    yield Case("ties", lambda: _v2(6, 40, 9, 5, 3) | dict(gating=torch.randint(-1, 2, (6, 40)).half()))
    yield Case("shared-expert", lambda: _v3(5) | dict(num_fused_shared_experts=1))
    yield Case("shared-experts", lambda: _v2(3, 60, 6, 5, 2) | dict(num_fused_shared_experts=3))
    yield Case("strided", lambda: _v3(3, 64) | dict(gating=torch.randn(3, 99)[:, 31:95]))
    for scoring in SCORING:
        for bias in (False, True):
            yield Case(f"broken-rows-{scoring}{'-bias' if bias else ''}", lambda s=scoring, b=bias: _v2(
                9, 36, 6, 4, 2, renormalize=True) | dict(
                    gating=broken_rows(36), scoring_func=s, correction_bias=torch.zeros(36) if b else None))
    for tokens in (1, 16, 64, 256, 1024, 4096):
        yield Case(f"{tokens}x256-v3", lambda t=tokens: _v3(t), large=True)
        yield Case(f"{tokens}x160-v2", lambda t=tokens: _v2(t), large=True)


def check(gating, top_k, num_expert_group, topk_group, renormalize, scoring_func="softmax", correction_bias=None,
          routed_scaling_factor=1.0, num_fused_shared_experts=0):
    check_gating(gating, top_k)
    experts = gating.shape[1]
    if num_expert_group < 1 or experts % num_expert_group:
        raise BadArgument("num_expert_group", f"a divisor of {experts}, the number of experts", num_expert_group)
    if not 1 <= topk_group <= num_expert_group:
        raise BadArgument("topk_group", f"1 to {num_expert_group}, the number of groups", topk_group)
    in_group = experts // num_expert_group
    if top_k > topk_group * in_group:
        raise BadArgument("top_k", f"at most {topk_group * in_group}, the experts of {topk_group} groups", top_k)
    if scoring_func not in SCORING:
        raise BadArgument("scoring_func", " or ".join(map(repr, SCORING)), repr(scoring_func))
    if not 0 <= num_fused_shared_experts <= experts:
        raise BadArgument("num_fused_shared_experts", f"0 to {experts}, the number of experts",
                          num_fused_shared_experts)
    if correction_bias is None:
        return
    if correction_bias.shape != gating.shape[1:] or correction_bias.dtype != torch.float32 \
            or not correction_bias.is_contiguous():
        raise BadArgument("correction_bias", f"contiguous float32 [{experts}], a number per expert", correction_bias)
    if topk_group < num_expert_group and in_group < 2:
        raise BadArgument("num_expert_group", f"at most {experts // 2} with a correction_bias", num_expert_group,
                          "the score of a group is then the sum of its two largest")


def cost(gating, top_k, num_expert_group, topk_group, renormalize, scoring_func="softmax", correction_bias=None,
         routed_scaling_factor=1.0, num_fused_shared_experts=0) -> Cost:
    bias = 0 if correction_bias is None else correction_bias.nbytes
    return Cost(bytes=gating.nbytes + bias + 8 * (top_k + num_fused_shared_experts) * gating.shape[0])


def _scores(gating: Tensor, scoring_func: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each expert's score, and what it is chosen by: without a bias the logit, which is in the same order."""
    logits = clean(gating)
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    return scores, logits if bias is None else clean(scores + bias)


def _group_scores(choice: Tensor, groups: int, bias: Tensor | None) -> Tensor:
    grouped = choice.unflatten(1, (groups, -1))
    return grouped.amax(-1) if bias is None else grouped.topk(2).values.sum(-1)


def _weights(scores: Tensor, ids: Tensor, renormalize: bool, factor: float) -> Tensor:
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * factor


def agree(args: dict, result: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Raises AssertionError unless the ids are those that someone could choose who computes scores in fp32, and the
    weights those of these ids. Without a bias nothing is rounded before the choice: the very ids."""
    args = {"scoring_func": "softmax", "correction_bias": None, "routed_scaling_factor": 1.0} | args
    if shared := args.get("num_fused_shared_experts", 0):
        if not all(torch.equal(got[:, -shared:], expected[:, -shared:].to(got.dtype))
                   for got, expected in zip(result, exact, strict=True)):
            raise AssertionError(f"expected shared experts {exact[1][:, -shared:].tolist()} of weight 1, got "
                                 f"{result[1][:, -shared:].tolist()} of {result[0][:, -shared:].tolist()}")
        result, exact = ((pair[0][:, :-shared], pair[1][:, :-shared]) for pair in (result, exact))
    bias, groups, topk_group = args["correction_bias"], args["num_expert_group"], args["topk_group"]
    weights, ids = result
    if ids.dtype != torch.int32 or ids.shape != exact[1].shape or ((ids < 0) | (ids >= args["gating"].shape[1])).any():
        raise AssertionError(f"expected int32 {list(exact[1].shape)}, ids of experts, got {ids}")
    scores, choice = _scores(args["gating"], args["scoring_func"], bias)
    allowed = (ids == exact[1]).all(-1)
    if bias is not None and not allowed.all():
        off = 8 * torch.finfo(torch.float32).eps * (1 + bias.abs().max())
        where = ids.long()
        chosen = torch.zeros_like(choice, dtype=torch.bool).scatter_(1, where, True)
        in_order = (choice.gather(1, where).diff(dim=-1) <= off).all(-1)
        barred = torch.zeros_like(chosen)
        open_to_all = ~barred
        if topk_group < groups:
            best = _group_scores(choice, groups, bias)
            better = (best.unsqueeze(1) - best.unsqueeze(2) > 2 * off).sum(-1)
            as_good = (best.unsqueeze(1) - best.unsqueeze(2) >= -2 * off).sum(-1)
            per_group = choice.shape[1] // groups
            barred = (better >= topk_group).repeat_interleave(per_group, 1)
            open_to_all = (as_good <= topk_group).repeat_interleave(per_group, 1)
            used = chosen.unflatten(1, (groups, -1)).any(-1).sum(-1)
            in_order &= used <= topk_group
        minimum = choice.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
        missed = open_to_all & ~chosen & (choice > minimum + off)
        allowed |= in_order & (chosen.sum(-1) == ids.shape[1]) & ~(barred & chosen).any(-1) & ~missed.any(-1)
    if not allowed.all():
        raise AssertionError(f"rows {(~allowed).nonzero()[:, 0].tolist()}: expected experts "
                             f"{exact[1][~allowed].tolist()}, got {ids[~allowed].tolist()}")
    expected = _weights(scores, ids.long(), args["renormalize"], args["routed_scaling_factor"])
    bound = 16 * torch.finfo(torch.float32).eps * expected.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    if weights.dtype != torch.float32 or weights.shape != expected.shape or not ((weights - expected).abs()
                                                                                 <= bound).all():
        raise AssertionError(f"expected float32 weights {expected.tolist()}, got {weights.dtype} {weights.tolist()}")


@op(cases=cases, check=check, cost=cost, agree=agree)
def grouped_topk(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
                 scoring_func: str = "softmax", correction_bias: Tensor | None = None,
                 routed_scaling_factor: float = 1.0,
                 num_fused_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    """Choose the top_k experts of each token, best first, from its topk_group best groups of experts. Groups have equal
    sizes; with s = softmax(gating[t]) or sigmoid(gating[t]) the scores are
      s for an expert, the maximum for a group                           (DeepSeek-AI 2024, DeepSeek-V2), or
      s + correction_bias, and the sum of the two largest for a group    (DeepSeek-AI 2024, DeepSeek-V3).
    The weights are s, without the bias, times routed_scaling_factor. Of equal experts or groups the lower index comes
    first. After the chosen experts come the num_fused_shared_experts of every token, with ids from num_experts on and
    weight 1, for models whose weights of shared experts follow those of the others in one tensor.

    Logits and s + correction_bias are clamped to [-2^126, 2^126], and NaN counts as -2^126. A row of NaN without a bias
    gets the first top_k experts, with equal weights for softmax and weights 0 for sigmoid.

    gating           [num_tokens, num_experts]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    top_k            1 to topk_group * num_experts / num_expert_group
    num_expert_group number of groups, a divisor of num_experts; 1: no groups
    topk_group       1 to num_expert_group
    renormalize      divide the weights by their sum + 1e-20, before routed_scaling_factor
    scoring_func     "softmax" or "sigmoid"
    correction_bias  [num_experts]  fp32
    num_fused_shared_experts  0 to num_experts
    returns          weights [num_tokens, top_k + num_fused_shared_experts] fp32, computed in fp32; ids, the same shape,
                     int32
    raises           BadArgument (a ValueError) for other arguments, or a correction_bias with groups of one expert
    """
    scores, choice = _scores(gating, scoring_func, correction_bias)
    if topk_group < num_expert_group:
        best = largest(_group_scores(choice, num_expert_group, correction_bias), topk_group)
        kept = torch.zeros_like(choice[:, :num_expert_group], dtype=torch.bool).scatter_(1, best, True)
        choice = choice.masked_fill(~kept.repeat_interleave(choice.shape[1] // num_expert_group, 1), -torch.inf)
    ids = largest(choice, top_k)
    weights = _weights(scores, ids, renormalize, routed_scaling_factor)
    if num_fused_shared_experts:
        shared = torch.arange(num_fused_shared_experts, device=ids.device) + gating.shape[1]
        ids = torch.cat((ids, shared.expand(len(ids), -1)), 1)
        weights = torch.cat((weights, torch.ones_like(weights[:, :1]).expand(-1, num_fused_shared_experts)), 1)
    return weights, ids.to(torch.int32, memory_format=torch.contiguous_format)
