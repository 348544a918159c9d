"""The two loops of the engine: a step scheduled and started before the one in front of it is committed, or after. Here
on a CPU, where a step has ended when it is started: what differs is what the scheduler knows."""

import random
from functools import partial
from pathlib import Path

import pytest
from helpers_deepseek import make_deepseek
from helpers_llama import make_llama
from helpers_parallel import collect

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.schedule import LAST_SAMPLED
from wave64.serve.messages import Request, SamplingParams

VOCAB = 100
KINDS = [
    dict(temperature=0), dict(seed=11), dict(temperature=0.7, top_p=0.8, seed=12),
    dict(temperature=1.5, top_k=5, min_p=0.1, seed=13), dict(temperature=0, repetition_penalty=1.5),
    dict(presence_penalty=0.5, frequency_penalty=0.7, seed=14),
    dict(min_new_tokens=15, seed=15, stop_token_ids=[*range(60)]),
    dict(stop_token_ids=[*range(20)], seed=16), dict(max_new_tokens=0), dict(max_new_tokens=1, temperature=0),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_llama(made, vocab_size=VOCAB)
    return made


def engine(folder: Path, device: str, overlap: bool, **flags) -> Engine:
    given = dict(model_path=str(folder), device=device, dtype="float32", max_total_tokens=512, page_size=4)
    return Engine(ServerArgs(**given | flags), overlap=overlap)


def requests() -> list[Request]:
    """One of each kind, some that begin alike, all with some logprobs."""
    asked = []
    for i, kind in enumerate(KINDS):
        prompt = [(3 * i * (i % 3) + j * j) % VOCAB for j in range(1 + 3 * i)]
        params = SamplingParams(**dict(max_new_tokens=24, ignore_eos=True) | kind)
        asked.append(Request(f"{i}", prompt, params, top_logprobs=i % 4 - 1, prompt_logprobs=i % 3 == 0))
    return asked


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for rid, one in theirs.items():
        other = ours[rid]
        assert (other.token_ids, other.finish_reason, other.matched_stop) == (
            one.token_ids, one.finish_reason, one.matched_stop)  # fmt: skip
        for got, want in zip(other.logprobs + (other.prompt_logprobs or []),
                             one.logprobs + (one.prompt_logprobs or []), strict=True):  # fmt: skip
            assert (got is None) == (want is None)
            assert got is None or (got.id, got.logprob) == (want.id, pytest.approx(want.logprob, abs=1e-4))


FEW = dict(max_total_tokens=72, chunked_prefill_size=7)


@pytest.mark.parametrize(("name", "flags"), [
    ("llama", {}), ("llama", FEW), ("llama", dict(max_running_requests=3)), ("deepseek", FEW)])
def test_both_loops_say_the_same(folder, tmp_path, device, name, flags):
    """Drawn, penalized, stopped, scored and preempted, with pages of others and without."""
    if name == "deepseek":
        make_deepseek(folder := tmp_path, 3, vocab_size=VOCAB)
    whole, late = engine(folder, device, False), engine(folder, device, True, **flags)
    same(collect(late, *requests()), collect(whole, *requests()))
    assert (late.statistics().preemptions > 0) == ("max_total_tokens" in flags)
    assert not flags or late.statistics().cached_tokens > 0


def test_the_next_step_is_started_before_the_tokens_are_waited_for(folder, device, monkeypatch):
    for overlap in (False, True):
        made, log = engine(folder, device, overlap), []
        forward, sample = made.runner.forward, made.runner.sample

        def started(*steps, forward=forward, log=log, **early):
            log.append(f"start {LAST_SAMPLED in steps[0].tokens}")
            return forward(*steps, **early)

        def sampled(*given, sample=sample, log=log):
            log.append("sample")
            chosen = sample(*given)
            for each in chosen:
                monkeypatch.setattr(each, "wait", lambda wait=each.wait: (log.append("wait"), wait())[1])
            return chosen

        monkeypatch.setattr(made.runner, "forward", started)
        monkeypatch.setattr(made.runner, "sample", sampled)
        collect(made, Request("a", [1, 2], SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)))
        if overlap:
            assert log == ["start False", "sample", *["start True", "wait", "sample"] * 2, "wait"]
        else:
            assert log == ["start False", "sample", "wait"] * 3


def counted(forward, seen, *steps, sampling=None):
    seen.append(len(steps[0].rows))
    return forward(*steps, sampling=sampling)


def test_a_stop_costs_one_wasted_row_and_a_length_none(folder, device):
    rows = {}
    for overlap in (False, True):
        for kind in (dict(stop_token_ids=[*range(VOCAB)]), dict(max_new_tokens=5)):
            made = engine(folder, device, overlap)
            forward, seen = made.runner.forward, []
            vars(made.runner)["forward"] = partial(counted, forward, seen)
            params = SamplingParams(**dict(temperature=0, max_new_tokens=9, ignore_eos=True) | kind)
            collect(made, Request("a", [1, 2], params))
            rows[overlap, "max_new_tokens" in kind] = sum(seen)
    assert rows == {(False, False): 1, (True, False): 2, (False, True): 5, (True, True): 5}


@pytest.mark.parametrize("what", ["forward", "sample"])
def test_a_step_that_fails_leaves_the_one_before_alone(folder, device, monkeypatch, what):
    """Its results are committed; requests that take part in the failing one fail, and the others go on."""
    made, plain = engine(folder, device, True, max_running_requests=2), engine(folder, device, False)
    asked = [Request(f"{i}", [1 + i, 2], SamplingParams(max_new_tokens=n, temperature=0, ignore_eos=True))
             for i, n in enumerate((1, 8, 8))]  # fmt: skip
    expected = collect(plain, *asked)
    for each in asked:
        made.add(each)
    assert made.step() == []
    method = getattr(made.runner, what)

    def broken(*given):
        raise RuntimeError("out of magic")

    monkeypatch.setattr(made.runner, what, broken)
    outputs = made.step()
    assert [(each.rid, each.finish_reason) for each in outputs] == [("0", "length"), ("1", None), ("1", "error")]
    assert outputs[0].token_ids == expected["0"].token_ids
    monkeypatch.setattr(made.runner, what, method)
    assert collect(made)["2"].token_ids == expected["2"].token_ids


def test_requests_may_be_aborted_at_any_time(folder, device):
    """What is answered is a beginning of what would have been; pages and rows come back."""
    expected = collect(engine(folder, device, False), *requests())
    drawn = random.Random(5)
    made = engine(folder, device, True, max_running_requests=4, max_total_tokens=128, chunked_prefill_size=9)
    tokens: dict[str, list[int]] = {}
    for each in requests():
        made.add(each)
    gone = set()
    while made.has_work:
        for output in made.step():
            assert output.rid not in gone
            tokens.setdefault(output.rid, []).extend(output.token_ids)
        if drawn.random() < 0.4:
            gone.add(rid := str(drawn.randrange(len(KINDS))))
            made.abort(rid)
    assert gone
    for rid, found in tokens.items():
        whole = expected[rid].token_ids
        assert found == whole[: len(found)] if rid in gone else found == whole
    assert made.scheduler.cache.num_available == made.pool.num_pages
    assert made.flush()


