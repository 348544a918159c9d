"""What the sampler asks of the operators."""

import random
from types import SimpleNamespace

import pytest
import torch

from wave64.serve.engine import sampler
from wave64.serve.engine.engine import _bad_params
from wave64.serve.engine.scheduler import Sequence
from wave64.serve.messages import Request, SamplingParams


def test_the_number_a_token_is_drawn_by_is_less_than_one(monkeypatch):
    """In single precision, too, where the largest of Python's random numbers is 1."""
    seen = []
    monkeypatch.setattr(sampler.ops, "sample", lambda *args: seen.append(args[-1]) or torch.zeros(2, dtype=torch.int64))
    draws = [SimpleNamespace(request=Request("a", [5], SamplingParams()), random=SimpleNamespace(random=lambda u=u: u))
             for u in (1 - 2**-53, 0.25)]
    assert sampler._choose(torch.zeros(2, 9), draws) == [0, 0]
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [1 - 2**-24, 0.25]


@pytest.mark.parametrize(("changes", "counts"), [
    ({}, False), ({"repetition_penalty": 0.5}, True), ({"repetition_penalty": 1.5}, True),
    ({"presence_penalty": -1.0}, True), ({"frequency_penalty": -1.0}, True),
])  # fmt: skip
def test_rewards_are_penalties_too(changes, counts):
    request = Request("a", [5], SamplingParams(**changes))
    assert Sequence(request, frozenset(), random.Random(0)).penalised == counts


@pytest.mark.parametrize(("name", "value"), [
    ("min_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")),
    ("frequency_penalty", float("nan")), ("presence_penalty", float("inf")), ("top_p", 0.0), ("min_new_tokens", -1),
])  # fmt: skip
def test_a_parameter_out_of_range_is_named(name, value):
    assert _bad_params(SamplingParams(**{name: value}), 9).startswith(f"{name}: expected ")
    assert _bad_params(SamplingParams(), 9) is None


def test_each_penalty_is_its_own():
    """Presence counts a token of the output once, frequency each time, repetition those of the prompt, too."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    seq = Sequence(Request("a", [0], params), frozenset(), random.Random(0))
    seq.tokens += [1, 1, 1, 2]
    logits = torch.full((1, 5), 8.0)
    sampler._penalise(logits, [seq])
    assert logits.tolist() == [[4.0, 4 - 0.5 - 3 * 0.25, 4 - 0.5 - 0.25, 8.0, 8.0]]


def test_top_k_counts_up_to_the_whole_vocabulary(monkeypatch):
    seen = []
    monkeypatch.setattr(sampler.ops, "sample", lambda *args: seen.append(args[2]) or torch.zeros(5, dtype=torch.int64))
    seqs = [Sequence(Request("a", [5], SamplingParams(top_k=k)), frozenset(), random.Random(0))
            for k in (-1, 0, 1, 8, 9)]  # fmt: skip
    sampler._choose(torch.zeros(5, 9), seqs)
    assert seen[0].tolist() == [0, 0, 1, 8, 0]
