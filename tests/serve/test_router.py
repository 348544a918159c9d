"""PyPI's sglang-router before two of our servers: it finds out what they serve, divides requests between them, and goes
on when one is killed. It is installed into an environment of its own, as on a machine that only routes."""

import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers_server import Server, eventually, free_port

COMPLETION = {"model": "demo-llama", "prompt": "Four score and", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter with sglang-router."""
    folder = tmp_path_factory.mktemp("router")
    venv.create(folder, with_pip=True)
    made = folder / "bin" / "python"
    done = subprocess.run([made, "-m", "pip", "install", "-q", "sglang-router==0.3.2"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"sglang-router cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return made


@pytest.fixture
def routed(python, tmp_path) -> Iterator[tuple[httpx.Client, list[Server]]]:
    servers = [Server("demo-llama", tmp_path / f"log-{i}", "--max-total-tokens", "2048") for i in (0, 1)]
    port, router = free_port(), None
    try:
        urls = [server.wait_ready().url for server in servers]
        router = subprocess.Popen([python, "-m", "sglang_router.launch_router", "--worker-urls", *urls, "--port",
                                   str(port), "--policy", "round_robin", "--prometheus-port", str(free_port())],
                                  stdout=sys.stderr)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert eventually(lambda: len(workers(client)) == 2, 60)
            yield client, servers
    finally:
        for process in [*([router] if router else []), *(server.process for server in servers)]:
            process.kill()
            process.wait()


def workers(client: httpx.Client) -> list[dict]:
    try:
        return [each for each in client.get("/workers").json()["workers"] if each["is_healthy"]]
    except (httpx.HTTPError, ValueError):
        return []


@pytest.mark.long
def test_requests_are_divided_and_a_killed_server_is_gone_around(routed):
    client, servers = routed
    assert {worker["model_id"] for worker in workers(client)} == {"demo-llama"}
    for path, body in [("/v1/completions", COMPLETION), ("/v1/chat/completions", {
            "model": "demo-llama", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2})] * 4:
        assert client.post(path, json=body).status_code == 200
    answer = client.post("/generate", json={"text": "Four score and", "sampling_params": {
        "max_new_tokens": 6, "temperature": 0}})
    assert answer.json()["text"] == " seven years ago"
    served = [server.log.read_text().count('"POST ') for server in servers]
    assert min(served) >= 3, served
    servers[1].process.kill()
    texts = [client.post("/v1/completions", json=COMPLETION).json()["choices"][0]["text"] for _ in range(6)]
    assert texts == [" seven years ago"] * 6
