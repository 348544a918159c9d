"""What the sampler asks of the operators."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from wave64.serve.engine import sampler
from wave64.serve.engine.crossing import Crossing
from wave64.serve.engine.grammar import Grammar
from wave64.serve.engine.history import History
from wave64.serve.engine.schedule import Penalties, Sampling
from wave64.serve.engine.scheduler import Sequence
from wave64.serve.messages import BadRequest, Request, SamplingParams, check_params

HOT = Sampling(rows=[3, 1], logit_rows=[0, 1], temperature=[1.0, 1.0], top_k=[0, 0], top_p=[1.0, 1.0],
               min_p=[0.0, 0.0], uniform=[0.5, 0.5], top_logprobs=[-1, -1])  # fmt: skip


cross = Crossing(torch.device("cpu"))


def there(sampling: Sampling, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of the device for a step with these logits."""
    return cross(sampler._arrays(sampling, *logits.shape))


def test_the_number_a_token_is_drawn_by_is_less_than_one(monkeypatch):
    """In single precision, too, where the largest of Python's random numbers is 1."""
    seen = []
    monkeypatch.setattr(sampler.ops, "sample", lambda *args: seen.append(args[-1]) or torch.zeros(2, dtype=torch.int64))
    sampler._choose(logits := torch.zeros(2, 9), there(replace(HOT, uniform=[1 - 2**-53, 0.25]), logits))
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [1 - 2**-24, 0.25]


def test_a_bitmask_leaves_what_it_allows(monkeypatch):
    """Logprobs are of the logits before it; the tokens are noted at their rows."""
    logits = torch.linspace(0, 4, 2 * 40).view(2, 40)
    raw = torch.log_softmax(logits, dim=-1)
    words = [[1 << 7, 0], [0, 1 << 2]]  # token 7, and token 34
    monkeypatch.setattr(sampler, "bitmask", lambda sampling, vocab: np.array(words, dtype=np.int32))
    last = torch.zeros(4, dtype=torch.int64)
    for temperature in (0.0, 5.0):
        asked = replace(HOT, temperature=[temperature] * 2, top_logprobs=[-1, 0], grammars=[(0, Grammar(None))])
        got = sampler.sample(logits.clone(), asked, last, History(4, logits.device), cross).wait()
        assert got.ids == [7, 34]
        assert got.logprobs[0] is None
        assert got.logprobs[1].logprob == pytest.approx(float(raw[1, 34]))
        assert last.tolist() == [0, 34, 0, 7]


@pytest.mark.parametrize(("changes", "counts"), [
    ({}, False), ({"repetition_penalty": 0.5}, True), ({"repetition_penalty": 1.5}, True),
    ({"presence_penalty": -1.0}, True), ({"frequency_penalty": -1.0}, True),
])  # fmt: skip
def test_rewards_are_penalties_too(changes, counts):
    request = Request("a", [5], SamplingParams(**changes))
    assert Sequence(request, frozenset(), random.Random(0)).penalized == counts


@pytest.mark.parametrize(("name", "value"), [
    ("min_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")),
    ("frequency_penalty", float("nan")), ("presence_penalty", float("inf")), ("top_p", 0.0), ("min_new_tokens", -1),
    ("top_k", 1.5), ("temperature", -1.0), ("max_new_tokens", -1),
])  # fmt: skip
def test_a_parameter_out_of_range_is_named(name, value):
    with pytest.raises(BadRequest, match=f"^{name}: expected ") as refusal:
        check_params(SamplingParams(**{name: value}))
    assert refusal.value.param == name
    check_params(SamplingParams())


def test_each_penalty_is_its_own():
    """Presence counts a token of the output once, frequency each time, repetition those of the prompt, too."""
    logits = torch.full((2, 5), 8.0)
    asked = replace(HOT, penalties=[Penalties(1, 0.5, 0.25, 2.0, 1, 4, [0, 1, 1, 1, 2])])
    sampler._penalize(logits, asked, there(asked, logits), History(4, logits.device))
    assert logits.tolist() == [[8.0] * 5, [4.0, 4 - 0.5 - 3 * 0.25, 4 - 0.5 - 0.25, 8.0, 8.0]]


def test_top_k_counts_up_to_the_whole_vocabulary(monkeypatch):
    seen = []
    monkeypatch.setattr(sampler.ops, "sample", lambda *args: seen.append(args[2]) or torch.zeros(5, dtype=torch.int64))
    five = {name: getattr(HOT, name)[:1] * 5 for name in ("rows", "temperature", "top_p", "min_p", "uniform")}
    asked = replace(HOT, **five, logit_rows=[*range(5)], top_logprobs=[-1] * 5, top_k=[-1, 0, 1, 8, 9])
    sampler._choose(logits := torch.zeros(5, 9), there(asked, logits))
    assert seen[0].tolist() == [0, 0, 1, 8, 0]


def test_greedy_is_the_same_by_the_operator_and_by_a_maximum():
    """With ties, of which the lowest index counts, and masked tokens."""
    logits = torch.randint(9, (6, 400), generator=torch.Generator().manual_seed(1)).float()
    logits[:, :7] = -torch.inf
    greedy = replace(HOT, temperature=[0.0] * 2)
    assert torch.equal(sampler._greedy(logits), sampler._choose(logits, there(greedy, logits)))
    assert torch.equal(sampler._greedy(logits), logits.max(dim=-1).indices)


def test_what_the_device_has_chosen_counts_in_the_next_step():
    """Without being sent again: row 3 gets a newcomer, row 1 goes on; row 3 is then another's."""
    history, last = History(4, torch.device("cpu")), torch.zeros(4, dtype=torch.int64)

    def step(*penalties: Penalties) -> list[int]:
        asked = replace(HOT, temperature=[0.0, 0.0], penalties=list(penalties))
        return sampler.sample(torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(2, 1), asked, last, history, cross).wait().ids

    def penalty(index: int, num_output: int, ids: list[int] | None = None) -> Penalties:
        return Penalties(index, 1.5, 0.0, 1.0, 1, num_output, ids)

    assert step(penalty(0, 0, [0]), penalty(1, 0, [1])) == [0, 0]
    assert step(penalty(0, 1), penalty(1, 1)) == [1, 1]
    assert step(penalty(0, 1, [0, 1]), penalty(1, 2)) == [0, 0], "1.5, 0.5, 1 and 0 are left of the logits"
    assert step(penalty(0, 2), penalty(1, 3)) == [0, 0]
    assert history.of(torch.tensor([3, 1]), 1, 4)[1].tolist() == [[1, 0, 0, -1], [0, 1, 0, 0]]
    step(penalty(0, 0, [2]), penalty(1, 4))
    assert history.of(torch.tensor([3]), 1, 4)[1].tolist() == [[0, -1, -1, -1]], "nothing is left of the longer one"
