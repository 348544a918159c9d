"""--enable-deterministic-inference: a request's tokens and logprobs are the same to the bit, alone and in company, with
cached prefixes, other chunks, preempted or scheduled late."""

import pytest
from helpers_deepseek import make_deepseek
from helpers_llama import make_llama
from helpers_parallel import collect

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.schedule import LAST_SAMPLED, Schedule
from wave64.serve.messages import Request, SamplingParams

VOCAB = 100
FLAGS = dict(dtype="bfloat16", page_size=4, max_total_tokens=512, enable_deterministic_inference=True)
CROWDED = dict(chunked_prefill_size=7, schedule_policy="lpm", enable_hierarchical_cache=True)


def requests() -> list[Request]:
    """Some that begin alike, twins, drawn and penalized ones, with logprobs of answers and prompts."""
    kinds = [dict(temperature=0), dict(seed=3), dict(temperature=0.7, top_p=0.9, seed=4),
             dict(temperature=0, repetition_penalty=1.3), dict(temperature=0), dict(seed=6, top_k=9)]  # fmt: skip
    asked = []
    for i, kind in enumerate(kinds):
        prompt = [(7 * j * j + 3 * j) % VOCAB for j in range(3 + 5 * (i // 2))] + [5] * (i % 2)
        params = SamplingParams(**dict(max_new_tokens=14, ignore_eos=True) | kind)
        asked.append(Request(f"{i}", prompt, params, top_logprobs=3, prompt_logprobs=i % 3 == 2))
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [
    ("llama", {}), ("deepseek", {}), *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("llama", dict(kv_cache_dtype="fp8_e4m3")), ("demo-deepseek-fp8", dict(dtype="auto"))))])
def test_alone_and_in_company(tmp_path, device, name, more):
    if name == "llama":
        make_llama(tmp_path, vocab_size=VOCAB)
    elif name == "deepseek":
        make_deepseek(tmp_path, 3, vocab_size=VOCAB)
    folder = name if name.startswith("demo") else str(tmp_path)
    flags = dict(model_path=folder, device=device) | FLAGS | more
    alone = Engine(ServerArgs(**flags | dict(disable_radix_cache=True)))
    asked, pool = (requests(), 84) if name == "llama" else (requests()[:4], 60)  # a DeepSeek's token takes longer
    crowded = Engine(ServerArgs(**flags | CROWDED | dict(max_total_tokens=pool)), overlap=True)
    want = {}
    for each in asked:
        want |= collect(alone, each)
    together = collect(crowded, *asked)
    again = collect(crowded, *reversed(asked))  # with the answers' own pages in the cache
    statistics = crowded.statistics()
    assert statistics.preemptions > 0
    assert statistics.cached_tokens > 0
    for rid, one in want.items():
        for other in (together[rid], again[rid]):
            assert other.token_ids == one.token_ids
            assert other.logprobs == one.logprobs
            assert other.prompt_logprobs == one.prompt_logprobs


def test_a_step_is_taken_apart_token_by_token():
    pages = [(4, 2, [5])]
    step = Schedule(1, [4, 2], [9, 3], [1, 3], [1, 2], [LAST_SAMPLED, 1, 2, 3], pages)
    assert list(step.one_by_one()) == [
        (Schedule(1, [4], [9], [1], [1], [LAST_SAMPLED], pages), True), (Schedule(1, [2], [3], [1], [1], [1]), False),
        (Schedule(1, [2], [4], [1], [1], [2]), True), (Schedule(1, [2], [5], [1], [1], [3]), True)]
