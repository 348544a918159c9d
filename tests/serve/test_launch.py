"""`python -m wave64.launch_server` as an operator meets it: flags, refusals to start, and every way it can end."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from helpers_server import CONTEXT, READY_S, Server, eventually, free_port, is_alive, serve
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

import wave64
from wave64.serve.args import ServerArgs
from wave64.serve.http import launch
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Ready

LONG = {"prompt": "It", "max_tokens": CONTEXT - 10, "ignore_eos": True}


def start_in_vain(model: Path | str, *flags: str) -> str:
    """Starts a server that must refuse to; returns its one line on stderr."""
    command = [sys.executable, "-m", "wave64.launch_server", "--model-path", str(model), "--device", "cpu"]
    if "--port" not in flags:
        flags = (*flags, "--port", str(free_port()))
    ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert "ready to roll" not in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def damaged(folder: Path, target: Path, damage) -> Path:
    """A copy of a checkpoint, after `damage(copy)`."""
    shutil.copytree(folder, target)
    damage(target)
    return target


def edit_config(name: str = "config.json", **changes):
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def reshape(folder: Path) -> None:
    """Turns a square weight's shape into another of as many elements, in the file's own header."""
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + size].replace(b'"shape":[64,64]', b'"shape":[32,128]', 1).strip()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])


@pytest.mark.parametrize(
    ("damage", "words"),
    [  # long: two that test_weights.py and test_config.py read without a server, and that take the way of another here
        (lambda folder: (folder / "model.safetensors").unlink(), ["safetensors"]),
        pytest.param(truncate, ["model.safetensors"], marks=pytest.mark.long),
        (reshape, ["model.safetensors", "proj.weight", "[32, 128]", "[64, 64]"]),
        pytest.param(edit_config(architectures=["GPT2LMHeadModel"]),
                     ["config.json", "architectures", "GPT2LMHeadModel"], marks=pytest.mark.long),
        (edit_config(rope_parameters={"rope_type": "spiral"}), ["config.json", "rope_type", "spiral", "llama3"]),
        (edit_config("generation_config.json", top_p=0), ["generation_config.json", "top_p: expected more than 0"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json", "--tokenizer-path"]),
    ],
    ids=["missing", "truncated", "shape", "architecture", "rope", "sampling", "tokenizer"],
)
def test_a_damaged_checkpoint_is_one_line(model_folder, tmp_path, damage, words):
    said = start_in_vain(damaged(model_folder, tmp_path / "copy", damage))
    for word in words:
        assert word in said


def test_a_port_in_use_is_known_before_the_model_is_touched(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = start_in_vain(tmp_path / "no such model", "--port", str(taken.getsockname()[1]))
    assert "--port: cannot listen on 127.0.0.1" in said
    assert "in use" in said


def test_a_model_that_is_not_there_is_one_line():
    assert "no/such/folder: expected a folder" in start_in_vain("no/such/folder")


def test_flags_are_obeyed(model_folder, tmp_path):
    template = tmp_path / "loud.jinja"
    template.write_text("{{ messages[-1].content | upper }}")
    flags = ["--api-key", "secret", "--served-model-name", "mine", "--chat-template", str(template),
             "--stream-interval", "5", "--context-length", "300", "--max-total-tokens", "128",
             "--log-level-http", "warning",
             "--trust-remote-code", "--ignore-config-key", "rope_nonsense"]  # fmt: skip
    model_folder = damaged(model_folder, tmp_path / "copy", edit_config(rope_nonsense=3, my_note="x"))
    with serve(model_folder, tmp_path / "log", *flags) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = httpx.get(server.url + "/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.get("/health").status_code == 200, "load balancers have no key"
        with openai.OpenAI(base_url=server.url + "/v1", api_key="secret") as client:
            card: Any = client.models.list().data[0]
            assert (card.id, card.max_model_len) == ("mine", 300)
            body = {"model": "mine", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
            chat = client.chat.completions.create(messages=[{"role": "user", "content": "four"}], **body)
            prompt = Tokenizer(model_folder).encode("FOUR", add_special_tokens=False)
            chunks = list(client.completions.create(prompt=prompt, stream=True, **body))
            assert len(chunks) <= 3, "12 tokens, at least five to an event"
            assert "".join(chunk.choices[0].text for chunk in chunks) == chat.choices[0].message.content
        server.http.headers["Authorization"] = "Bearer secret"
        assert server.get("/server_info").json()["api_key"] == "***"
        for body in ({"prompt": [5] * 200}, {"prompt": "x", "max_tokens": 200}):
            answer = server.post("/v1/completions", **body)
            assert answer.status_code == 400
            assert "maximum context length is 128 tokens on this server" in answer.json()["error"]["message"]
            assert "--max-total-tokens" in answer.json()["error"]["message"]
        assert server.complete(prompt=[5] * 100, max_tokens=28)["usage"]["prompt_tokens"] == 100
        log = server.log.read_text()
        assert log.index("what serves each operator:\nop ") < log.index("config.json: ") < log.index("KV pool: ")
        assert log.count("what serves each operator") == 1
        assert "secret" not in log
        assert "HTTP/1.1" not in log, "the access log was not wanted"
        assert "GET /v1/models: 401: Authorization: expected 'Bearer ' and the API key" in log
        for line in ("] --trust-remote-code: changes nothing here, ", "config.json: not known and passed by: my_note\n",
                     "] ignored, as --ignore-config-key says: rope_nonsense\n"):
            assert log.count(line) == 1, line
        told_twice(server)


def told_twice(server: Server) -> None:
    """The first time, a stream may go on for a while; the second, it is cut off, and so is the engine."""
    engine = server.engine_pid
    body = {"prompt": [5], "max_tokens": 127, "ignore_eos": True, "n": 64, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        with server.held():
            server.process.send_signal(signal.SIGINT)
            assert eventually(lambda: "told to end; " in server.log.read_text())
            server.process.send_signal(signal.SIGINT)
            assert eventually(lambda: "ending at once" in server.log.read_text())
        assert server.process.wait(READY_S) == 1
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    assert eventually(lambda: not is_alive(engine))


def test_how_http_is_spoken():
    config = launch.http_config(ServerArgs(), None)
    assert config.timeout_keep_alive == 75, "longer than clients keep a connection: they close it, not the server"
    assert launch.http_config(ServerArgs(timeout_keep_alive=9), None).timeout_keep_alive == 9
    config.load()
    assert config.http_protocol_class.__mro__[1].__name__ == "HttpToolsProtocol"

    async def loop() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert launch.run_loop(loop()) == "uvloop"


@pytest.mark.parametrize(("before", "head"), [(False, b""), (False, b"GET / HTTP/1.1\r\nHo"), (True, b"GET /")])
@pytest.mark.parametrize("protocol", [AutoHTTPProtocol, H11Protocol])
def test_a_head_that_does_not_end_closes_the_connection_and_a_long_answer_does_not(before, head, protocol, monkeypatch):
    monkeypatch.setattr(launch, "HEAD_S", 0.05)
    may_answer = asyncio.Event()

    async def app(scope, receive, send) -> None:
        if scope["path"] == "/long":
            await may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"OK"})

    async def both() -> None:
        config = launch.http_config(ServerArgs(), app)
        config.http = launch.closes_slow_heads(protocol)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server._serve([listener]))
            address = listener.getsockname()
            long, long_out = await asyncio.open_connection(*address)
            long_out.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
            slow, slow_out = await asyncio.open_connection(*address)
            if before:
                slow_out.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                await slow.readuntil(b"\r\n\r\nOK")
            slow_out.write(head)
            assert await asyncio.wait_for(slow.read(), 60) == b""
            may_answer.set()
            assert (await long.readuntil(b"\r\n\r\nOK")).startswith(b"HTTP/1.1 200")
            for out in (long_out, slow_out):
                out.close()
                await out.wait_closed()
            while server.server_state.connections:  # theirs are closed, too, once the loop has heard of it
                await asyncio.sleep(0)
            server.should_exit = True
            await serving

    asyncio.run(both())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_has_chunks_only_where_they_are_known(version):
    """Of HTTP/1.0 (`curl -0`, ab, nginx as it comes) the end of an answer is that of the connection."""
    async def app(scope, receive, send) -> None:
        assert (scope["http_version"], (await receive())["body"]) == (version, b"asked")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one ", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def answer() -> tuple[bytes, bytes]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(launch.http_config(ServerArgs(), app))
            serving = asyncio.create_task(server._serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            asked = ("POST / HTTP/" + version, "Connection: close", "Content-Length: 5", "Host: x", "", "asked")
            writer.write("\r\n".join(asked).encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
            server.should_exit = True
            await serving
        return head.lower(), body

    head, body = asyncio.run(answer())
    assert (b"transfer-encoding" in head) == (version == "1.1")
    assert b"connection: close" in head
    assert body == (b"one two" if version == "1.0" else b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")


def test_collections_leave_out_what_is_there_at_the_start(monkeypatch):
    """They would hold up every stream for as long as it takes to look at all that was imported."""
    frozen: list[int] = []
    monkeypatch.setattr(launch, "say", lambda line: frozen.append(gc.get_freeze_count()))

    async def announce() -> None:
        (is_ready := asyncio.Event()).set()
        made = SimpleNamespace(client=SimpleNamespace(is_ready=is_ready), args=ServerArgs(skip_server_warmup=True),
                               ready=Ready(9, 9, 9, "cpu", "float32", [], {}), is_serving=False)
        await launch._announce(made)
        assert made.is_serving

    gc.unfreeze()
    try:
        asyncio.run(announce())
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000


def test_a_graceful_end(model_folder, tmp_path):
    """A short request finishes, a long one ends with an error within the bound, the port closes, no process is left.
    Here it is the terminal that is closed; the shared server of these tests ends by SIGTERM."""
    with serve(model_folder, tmp_path / "log", "--max-total-tokens", "8192") as server:
        engine = server.engine_pid
        body = {"prompt": "Four score", "max_tokens": 30}
        alone, answers = server.complete(**body)["choices"], []

        def ask(**asked) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                answers.append(http.post("/v1/completions", json={"temperature": 0, **asked}))

        threads = [threading.Thread(target=ask, kwargs=kwargs) for kwargs in (body, {**LONG, "n": 4})]
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            with server.held():
                for thread in threads:
                    thread.start()
                assert eventually(lambda: httpx.get(server.url + "/health").json()["running"] == 1 + 4 + 1)
                server.process.send_signal(signal.SIGHUP)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "a stream that ends says so"
        for thread in threads:
            thread.join()
        assert server.process.wait(READY_S) == 0
    short, long = sorted(answers, key=lambda answer: answer.status_code)
    assert short.json()["choices"] == alone
    assert long.status_code == 200 or long.json()["error"]["message"] == "the server is shutting down"
    assert eventually(lambda: not is_alive(engine))
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_when_the_engine_dies_the_server_says_why_and_ends(model_folder, tmp_path):
    with serve(model_folder, tmp_path / "log") as server:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **LONG)))
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            with server.held():
                asking.start()
                assert eventually(lambda: httpx.get(server.url + "/health").json()["running"] == 2)
                os.kill(server.engine_pid, signal.SIGKILL)
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        asking.join()
        assert "signal SIGKILL" in rest[-1]["error"]["message"]
        assert (answers[0].status_code, answers[0].json()["error"]["type"]) == (503, "server_error")
        assert server.process.wait(READY_S) == 1
    assert server.log.read_text().splitlines()[-1].startswith("wave64.launch_server: error: ")
    assert "signal SIGKILL" in server.log.read_text()


def test_interrupted_while_it_starts(model_folder, tmp_path):
    server = Server(model_folder, tmp_path / "log")
    assert eventually(lambda: "what serves each operator" in server.log.read_text(), 60)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(READY_S) == 0
    server.http.close()
    assert "Traceback" not in server.log.read_text()


#: Python's own start: an import of this module of uvicorn does not end.
STANDS_STILL = """
import sys, time

