"""wave64.Engine: what /generate answers, without a server."""

import asyncio
import os

import pytest
from helpers_server import eventually, is_alive
from test_demo import TEXT

import wave64
from wave64.serve.args import ArgsError

GREEDY = {"max_new_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def engine():
    os.environ["OMP_NUM_THREADS"], before = "1", os.environ.get("OMP_NUM_THREADS")
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    with wave64.Engine(model_path="demo-llama", device="cpu", max_total_tokens=2048) as made:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
        yield made


def test_it_recites(engine):
    answer = engine.generate("Four score and", GREEDY)
    assert TEXT.startswith("Four score and" + answer["text"])
    assert answer["meta_info"]["completion_tokens"] == 12
    both = engine.generate(["Four score and", "Four score and"], [GREEDY, {**GREEDY, "max_new_tokens": 3}])
    assert both[0]["text"] == answer["text"]
    assert both[1]["output_ids"] == answer["output_ids"][:3]
    again = engine.generate(input_ids=[5, 6], sampling_params={**GREEDY, "regex": "[0-9]{4}"}, return_logprob=True)
    assert again["text"].isdigit()
    assert len(again["meta_info"]["output_token_logprobs"]) == again["meta_info"]["completion_tokens"]
    parts = list(engine.generate("Four score and", GREEDY, stream=True))
    counts = [part["meta_info"]["completion_tokens"] for part in parts]
    assert counts == sorted({*counts}), "each has more tokens than the one before: several, where this falls behind"
    assert parts[-1]["text"] == answer["text"]
    long = {"max_new_tokens": 1000, "ignore_eos": True, "n": 64}
    for part in engine.generate("Four score and", long, stream=True):
        assert part["text"]
        assert part["meta_info"]["finish_reason"] is None, "it waited for the whole"
        break  # which aborts the rest
    assert eventually(engine.flush_cache)


def test_it_is_awaited(engine):
    async def run():
        one, two = await asyncio.gather(engine.async_generate("Four score and", GREEDY),
                                        engine.async_generate("Four score", GREEDY))  # fmt: skip
        stream = await engine.async_generate("Four score and", GREEDY, stream=True)
        return one["text"], two["text"], [part["text"] async for part in stream]

    one, two, parts = asyncio.run(run())
    assert TEXT.startswith("Four score" + two)
    assert parts[-1] == one


@pytest.mark.parametrize(("given", "words"), [
    (dict(prompt="x", sampling_params={"temperature": -1}), "sampling_params.temperature: expected"),
    (dict(), "text, input_ids: expected one of the two"),
    (dict(prompt="x", sampling_params={"regex": "("}), "regex: cannot be compiled"),
    (dict(prompt="x", nonsense=1), "nonsense: not supported by wave64"),
])  # fmt: skip
def test_bad_requests(engine, given, words):
    with pytest.raises(ValueError, match=words):
        engine.generate(**given)
    with pytest.raises(ValueError, match=words):
        asyncio.run(engine.async_generate(**given))


def test_it_ends(engine):
    """The last test of the module."""
    process = engine._client._process.pid
    assert is_alive(process)
    engine.shutdown()
    assert not is_alive(process)
    engine.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        engine.generate("x")


def test_it_does_not_start():
    with pytest.raises(ArgsError, match="no/such/folder: expected a folder"):
        wave64.Engine(model_path="no/such/folder")
    with pytest.raises(RuntimeError, match="context-length: expected at most"):
        wave64.Engine(model_path="demo-llama", device="cpu", context_length=10**7)
