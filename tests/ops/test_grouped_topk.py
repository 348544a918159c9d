"""`grouped_topk` against the definition, written over Python's numbers, and against transformers' DeepSeek gates."""

import math

import numpy as np
import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from wave64 import ops

quick = examples(12)


def gate(backend, device, gating, *args, bias=None, **kwargs):
    bias = None if bias is None else bias.to(device)
    weights, ids = ops.grouped_topk.backends[backend].run(gating.to(device), *args, correction_bias=bias, **kwargs)
    return weights.cpu(), ids.cpu()


def by_definition(row, top_k, groups, topk_group, renormalize, scoring, bias, factor):
    """[(weight, id)] of one row of finite logits."""
    total = sum(math.exp(x - max(row)) for x in row)
    scores = [math.exp(x - max(row)) / total if scoring == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
    choice = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(row) // groups

    def worth(group):
        ordered = sorted(choice[group * size:(group + 1) * size], reverse=True)
        return ordered[0] if bias is None else sum(ordered[:2])

    kept = sorted(range(groups), key=lambda g: (-worth(g), g))[:topk_group]
    allowed = [i for i in range(len(row)) if i // size in kept]
    chosen = sorted(allowed, key=lambda i: (-choice[i], i))[:top_k]
    divisor = sum(scores[i] for i in chosen) + 1e-20 if renormalize else 1.0
    return [(scores[i] / divisor * factor, i) for i in chosen]


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(data=st.data(), groups=st.integers(1, 9), size=st.integers(2, 21), renormalize=st.booleans(),
       scoring=st.sampled_from(["softmax", "sigmoid"]), with_bias=st.booleans(),
       dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_equals_the_definition(backend, device, data, groups, size, renormalize, scoring, with_bias, dtype):
    """Logits are few different numbers and biases multiples of 1/4, so that there are ties of experts and of groups;
    what differs does so by more than rounding."""
    experts = groups * size
    logits = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])
    gating = torch.tensor(data.draw(st.lists(logits, min_size=2 * experts, max_size=2 * experts))).view(2, experts)
    bias = None
    if with_bias:
        quarters = st.lists(st.integers(-3, 3), min_size=experts, max_size=experts)
        bias = torch.tensor(data.draw(quarters)).float() / 4
    topk_group = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, topk_group * size))
    weights, ids = gate(backend, device, gating.to(dtype), top_k, groups, topk_group, renormalize, bias=bias,
                        scoring_func=scoring, routed_scaling_factor=1.75)
    biases = None if bias is None else bias.tolist()
    expected = [by_definition(row, top_k, groups, topk_group, renormalize, scoring, biases, 1.75)
                for row in gating.double().tolist()]
    assert ids.tolist() == [[i for _, i in row] for row in expected]
    np.testing.assert_allclose(weights.numpy(), [[w for w, _ in row] for row in expected], rtol=1e-5, atol=1e-9)


def sorted_by_id(weights, ids):
    order = ids.argsort(-1)
    return weights.gather(1, order), ids.gather(1, order).long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_equals_the_gate_of_deepseek_v2(backend, device, method):
    config = DeepseekV2Config(hidden_size=32, num_experts_per_tok=6, routed_scaling_factor=16.0, topk_method=method,
                              n_group=8, topk_group=3, n_routed_experts=160,
                              num_experts=160)  # pyright: ignore[reportCallIssue]  # of some versions
    router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.2)
    logits, *expected = router(torch.randn(9, 32))
    groups = (8, 3) if method == "group_limited_greedy" else (1, 1)
    got = gate(backend, device, logits.detach(), 6, *groups, False, routed_scaling_factor=16.0)
    for mine, theirs in zip(sorted_by_id(*got), sorted_by_id(*expected), strict=True):
        torch.testing.assert_close(mine, theirs.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "groups", "topk_group"), [(256, 8, 4), (384, 1, 1), (72, 6, 2)])
def test_equals_the_gate_of_deepseek_v3(backend, device, renormalize, experts, groups, topk_group):
    config = DeepseekV3Config(hidden_size=32, num_experts_per_tok=8, routed_scaling_factor=2.5, n_group=groups,
                              topk_group=topk_group, n_routed_experts=experts, norm_topk_prob=renormalize)
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.2)
    router.e_score_correction_bias.normal_(0, 0.1)
    logits, *expected = router(torch.randn(9, 32))
    got = gate(backend, device, logits.detach(), 8, groups, topk_group, renormalize, scoring_func="sigmoid",
               bias=router.e_score_correction_bias, routed_scaling_factor=2.5)
    for mine, theirs in zip(sorted_by_id(*got), sorted_by_id(*expected), strict=True):
        torch.testing.assert_close(mine, theirs.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [None, torch.zeros(36)], ids=["plain", "bias"])