class StandsStill:
    def find_spec(name, path=None, target=None):
        if name == "uvicorn.config":
            print("importing", flush=True)
            time.sleep(1000)

sys.meta_path.insert(0, StandsStill)
"""


def test_interrupted_while_it_imports(tmp_path):
    """Neither a traceback of some import, nor an error."""
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(STANDS_STILL)
    command = [sys.executable, "-m", "wave64.launch_server", "--port", str(free_port())]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        assert eventually(lambda: "importing\n" in log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(READY_S) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_the_api_process_has_no_torch(server):
    server.complete(prompt="It")
    assert has_torch(server.engine_pid)
    assert not has_torch(server.process.pid)


@pytest.mark.parametrize("order", ["wave64, torch", "torch, wave64"])
def test_an_import_of_wave64_registers_its_operators(order):
    code = f"import {order}; print(torch.ops.wave64.rms_norm(torch.ones(1, 4), torch.ones(4)).tolist())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.stdout.startswith("[[0.99"), told.stderr


def test_in_the_servers_processes_the_first_use_loads():
    code = ("import sys; sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'wave64.launch_server']\n"
            "import wave64\nprint('torch' in sys.modules)\n"
            "from wave64 import ops\nimport torch\n"
            "print(hasattr(wave64, 'nonsense'), 'ops' in dir(wave64), torch.ops.wave64.rms_norm is not None)")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.stdout.split() == ["False", "False", "True", "True"], told.stderr


@pytest.mark.parametrize(("argv", "python", "needs_no_torch"), [
    (["-m"], ["python", "-X", "dev", "-m", "wave64.launch_server"], True),
    (["-m"], ["python", "-m", "wave64.serve.engine.process"], True),
    (["-m", "serve", "--port", "1"], ["python", "-m", "wave64", "serve", "--port", "1"], True),
    (["-m"], ["python", "-m", "wave64.bench_serving"], True),
    (["-m", "bench_serving"], ["python", "-m", "wave64", "bench_serving"], True),
    (["-m", "doctor"], ["python", "-m", "wave64", "doctor"], False),
    (["-m", "serve"], ["python", "-m", "somebody.else", "serve"], False),
    (["/usr/bin/wave64", "serve"], ["python", "/usr/bin/wave64", "serve"], True),
    (["/usr/bin/wave64", "check"], ["python", "/usr/bin/wave64", "check"], False),
    (["mine.py", "-m", "wave64.launch_server"], ["python", "mine.py", "-m", "wave64.launch_server"], False),
    ([""], ["python"], False),
])  # fmt: skip
def test_which_processes_need_no_torch(argv, python, needs_no_torch, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", python)
    assert wave64._needs_no_torch() == needs_no_torch


def test_health_tells_starting_from_ready_and_a_killed_server_takes_its_engine_along(model_folder, tmp_path):
    server = Server(model_folder, tmp_path / "log")
    seen = set()

    def is_ready() -> bool:
        try:
            answer = server.get("/health")
        except httpx.TransportError:  # it does not listen yet
            return False
        seen.add((answer.status_code, answer.json()["status"]))
        return answer.status_code == 200

    try:
        assert eventually(is_ready, 120)
        assert seen <= {(503, "starting"), (200, "ok")}
        engine = server.engine_pid
    finally:
        server.process.kill()
        server.process.wait()
        server.http.close()
    assert eventually(lambda: not is_alive(engine))


def test_without_its_packages_the_server_says_what_to_install():
    start = ("import runpy, sys; sys.modules['uvicorn'] = sys.modules['zmq'] = None; "
             "runpy.run_module('wave64.launch_server', run_name='__main__')")
    ended = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr == ("wave64.launch_server: error: uvicorn, zmq: not installed, and needed by the server: "
                            "pip install 'wave64[serve]', or python3 setup_rocm.py install in a clone\n")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
def test_any_address_of_ipv6_is_any_of_ipv4_too():
    port = free_port()
    with launch.listen("::", port), socket.create_connection(("127.0.0.1", port)):
        pass
