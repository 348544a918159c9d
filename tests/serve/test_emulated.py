"""Whole models on an emulated MI300X and MI355X, over HTTP: the tokens are those of the CPU, where operators run by
their references. Every step executes machine code, so a case takes seconds; two run in the suite, all in `long`.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_server import Server, serve
from transformers import AutoTokenizer

from wave64.serve.args import ServerArgs
from wave64.serve.engine import emulate
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model_path import resolve_model_path

PROMPTS = ["Four score and", "Four", "we here highly resolve that"]
FLAGS = ("--max-total-tokens", "512", "--max-running-requests", "4", "--skip-server-warmup")
PENALTIES = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
TP2 = ("--tp-size", "2")
DP_ATTENTION = (*TP2, "--dp-size", "2", "--enable-dp-attention")
PROMPT_GRAPHS = ("--piecewise-cuda-graph-max-tokens", "32")
QUARK = str(Path(__file__).with_name("quantized") / "demo-quark-kv")
FP8_CACHE = ("--kv-cache-dtype", "fp8_e4m3")

#: name -> (model, prompts asked at once, flags, fields of each request)
CASES: dict[str, tuple[str, list[str], tuple[str, ...], dict[str, Any]]] = {
    "llama": ("demo-llama", PROMPTS, PROMPT_GRAPHS, {}),  # three in a graph of four: one row is padding
    "llama-fp8-cache": ("demo-llama", PROMPTS[:1], FP8_CACHE, {}),
    "llama-penalties": ("demo-llama", PROMPTS, (), PENALTIES),
    "llama-eager": ("demo-llama", PROMPTS, ("--disable-cuda-graph",), {}),
    "llama-drawn": ("demo-llama", PROMPTS, (), {"temperature": 0.1, "top_p": 0.9}),  # where others have no chance
    "llama-tp2": ("demo-llama", PROMPTS[:1], TP2, {}),
    "llama-quark": (QUARK, PROMPTS, (), {}),  # FP8 weights, and keys and values with the checkpoint's scales
    "llama-quark-tp2": (QUARK, PROMPTS[:1], TP2, {}),
    "deepseek": ("demo-deepseek", PROMPTS, (), {}),
    "deepseek-experts": ("demo-deepseek", PROMPTS[:1], (*TP2, "--ep-size", "2"), {}),
    "deepseek-dp-attention": ("demo-deepseek", PROMPTS[:2], DP_ATTENTION, {}),
    "deepseek-chunks": ("demo-deepseek", PROMPTS, ("--chunked-prefill-size", "3"), {}),
    "deepseek-preempted": ("demo-deepseek", PROMPTS[:2] * 2, ("--max-total-tokens", "40", "--page-size", "4"), {}),
    "deepseek-fp8": ("demo-deepseek-fp8", PROMPTS, (), {}),
    "deepseek-fp8-everything": ("demo-deepseek-fp8", PROMPTS[:1], (*FP8_CACHE, "--chunked-prefill-size", "3"), {}),
}
pytestmark = pytest.mark.slow
#: What the suite runs: one model on each architecture, and two devices that reach each other's memory.
SHORT = [("llama", "gfx950"), ("deepseek-fp8-everything", "gfx942"), ("llama-tp2", "gfx942")]


def tokens_on_cpu(model: str, prompts: list[str], flags: tuple[str, ...], fields: dict[str, Any],
                  count: int) -> tuple[list[list[int]], int]:
    """What each request is answered, and how often one was preempted."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(model, None))
    engine = Engine(ServerArgs.from_cli(["--model-path", model, *FLAGS, *flags, "--device", "cpu"]))
    for i, prompt in enumerate(prompts):
        params = SamplingParams(**{"max_new_tokens": count, "temperature": 0, **fields})
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
    wanted, preemptions = tokens_on_cpu(model, prompts, () if flags[:2] == TP2 else flags, fields, count)
    assert got == wanted, log
    assert (preemptions > 0) == case.endswith("preempted")
    assert health["device"] == f"{arch} (emulated)"
    bound = {row["op"]: row["backend"] for row in health["backends"] if row["status"] == "bound"}
    assert bound["rms_norm"] == bound["reshape_and_cache"] == "hip"
    assert (bound["fp8_scaled_mm"], bound["prefill_attention"]) == ("triton", "hip")
    assert ("group world: 2 ranks reach each other's memory" in log) == (flags[:2] == TP2)
    assert bound["all_reduce"] == "hip"
    assert not re.search(r"(all_\w+|reduce_scatter): backend hip declines", log), log
    sizes = "2 batch sizes up to 2" if flags == DP_ATTENTION else "3 batch sizes up to 4"
    assert (f"decode graphs: {sizes}" in log) == (flags != ("--disable-cuda-graph",))
    assert ("prompt graphs: 2, up to 32 prompt tokens next to 4 decodes" in log) == (flags == PROMPT_GRAPHS)
    assert log.count("what torch itself would compute there") == 1


def test_the_command_refuses_a_log_level_in_words(capsys):
    with pytest.raises(SystemExit) as end:
        emulate.main(["--prompt", "Four", "--log-level", "loud"])
    assert end.value.code == 2
    assert "--log-level: invalid choice: 'loud' (choose from " in capsys.readouterr().err


def test_the_command_refuses_several_ranks_in_words(capsys):
    with pytest.raises(SystemExit) as end:
        emulate.main(["--prompt", "Four", "--tp", "2"])
    assert end.value.code == 1
    assert "--tp-size: expected 1, since this command is one process, got 2; python -m wave64.launch_server --device " \
        "gfx942 --tp-size 2 serves with several" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "arch", "count"), [
    ("demo-llama", "gfx942", 3), pytest.param("demo-deepseek-fp8", "gfx950", 16, marks=pytest.mark.long)])
def test_one_command_prints_tokens_instructions_and_the_cost_of_a_step(model, arch, count):
    command = [sys.executable, "-m", "wave64", "emulate", "--model-path", model, "--prompt", PROMPTS[0],
               "--device", arch, "--max-tokens", str(count)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**env, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    step = r"^'(.*)' +(prompt, \d+ tokens|a decode step): ([\d,]+) wave instructions in [\d.]+ s"
    steps = re.findall(rf"{step}(?:, bound ([\d.]+) us)?$", done.stdout, re.MULTILINE)
    wanted, _ = tokens_on_cpu(model, PROMPTS[:1], (), {}, count)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(model, None))
    assert "".join(step[0] for step in steps) == tokenizer.decode(wanted[0])
    assert len(steps) == count
    *_, total = (line.split() for line in done.stdout.splitlines() if line.startswith("one after another"))
    _, _, _, launches, instructions, bound, decodes, decoded, last = total  # of the first prompt, of the first decode
    assert [instructions, decoded] == [steps[0][2], steps[1][2]]
    assert abs(float(bound) - float(steps[0][3])) < 0.06 > abs(float(last) - float(steps[1][3]))
    assert {step[3] for step in steps[2:]} <= {""}
    assert int(launches) > 20 < int(decodes)
    product = "MI300X" if arch == "gfx942" else "MI355X"
    assert f"Bounds on {product}" in done.stdout
    assert re.search(r"^linear ", done.stdout, re.MULTILINE)
    assert "Left out" in done.stdout
