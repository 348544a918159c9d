"""`sample` against the definition of what is kept, written here a second time over Python's numbers, and against the
filters of transformers. The middle of a token's interval of the running sum must draw that token, in every backend."""

import math

import pytest
import torch
from helpers import CPU_BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from wave64 import ops

quick = examples(12)


def draw(backend, device, logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Ids drawn from one row of logits, one for each number of `uniform`."""
    rows = len(uniform)

    def each(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype, device=device)

    logits = torch.as_tensor(logits, dtype=torch.float32, device=device).expand(rows, -1).contiguous()
    uniform = torch.tensor(uniform, dtype=torch.float32, device=device)
    return ops.sample.backends[backend].run(logits, each(temperature), each(top_k, torch.int32), each(top_p),
                                            each(min_p), uniform).tolist()


def kept(logits, temperature, top_k, top_p, min_p):
    """{id: probability} by the definition: ties at a threshold stay."""
    best = max(logits)
    weight = {i: math.exp((x - best) / temperature) for i, x in enumerate(logits) if x > -math.inf}
    if 0 < top_k < len(weight):
        smallest = sorted((logits[i] for i in weight), reverse=True)[top_k - 1]
        weight = {i: w for i, w in weight.items() if logits[i] >= smallest}
    if top_p < 1:
        total = sum(weight.values())
        before = {x: sum(w for i, w in weight.items() if logits[i] > x) for x in {logits[i] for i in weight}}
        weight = {i: w for i, w in weight.items() if before[logits[i]] < top_p * total or logits[i] == best}
    weight = {i: w for i, w in weight.items() if w >= min(min_p, 1.0)}
    total = sum(weight.values())
    return {i: w / total for i, w in weight.items()}


def middles(probability):
    """(id, middle of its interval) of those wide enough for fp32 to tell apart."""
    found, before = [], 0.0
    for i in sorted(probability):
        if probability[i] > 1e-5:
            found.append((i, before + probability[i] / 2))
        before += probability[i]
    return found


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@quick
@given(data=st.data())
def test_draws_what_the_definition_keeps(backend, device, data):
    """Logits are few small integers, so there are ties; thresholds lie between the sums they can have."""
    logits = data.draw(st.lists(st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 1.0, 2.0, 5.0]), min_size=1, max_size=40))
    logits[data.draw(st.integers(0, len(logits) - 1))] = 2.0
    settings = dict(temperature=data.draw(st.sampled_from([0.5, 1.0, 3.0])),
                    top_k=data.draw(st.integers(-1, len(logits) + 2)),
                    top_p=data.draw(st.sampled_from([0.0, 0.2718281, 0.6180339, 0.9142135, 1.0])),
                    min_p=data.draw(st.sampled_from([0.0, 0.0123, 0.3, 1.0])))
    expected = middles(kept(logits, **settings))
    assert draw(backend, device, logits, [u for _, u in expected], **settings) == [i for i, _ in expected]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@quick
@given(seed=st.integers(0, 2**31), vocab=st.integers(2, 700), temperature=st.floats(0.3, 2.0),
       top_k=st.integers(1, 60), top_p=st.floats(0.2, 0.98), min_p=st.floats(0.001, 0.3))
def test_keeps_what_transformers_keeps(backend, device, seed, vocab, temperature, top_k, top_p, min_p):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
    scores = logits.double()[None]
    for warp in (hf.TemperatureLogitsWarper(temperature), hf.TopKLogitsWarper(top_k), hf.TopPLogitsWarper(top_p),
                 hf.MinPLogitsWarper(min_p)):
        scores = warp(None, scores)
    probability = dict(enumerate(scores.softmax(-1)[0].tolist()))
    expected = middles({i: p for i, p in probability.items() if p > 0})
    got = draw(backend, device, logits, [u for _, u in expected], temperature, top_k, top_p, min_p)
    assert got == [i for i, _ in expected]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_frequencies_are_the_probabilities(backend, device):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.3, -math.inf, 1.1])
    rows = 60
    ids = draw(backend, device, logits, [(i + 0.5) / rows for i in range(rows)], temperature=1.3)
    counts = torch.tensor(ids).bincount(minlength=6) / rows
    torch.testing.assert_close(counts, (logits / 1.3).softmax(-1), atol=1 / rows, rtol=0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ends_of_uniform_draw_the_ends_of_what_is_kept(backend, device):
    logits = [1.0, 4.0, 4.5, -9.0, 4.2, 0.0]
    last = 1.0 - 2.0**-24
    assert draw(backend, device, logits, [0.0, last], top_k=3) == [1, 4]
    assert draw(backend, device, logits, [0.0, last]) == [0, 5]
    assert draw(backend, device, logits, [0.0, last], top_p=0.0) == [2, 2]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("temperature", [1e36, 1e37, 1e38, math.inf])
def test_masked_tokens_stay_masked_at_any_temperature(backend, device, temperature):
    logits = [-math.inf] * 4096 + [0.0]
    assert draw(backend, device, logits, [0.0, 0.1, 0.999], temperature) == [4096] * 3
    allowed = [5, 77, 4096]
    logits[5] = logits[77] = 1.0
    for filters in (dict(), dict(top_p=0.999), dict(top_k=3), dict(min_p=0.5)):
        assert draw(backend, device, logits, [0.1, 0.5, 0.9], temperature, **filters) == allowed, filters


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_uniform_rounded_to_one_draws_the_last_one_kept(backend, device):
    logits = [1.0, 4.0, 4.5, -9.0, 4.2, 0.0, -math.inf]
    for filters, last in ((dict(), 5), (dict(top_k=3), 4), (dict(top_p=0.0), 2), (dict(min_p=0.7), 4)):
        assert draw(backend, device, logits, [1.0], **filters) == [last]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_greedy_takes_the_first_of_equals(backend, device):
    logits = [0.0] * 5000
    for i in (4097, 4500, 17):
        logits[i] = 3.0
        assert draw(backend, device, logits, [0.9], temperature=0.0) == [i if i != 4500 else 4097]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_logits_lead_out_of_range(backend, device, temperature):
    nan, inf = math.nan, math.inf
    for row, allowed in [([nan] * 5, {0}), ([-inf] * 5, {0}), ([nan, 1.0, nan, -inf, nan], {1}), ([inf, 0.0, nan], {0}),
                         ([0.0, inf, inf], {1, 2}), ([-inf, nan, -3e38, 1.0], {3}), ([3e38, -3e38, 0.0], {0})]:
        for filters in (dict(), dict(top_k=2, top_p=0.5), dict(min_p=0.5)):
            got = draw(backend, device, row, [0.0, 0.5, 0.99], temperature, **filters)
            assert set(got) <= allowed, (row, filters, got)


@pytest.mark.parametrize(("argument", "wrong"), [
    ("logits", torch.zeros(4)), ("logits", torch.zeros(4, 0)), ("top_k", torch.zeros(4, dtype=torch.int64)),
    ("temperature", torch.zeros(3)), ("top_p", torch.zeros(4, dtype=torch.float16)), ("min_p", torch.zeros(8)[::2]),
    ("uniform", torch.zeros(4, 1))])
def test_refuses_by_name(argument, wrong):
    args = {name: torch.zeros(4) for name in ("temperature", "top_p", "min_p", "uniform")}
    args |= {"logits": torch.zeros(4, 10), "top_k": torch.zeros(4, dtype=torch.int32), argument: wrong}
    with refused("sample", argument):
        ops.sample(**args)


def test_agree_refuses_what_fp32_could_not_have_drawn():
    """The contract test's judge: a neighbor of the right id is wrong, and so is an id that is not kept."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -4.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    args = dict(logits=logits, temperature=one, top_k=torch.tensor([2], dtype=torch.int32), top_p=one, min_p=one * 0,
                uniform=one * 0.1)
    exact = ops.sample.reference(**args)
    assert exact.tolist() == [1]
    ops.sample.agree(args, exact, exact)
    for wrong in (0, 2, 3):
        with pytest.raises(AssertionError, match="expected"):
            ops.sample.agree(args, torch.tensor([wrong]), exact)
