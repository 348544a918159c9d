"""Models that take up a prefix which was computed before: their tokens and logprobs next to those without."""

import pytest
import torch
from helpers_deepseek import make_deepseek
from helpers_llama import make_llama
from helpers_parallel import collect
from test_demo import pairs
from transformers import AutoTokenizer

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model_path import resolve_model_path

VOCAB, CHUNK = 100, 32
PROMPT = [(7 * i * i + 3 * i) % VOCAB for i in range(CHUNK + 3)]
ONE = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "deepseek"])
def model(request, tmp_path_factory):
    """transformers' model, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make_llama(folder, vocab_size=VOCAB) if request.param == "llama" else make_deepseek(
        folder, 3, vocab_size=VOCAB)
    made.config._experts_implementation = "eager"  # grouped products know no fp64
    return made, folder


def engine(folder, device, **flags) -> Engine:
    given = dict(model_path=str(folder), device=device, dtype="float32", max_total_tokens=512)
    return Engine(ServerArgs(**given | flags))


def logprobs(engine: Engine, prompt: list[int]) -> tuple[torch.Tensor, int]:
    """log_softmax of the logits behind a prompt, and how many of its tokens were cached."""
    output = collect(engine, Request("a", prompt, ONE, top_logprobs=VOCAB))["a"]
    values = dict(output.logprobs[0].top)
    return torch.tensor([values[i] for i in range(VOCAB)]), output.cached_tokens


@pytest.mark.parametrize("kv", ["auto", "fp8_e4m3"])
def test_a_cached_chunk_is_the_computed_one_to_the_bit(model, device, kv):
    """Both engines compute the prompt in the same chunks; one has the first of another request."""
    flags = dict(chunked_prefill_size=CHUNK, kv_cache_dtype=kv)
    cached, fresh = engine(model[1], device, **flags), engine(model[1], device, **flags, disable_radix_cache=True)
    logprobs(cached, PROMPT[:CHUNK] + [5, 5])
    got, hits = logprobs(cached, PROMPT)
    want, misses = logprobs(fresh, PROMPT)
    assert (hits, misses) == (CHUNK, 0)
    assert torch.equal(got, want)


def test_a_cached_prefix_gives_the_logits_of_a_fresh_one(model, device):
    """Computed whole and behind a cached prefix: two evaluations in fp32, each at most twice as far from one in fp64 as
    transformers' is, so at most four times as far from each other; and a rounding of the logprob itself."""
    theirs, folder = model
    cached = engine(folder, device)
    fresh, _ = logprobs(cached, PROMPT)
    got, hits = logprobs(cached, PROMPT)
    assert hits == CHUNK
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        single = torch.log_softmax(theirs.float()(ids).logits[0, -1], -1)
        exact = torch.log_softmax(theirs.double()(ids).logits[0, -1], -1)
    theirs.float()
    unit = float((single.double() - exact).abs().max())
    rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert 0 < unit < 1e-4
    assert float((got - fresh).abs().max()) <= 4 * unit + rounding
    assert float((got.double() - exact).abs().max()) <= 2 * unit + rounding


@pytest.mark.parametrize("name", ["demo-llama", "demo-deepseek", "demo-deepseek-fp8"])
def test_demos_say_the_same_with_and_without(device, name):
    """Turns of a chat: each prompt is the last one, its answer, and more."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(name, None))
    prompt, answer = pairs(tokenizer)[1]
    text = [*prompt, *answer]
    params = SamplingParams(max_new_tokens=12, temperature=0)
    asked = [Request(f"{i}", text[: 20 + 25 * i], params) for i in range(3)]
    flags = dict(max_total_tokens=2048, max_running_requests=1)
    cached, fresh = (engine(name, device, **flags, disable_radix_cache=off) for off in (False, True))
    got, want = collect(cached, *asked), collect(fresh, *asked)
    assert {rid: each.token_ids for rid, each in got.items()} == {rid: each.token_ids for rid, each in want.items()}
    assert got["1"].token_ids == text[45:57]
    assert cached.statistics().cached_tokens == 16 + 48, "31 and 56 tokens had keys"
    assert fresh.statistics().cached_tokens == 0


def test_flush_empties_the_cache_of_an_idle_engine(model, device):
    made = engine(model[1], device)
    logprobs(made, PROMPT)
    assert made.statistics().pages_cached == 2
    made.add(Request("b", PROMPT, ONE))
    assert not made.flush()
    assert collect(made)["b"].finish_reason == "length"
    assert made.flush()
    assert (made.statistics().pages_cached, made.pool.num_free) == (0, made.pool.num_pages)
    assert logprobs(made, PROMPT)[1] == 0
