"""Whole models on an emulated MI300X and MI355X, over HTTP: the tokens are those of the CPU, where operators run by
their references. Every step executes machine code, so a case takes seconds; two run in the suite, all in `long`.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers_server import Server, serve
from transformers import AutoTokenizer

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model_path import resolve_model_path

PROMPTS = ["Four score and", "Four", "we here highly resolve that"]
FLAGS = ("--max-total-tokens", "512", "--max-running-requests", "4", "--skip-server-warmup")
PENALTIES = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
FP8_CACHE = ("--kv-cache-dtype", "fp8_e4m3")

#: name -> (model, prompts asked at once, flags, fields of each request)
CASES: dict[str, tuple[str, list[str], tuple[str, ...], dict[str, Any]]] = {
    "llama": ("demo-llama", PROMPTS, (), {}),  # three in a graph of four: one row is padding
    "llama-fp8-cache": ("demo-llama", PROMPTS[:1], FP8_CACHE, {}),
    "llama-penalties": ("demo-llama", PROMPTS, (), PENALTIES),
    "llama-eager": ("demo-llama", PROMPTS, ("--disable-cuda-graph",), {}),
    "deepseek": ("demo-deepseek", PROMPTS, (), {}),
    "deepseek-chunks": ("demo-deepseek", PROMPTS, ("--chunked-prefill-size", "3"), {}),
    "deepseek-preempted": ("demo-deepseek", PROMPTS[:2] * 2, ("--max-total-tokens", "40", "--page-size", "4"), {}),
    "deepseek-fp8": ("demo-deepseek-fp8", PROMPTS, (), {}),
    "deepseek-fp8-everything": ("demo-deepseek-fp8", PROMPTS[:1], (*FP8_CACHE, "--chunked-prefill-size", "5"), {}),
}
#: What the suite runs: one model on each architecture.
SHORT = [("llama", "gfx950"), ("deepseek-fp8-everything", "gfx942")]


def tokens_on_cpu(model: str, prompts: list[str], flags: tuple[str, ...], fields: dict[str, Any],
                  count: int) -> tuple[list[list[int]], int]:
    """What each request is answered, and how often one was preempted."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(model, None))
    engine = Engine(ServerArgs.from_cli(["--model-path", model, *FLAGS, *flags, "--device", "cpu"]))
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=count, temperature=0, **fields)
        engine.add(Request(str(i), tokenizer(prompt).input_ids, params))
    got: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            got[int(output.rid)] += output.token_ids
    return got, engine.statistics().preemptions


def tokens_over_http(server: Server, prompts: list[str], fields: dict[str, Any], count: int) -> list[list[int]]:
    def ask(prompt: str) -> list[int]:
        params = {"temperature": 0, "max_new_tokens": count, **fields}
        answer = server.post("/generate", text=prompt, sampling_params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()["output_ids"]

    server.http.timeout = 600
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


@pytest.mark.parametrize(("case", "arch", "count"), [
    *[(*short, 4) for short in SHORT],
    *[pytest.param(case, arch, 16, marks=pytest.mark.long) for case in CASES for arch in ("gfx942", "gfx950")]])
def test_a_model_says_on_the_device_what_it_says_on_a_cpu(case, arch, count, tmp_path):
    model, prompts, flags, fields = CASES[case]
    with serve(model, tmp_path / "log", *FLAGS, *flags, "--device", arch) as server:
        got = tokens_over_http(server, prompts, fields, count)
        health = server.get("/health").json()
        assert server.stop() == 0
    log = server.log.read_text()
    wanted, preemptions = tokens_on_cpu(model, prompts, flags, fields, count)
    assert got == wanted, log
    assert (preemptions > 0) == case.endswith("preempted")
    assert health["device"] == f"{arch} (emulated)"
    bound = {row["op"]: row["backend"] for row in health["backends"] if row["status"] == "bound"}
    assert bound["rms_norm"] == bound["reshape_and_cache"] == "hip"
    assert bound["prefill_attention"] == bound["fused_moe"] == "triton"
    assert ("decode graphs: 3 batch sizes up to 4" in log) == ("--disable-cuda-graph" not in flags)
    assert log.count("what torch itself would compute there") == 1
