"""Other projects' clients, unmodified, against the real server: SGLang's benchmark, of the wheel on PyPI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_server import serve

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


@pytest.mark.skipif(not CLIENTS.exists(), reason="SGLang's client is not in build/clients: python3 setup_rocm.py test")
def test_sglangs_benchmark(tmp_path):
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
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [result["backend"] for result in found] == list(BACKENDS)
    for result in found:
        assert result["errors"] == [""] * PROMPTS
        assert (result["completed"], result["output_lens"]) == (PROMPTS, [NEW] * PROMPTS)
        assert result["server_info"]["model_path"] == "demo-llama"
        assert all(result["generated_texts"])
    assert "Successful requests:" in ran.stdout
