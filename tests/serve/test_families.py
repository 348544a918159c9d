"""A family is a folder and a line in FAMILIES: one of a test's own is served by the engine like those that ship."""

import json
from typing import Any

import pytest
from families import running_sum

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model import FAMILIES
from wave64.serve.model.config import ConfigError, ModelConfig

CONFIG: dict[str, Any] = dict(architectures=["RunningSumForCausalLM"], vocab_size=50, hidden_size=1,
                              intermediate_size=1, num_hidden_layers=1, max_position_embeddings=64,
                              eos_token_id=None)  # fmt: skip
PROMPTS = {"a": [3, 9, 27, 1, 8, 40, 2, 7], "b": [5], "c": [11, 12, 13, 14]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "RunningSumForCausalLM", running_sum.FAMILY)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def continued(prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(sum(tokens) % CONFIG["vocab_size"])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("chunk", [2, 64])
def test_a_family_of_its_own_is_served(folder, chunk):
    """Its cache has another shape than keys and values, and a prefill in chunks reads what came before by slots."""
    engine = Engine(ServerArgs(model_path=str(folder), device="cpu", load_format="dummy", page_size=3, dtype="float32",
                               max_total_tokens=96, chunked_prefill_size=chunk))
    assert [tuple(tensor.shape) for layer in engine.runner.kv_cache for tensor in layer] == [(32, 3)]
    for rid, prompt in PROMPTS.items():
        engine.add(Request(rid, prompt, SamplingParams(max_new_tokens=9, temperature=0.0)))
    tokens = {rid: [] for rid in PROMPTS}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.rid] += output.token_ids
    assert tokens == {rid: continued(prompt, 9) for rid, prompt in PROMPTS.items()}


def test_a_key_that_the_family_does_not_read_is_refused(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"sliding_window": 7}))
    with pytest.raises(ConfigError, match="sliding_window"):
        ModelConfig.from_folder(folder)


def test_the_engine_tells_what_the_model_recommends(folder):
    """Out of range, it is refused before a weight is read."""
    args = ServerArgs(model_path=str(folder), device="cpu", load_format="dummy", max_total_tokens=96)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.5, "top_k": 7}))
    assert Engine(args).ready().sampling_defaults == {"temperature": 0.5, "top_k": 7}
    file.write_text(json.dumps({"top_p": 1.5}))
    with pytest.raises(ConfigError, match="generation_config.json: top_p: expected more than 0 and at most 1"):
        Engine(args)
