"""What the sampler asks of the operators."""

from types import SimpleNamespace

import torch

from wave64.serve import sampler
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
