"""Awkward traffic through the whole engine: with steps that overlap, prefixes reused and too few pages, each request is
answered what it is answered alone, everything switched off."""

import random
from pathlib import Path

import pytest
from helpers_parallel import collect
from helpers_server import VOCAB, make_model

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Request, SamplingParams, Vocabulary

CONTEXT = 96
CALM = dict(disable_radix_cache=True, chunked_prefill_size=-1, max_running_requests=1)
#: A pool of one context and two pages: who is as long as the context fits just alone.
CROWDED = [dict(max_total_tokens=CONTEXT + 8, chunked_prefill_size=7, max_running_requests=5, schedule_policy="lpm"),
           dict(max_total_tokens=CONTEXT, chunked_prefill_size=33, max_running_requests=9, hicache_ratio=3.0,
                enable_hierarchical_cache=True)]  # fmt: skip
KINDS = [
    dict(temperature=0), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01),
    dict(temperature=0, repetition_penalty=1.3, presence_penalty=0.4), dict(frequency_penalty=0.9),
    dict(min_new_tokens=9, stop_token_ids=[*range(0, VOCAB, 3)]), dict(stop_token_ids=[*range(0, VOCAB, 40)]),
    dict(logit_bias={5: 4.0, 9: -50.0}), dict(max_new_tokens=0), dict(max_new_tokens=1),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def engine(folder: Path, overlap: bool, flags: dict) -> Engine:
    given = dict(model_path=str(folder), device="cpu", dtype="float32", context_length=CONTEXT, page_size=4,
                 max_total_tokens=2 * CONTEXT)
    made = Engine(ServerArgs(**given | flags), overlap=overlap)
    made.grammars.learn(Vocabulary(Tokenizer(folder).definition, [1]))
    return made


def requests(drawn: random.Random) -> list[tuple[int, Request]]:
    """(step, request): several at once with the same prompt, turns of chats, one that fills the context."""
    texts = [[drawn.randrange(3, VOCAB) for _ in range(40)] for _ in range(3)]
    asked = []
    for i in range(26):
        prompt = texts[drawn.randrange(3)][: drawn.choice([1, 3, 4, 8, 9, 16, 23, 40])]
        prompt = prompt + [drawn.randrange(3, VOCAB) for _ in range(drawn.choice([0, 0, 1, 5]))]
        kind = dict(max_new_tokens=drawn.randrange(12, 40), seed=i, ignore_eos=drawn.random() < 0.8)
        kind |= drawn.choice(KINDS)
        if i == 2:
            kind = dict(temperature=0, ignore_eos=True, max_new_tokens=CONTEXT - len(prompt))
        grammar = f"start: /[a-f]{{{drawn.randrange(1, 9)}}}[0-9]+/" if i % 7 == 3 else None
        asked.append((drawn.randrange(6), Request(
            f"{i}", prompt, SamplingParams(**kind), top_logprobs=drawn.choice([-1, 0, 3]),
            prompt_logprobs=drawn.random() < 0.3, grammar=grammar)))  # fmt: skip
    return sorted(asked, key=lambda each: each[0])


@pytest.fixture(scope="module")
def alone(folder):
    """Of a seed: the requests, and what each is answered by an engine that does nothing else."""
    calm, known = engine(folder, False, CALM), {}

    def answers(seed: int):
        if seed not in known:
            asked = requests(random.Random(seed))
            known[seed] = asked, {each.rid: collect(calm, each)[each.rid] for _, each in asked}
        return known[seed]

    return answers


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "flags"), [
    (1, CROWDED[1]), *(pytest.param(seed, flags, marks=pytest.mark.long) for seed in (2, 3) for flags in CROWDED)])
def test_every_answer_is_the_one_alone(folder, alone, seed, flags):
    """Some are aborted after any step, as the api process does where it finds a stop string late."""
    asked, expected = alone(seed)
    made, drawn = engine(folder, True, flags), random.Random(seed)
    ends = {rid: drawn.randrange(40) for rid in map(str, drawn.sample(range(26), 5))}
    got: dict[str, list] = {each.rid: [] for _, each in asked}
    step, waiting = 0, list(asked)
    while waiting or made.has_work:
        while waiting and waiting[0][0] <= step:
            made.add(waiting.pop(0)[1])
        for output in made.step():
            assert output.rid not in ends or ends[output.rid] >= step
            got[output.rid].append(output)
        for rid in [rid for rid, when in ends.items() if when == step]:
            made.abort(rid)
        step += 1
        assert step < 3000
    for _, each in asked:
        want, answers = expected[each.rid], got[each.rid]
        tokens = [token for output in answers for token in output.token_ids]
        if each.rid in ends and not (answers and answers[-1].finish_reason):
            assert tokens == want.token_ids[: len(tokens)]
            continue
        last = answers[-1]
        assert (tokens, last.finish_reason, last.matched_stop, last.error) == (
            want.token_ids, want.finish_reason, want.matched_stop, want.error)  # fmt: skip
        logprobs = [entry for output in answers for entry in output.logprobs or []]
        scored = [entry for output in answers for entry in output.prompt_logprobs or []]
        for ours, theirs in ((logprobs, want.logprobs), (scored, want.prompt_logprobs or [])):
            assert [one and one.id for one in ours] == [one and one.id for one in theirs]
            assert all(one is None or one.logprob == pytest.approx(other.logprob, abs=1e-4)
                       for one, other in zip(ours, theirs, strict=True))  # fmt: skip
    assert made.statistics().preemptions > 0
    assert made.statistics().cached_tokens > 0
    assert made.scheduler.cache.num_available == made.pool.num_pages
    assert made.flush()
