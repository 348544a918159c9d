"""What the sampler asks of the operators."""

import random
from types import SimpleNamespace

import pytest
import torch

from wave64.serve import sampler
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.scheduler import Sequence


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
