"""What is built on OpenAI's API, unmodified, against the real server: LiteLLM, lm-eval's arithmetic, OpenAI's Agents.

Each runs in a process of its own (they leave sockets and event loops open) and is skipped where it is not installed:
pip install 'wave64[clients]'. This file is that process, too.
"""

import asyncio
import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib import import_module
from typing import Any, Literal

import httpx
import pytest

from wave64.serve.model_path import BUILT_IN

TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks up a word.", "parameters": {
    "type": "object", "additionalProperties": False, "required": ["word"],
    "properties": {"word": {"enum": ["score", "years"]}}}}}  # fmt: skip


def litellm(url: str) -> None:
    litellm: Any = import_module("litellm")
    user = [{"role": "user", "content": "Four score"}]
    how = {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0}
    whole = litellm.completion(messages=user, max_tokens=6, **how)
    assert whole.choices[0].message.content.startswith(" and seven years"), whole
    assert whole.usage.completion_tokens == 6
    parts = list(litellm.completion(messages=user, max_tokens=6, stream=True, stream_options={"include_usage": True},
                                    **how))  # fmt: skip
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    called = litellm.completion(messages=user, max_tokens=400, tools=[TOOL], tool_choice="required",
                                parallel_tool_calls=False, **how)  # fmt: skip
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["word"] in ("score", "years")
    text = litellm.text_completion(prompt="Four score", max_tokens=3,
                                   **{**how, "model": "text-completion-openai/tiny"})  # fmt: skip
    assert text.choices[0].text == " and seven", text
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=user, max_tokens=10**6, **how)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=user, **{**how, "temperature": -1})


def lm_eval(url: str) -> None:
    """Likelihoods of continuations that the model knows and does not, next to those of our own requests."""
    Instance: Any = import_module("lm_eval.api.instance").Instance
    LocalCompletionsAPI: Any = import_module("lm_eval.models.openai_completions").LocalCompletionsAPI

    def ask(path: str, **body) -> dict:
        return httpx.post(url + path, json=body, timeout=60).json()

    def tokens(text: str) -> list[int]:
        return ask("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    model = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="tiny", tokenizer=str(BUILT_IN["demo-llama"]),
                                tokenizer_backend="huggingface", max_retries=1)  # fmt: skip
    pairs = [("Four score and seven", " years ago"), ("Four score and seven", " bananas")]
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(asked)
    assert [is_greedy for _, is_greedy in found] == [True, False], found
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        first, ids = len(tokens(context)), tokens(context + continuation)
        said = ask("/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
        assert math.isclose(logprob, sum(said["token_logprobs"][first:]), abs_tol=1e-3), (logprob, said)
    until = Instance(request_type="generate_until", doc={}, idx=0,
                     arguments=("Four score and seven", {"until": ["our"], "max_gen_toks": 20}))  # fmt: skip
    assert model.generate_until([until]) == [" years ago "]


def agents(url: str) -> None:
    """An agent that has to look something up calls the function, then says what the model goes on with."""
    import openai

    agents: Any = import_module("agents")

    seen = []

    @agents.function_tool
    def look_up(word: Literal["score", "years"]) -> str:
        """Look up a word."""
        seen.append(word)
        return "a number"

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            settings = agents.ModelSettings(temperature=0, max_tokens=400, tool_choice="required",
                                            parallel_tool_calls=False)  # fmt: skip
            agent = agents.Agent(name="reader", tools=[look_up], model_settings=settings,
                                 model=agents.OpenAIChatCompletionsModel(model="tiny", openai_client=client))
            return (await agents.Runner.run(agent, "Four score", max_turns=3)).final_output

    agents.set_tracing_disabled(True)
    assert asyncio.run(run())
    assert len(seen) == 1
    assert seen[0] in ("score", "years")


CLIENTS = {"litellm": litellm, "lm_eval": lm_eval, "agents": agents}


@pytest.fixture(scope="module")
def recite(tmp_path_factory):
    """A server of a model that knows a text."""
    from helpers_server import serve

    log = tmp_path_factory.mktemp("recite") / "log"
    with serve("demo-llama", log, "--max-total-tokens", "4096", "--served-model-name", "tiny") as running:
        yield running
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None,
                                                reason=f"{name} is not installed: pip install 'wave64[clients]'"))
    for name in CLIENTS])  # fmt: skip
def test_a_client(name, request):
    server = request.getfixturevalue("recite")
    ran = subprocess.run([sys.executable, __file__, name, server.url], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"})  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


if __name__ == "__main__":
    CLIENTS[sys.argv[1]](sys.argv[2])