def test_no_logits_lead_out_of_range(backend, device, scoring, bias):
    """Any bits at all are logits of some row; one of NaN gets the first experts."""
    rows = torch.randint(-2**31, 2**31, (6, 36), dtype=torch.int64).to(torch.int32)
    rows[1] |= 0x7F800000  # NaN and infinities
    rows[2] = -1
    weights, ids = gate(backend, device, rows.view(torch.float32), 8, 4, 2, True, bias=bias, scoring_func=scoring)
    assert ((ids >= 0) & (ids < 36)).all()
    assert all(len(set(row)) == 8 and len({i // 9 for i in row}) <= 2 for row in ids.tolist())
    assert weights.isfinite().all()
    assert ids[2].tolist() == list(range(8))
    torch.testing.assert_close(weights[2], torch.full((8,), 1 / 8 if scoring == "softmax" else 0.0))


def test_groups_that_the_kernel_cannot_rank_are_the_reference_s():
    supports = ops.grouped_topk.backends["triton"].supports
    gating = torch.zeros(1, 256)
    assert supports(gating, 2, 64, 5, True) is None
    assert supports(gating, 2, 128, 128, True) is None
    assert supports(gating, 2, 128, 5, True) == "128 groups, the kernel ranks at most 64"


@pytest.mark.parametrize(("changes", "argument", "words"), [
    (dict(gating=torch.zeros(12)), "gating", "[num_tokens, num_experts]"),
    (dict(gating=torch.zeros(3, 12, dtype=torch.float64)), "gating", "bf16, fp16 or fp32"),
    (dict(top_k=13, topk_group=4), "top_k", "1 to 12"), (dict(top_k=7), "top_k", "at most 6, the experts of 2 groups"),
    (dict(num_expert_group=5), "num_expert_group", "a divisor of 12"),
    (dict(num_expert_group=0), "num_expert_group", "a divisor of 12"),
    (dict(topk_group=5), "topk_group", "1 to 4"), (dict(topk_group=0), "topk_group", "1 to 4"),
    (dict(num_fused_shared_experts=2**31 - 1), "num_fused_shared_experts", "0 to 12"),
    (dict(scoring_func="relu"), "scoring_func", "'softmax' or 'sigmoid', got 'relu'"),
    (dict(correction_bias=torch.zeros(11)), "correction_bias", "float32 [12]"),
    (dict(correction_bias=torch.zeros(12).half()), "correction_bias", "float32 [12]"),
    (dict(correction_bias=torch.zeros(24)[::2]), "correction_bias", "contiguous"),
    (dict(correction_bias=torch.zeros(12, device="meta")), "correction_bias", "where gating is"),
    (dict(num_expert_group=12, correction_bias=torch.zeros(12), top_k=2), "num_expert_group", "at most 6")])
def test_refuses_by_name(changes, argument, words):
    args = dict(gating=torch.zeros(3, 12), top_k=3, num_expert_group=4, topk_group=2, renormalize=True) | changes
    with refused("grouped_topk", argument, words):
        ops.grouped_topk(**args)


def test_agree_refuses_what_fp32_could_not_have_chosen():
    """The contract test's judge: neighbors within rounding may be exchanged, no others."""
    bias = torch.tensor([0.0, 1e-9, 0.0, 0.5, 0.25, -0.5], dtype=torch.float64)
    args = dict(gating=torch.zeros(1, 6, dtype=torch.float64), top_k=2, num_expert_group=3, topk_group=2,
                renormalize=False, scoring_func="sigmoid", correction_bias=bias)
    exact = ops.grouped_topk.reference(**args)
    assert exact[1].tolist() == [[3, 1]]
    halves = torch.full((1, 2), 0.5)

    def judge(*ids, weights=halves):
        ops.grouped_topk.agree(args, (weights, torch.tensor([ids], dtype=torch.int32)), exact)

    judge(3, 1)
    judge(3, 0)
    for wrong in [(1, 3), (3, 3), (3, 4), (1, 0), (3, 5), (3, 6), (-1, 3)]:
        with pytest.raises(AssertionError, match="expected"):
            judge(*wrong)
    with pytest.raises(AssertionError, match="expected float32 weights"):
        judge(3, 1, weights=halves * (1 + 1e-5))
