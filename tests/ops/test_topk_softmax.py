"""`topk_softmax` against the definition, written over Python's numbers, and against Mixtral's router."""

import math

import numpy as np
import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from wave64 import ops

quick = examples(12)


def gate(backend, device, gating, top_k, renormalize=True):
    weights, ids = ops.topk_softmax.backends[backend].run(gating.to(device), top_k, renormalize)
    return weights.cpu(), ids.cpu()


def by_definition(row, top_k, renormalize):
    """[(weight, id)] of one row: what is no number, or none within 2^126, counts as a number there."""
    limit = 2.0**126
    row = [-limit if math.isnan(x) else min(max(x, -limit), limit) for x in row]
    powers = [math.exp(x - max(row)) for x in row]
    chosen = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    total = sum(powers[i] for i in chosen) if renormalize else sum(powers)
    return [(powers[i] / total, i) for i in chosen]


numbers = st.sampled_from([math.nan, -math.inf, math.inf, -0.0, 0.0, -3.0, 1.0, 1.5, 2.0, 65000.0, 2.0**126, 3e38])


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(data=st.data(), experts=st.integers(1, 70), rows=st.integers(1, 5), renormalize=st.booleans(),
       dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_equals_the_definition(backend, device, data, experts, rows, renormalize, dtype):
    """Of few different numbers, so that there are ties."""
    drawn = [data.draw(st.lists(numbers, min_size=experts, max_size=experts)) for _ in range(rows)]
    gating = torch.tensor(drawn).to(dtype)
    top_k = data.draw(st.integers(1, experts))
    weights, ids = gate(backend, device, gating, top_k, renormalize)
    expected = [by_definition(row, top_k, renormalize) for row in gating.double().tolist()]
    assert ids.tolist() == [[i for _, i in row] for row in expected]
    np.testing.assert_allclose(weights.numpy(), [[w for w, _ in row] for row in expected], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", [8, 60, 72, 160, 384, 512])
def test_random_rows_of_any_number_of_experts(backend, device, experts):
    gating = torch.randn(3, experts) * 4
    weights, ids = gate(backend, device, gating, 7)
    expected = [by_definition(row, 7, True) for row in gating.double().tolist()]
    assert ids.tolist() == [[i for _, i in row] for row in expected]
    np.testing.assert_allclose(weights.numpy(), [[w for w, _ in row] for row in expected], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_router_of_mixtral(backend, device):
    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2))
    torch.nn.init.normal_(router.weight)
    logits, expected, expected_ids = router(torch.randn(33, 16))
    weights, ids = gate(backend, device, logits.detach(), 2)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_logits_lead_out_of_range(backend, device):
    """Any bits at all are logits of some row."""
    rows = torch.randint(-2**31, 2**31, (6, 37), dtype=torch.int64).to(torch.int32)
    rows[1] |= 0x7F800000  # NaN and infinities
    rows[2] = -1
    gating = rows.view(torch.float32)
    weights, ids = gate(backend, device, gating, 37)
    assert torch.equal(ids.sort().values, torch.arange(37, dtype=torch.int32).expand(6, -1))
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(6))
    assert ids[2].tolist() == list(range(37))
    torch.testing.assert_close(weights[2], torch.full((37,), 1 / 37))


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("gating", torch.zeros(8), "[num_tokens, num_experts]"), ("gating", torch.zeros(3, 0), "an expert"),
    ("gating", torch.zeros(3, 16)[:, ::2], "contiguous last dimension"),
    ("gating", torch.zeros(3, 8, dtype=torch.float64), "bf16, fp16 or fp32"),
    ("top_k", 0, "1 to 8"), ("top_k", 9, "1 to 8")])
def test_refuses_by_name(argument, wrong, words):
    args = dict(gating=torch.zeros(3, 8), top_k=2, renormalize=True) | {argument: wrong}
    with refused("topk_softmax", argument, words):
        ops.topk_softmax(**args)
