"""Other projects' clients, unmodified, against the real server: SGLang's benchmark, of the wheel on PyPI; and ours,
which has to say the same of that server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_server import serve

from wave64.bench_serving import run
from wave64.bench_serving.run import main
from wave64.serve.model_path import BUILT_IN

HERE = Path(__file__).parent
CLIENTS = HERE.parents[1] / "build" / "clients"  # where `setup_rocm.py test` puts them: not among what wave64 imports
BACKENDS = ("sglang", "sglang-oai", "sglang-oai-chat", "vllm")
PROMPTS, NEW = 3, 4

# As `python -m sglang.benchmark.serving` once for each backend, without importing transformers each time.
RUN = """
import sys
from sglang.benchmark.serving import cli_main
backends, *flags = sys.argv[1:]
for backend in backends.split(","):
    sys.argv[1:] = ["--backend", backend, *flags]
    cli_main()
"""


def labels(shown: str) -> list[str]:
    """Of a benchmark's figures, and its headings, in order."""
    return re.findall(r"^([A-Z][^:\n]*:)  |^[-=]+([^-=\n]+)[-=]+$", shown, re.MULTILINE)


@pytest.mark.skipif(not (CLIENTS / "sglang").exists(),
                    reason="SGLang's client is not in build/clients: python3 setup_rocm.py test")
def test_sglangs_benchmark_and_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "PAUSE_S", 0.0)
    with serve("demo-llama", tmp_path / "log", "--max-total-tokens", "2048") as server:
        told = server.get("/model_info").json()
        assert told["model_path"] == told["tokenizer_path"] == str(BUILT_IN["demo-llama"])
        results = tmp_path / "results"
        flags = ["--base-url", server.url, "--dataset-name", "random-ids", "--num-prompts", str(PROMPTS),
                 "--random-input-len", "8", "--random-output-len", str(NEW), "--random-range-ratio", "1.0",
                 "--output-details", "--output-file", str(results), "--disable-tqdm"]  # fmt: skip
        path = os.pathsep.join([str(HERE / "stand_ins"), str(CLIENTS)])
        ran = subprocess.run([sys.executable, "-c", RUN, ",".join(BACKENDS), *flags], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})  # fmt: skip
        ours = tmp_path / "ours"
        flags[-2] = str(ours)
        assert all(main(["--backend", backend, *flags]) == 0 for backend in BACKENDS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [result["backend"] for result in found] == list(BACKENDS)
    for result in found:
        assert result["errors"] == [""] * PROMPTS
        assert (result["completed"], result["output_lens"]) == (PROMPTS, [NEW] * PROMPTS)
        assert result["server_info"]["model_path"] == "demo-llama"
        assert all(result["generated_texts"])
    shown = capsys.readouterr().out
    assert labels(shown) == labels(ran.stdout[ran.stdout.index("==") :])
    assert len(labels(shown)) == 40 * len(BACKENDS)
    same = ("backend", "dataset_name", "request_rate", "max_concurrency", "random_output_len", "completed",
            "total_input_tokens", "total_output_tokens", "output_lens", "errors", "server_info")
    for theirs, line in zip(found, map(json.loads, ours.read_text().splitlines()), strict=True):
        assert theirs.keys() <= line.keys()
        theirs["server_info"].pop("statistics")
        line["server_info"].pop("statistics")
        assert {name: line[name] for name in same} == {name: theirs[name] for name in same}
        assert all(type(line[name]) is type(theirs[name]) for name in theirs if name not in same)
