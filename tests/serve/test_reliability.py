"""What must not break a server, while its wall clock jumps by hours at every look: overload, an engine that stands
still, clients that leave in every state or do not read, a full disk, fuzz. RELIABILITY.md has the figures of long runs.
"""

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest
from helpers_http import App
from helpers_server import Server, eventually, free_port, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wave64.serve.http.operator_schemas import AbortRequest, DetokenizeRequest, TokenizeRequest
from wave64.serve.http.responses import ResponsesRequest
from wave64.serve.http.schemas import Body, ChatRequest, CompletionRequest, GenerateRequest, NativeSampling
from wave64.serve.http.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
RUNNING, QUEUED = 4, 4
JUMPS = """
import itertools, time
real, looks = time.time, itertools.count()
time.time = lambda: real() + 3600 * (-1) ** next(looks) * (next(looks) % 5)
"""
PROMPTS = [f"Four score and {i}" for i in range(4)]
BODY = {"prompt": "Four score", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def sturdy(model_folder, tmp_path_factory):
    """A server with a short queue, in whose processes the wall clock jumps."""
    folder = tmp_path_factory.mktemp("sturdy")
    (folder / "sitecustomize.py").write_text(JUMPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        server = serve(model_folder, folder / "log", "--max-running-requests", str(RUNNING),
                       "--max-queued-requests", str(QUEUED))  # fmt: skip
        with server as running:
            patch.undo()
            yield running
            assert running.stop() == 0
    assert "Traceback" not in (folder / "log").read_text()


def left_behind(server: Server) -> dict[str, int]:
    """What of a request may stay in a server's processes, and must not."""
    assert eventually(lambda: server.running == 0)
    state = server.get("/server_info").json()["statistics"]
    assert eventually(lambda: server.get("/server_info").json()["statistics"]["running"] == 0)
    assert eventually(lambda: server.get("/server_info").json()["statistics"]["pages_used"] == 0), state
    found = {}
    for name, pid in (("api", server.process.pid), ("engine", server.engine_pid)):
        found[f"{name} threads"] = len(os.listdir(f"/proc/{pid}/task"))
        found[f"{name} descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found


@pytest.fixture(scope="module")
def quiet(sturdy):
    """prompt -> what it is answered when nothing else happens."""
    return {prompt: sturdy.complete(prompt=prompt)["choices"][0]["text"] for prompt in PROMPTS}


def answers_as_ever(server: Server, quiet: dict[str, str]) -> None:
    for prompt in PROMPTS[:2]:
        assert server.complete(prompt=prompt)["choices"][0]["text"] == quiet[prompt]


@pytest.fixture(autouse=True)
def _clean(request):
    """Whatever happens to the server, its state after is that before."""
    if "sturdy" not in request.fixturenames:
        yield
        return
    server, quiet = map(request.getfixturevalue, ("sturdy", "quiet"))
    before = left_behind(server)
    yield
    answers_as_ever(server, quiet)
    assert eventually(lambda: all(count <= before[name] + 1 for name, count in left_behind(server).items())), before


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_of_four_times_as_many_as_the_queue_holds_each_is_answered_or_told_to_come_again(sturdy, quiet, rounds):
    """And those that are answered get the tokens of a quiet server."""
    queue, count = RUNNING + QUEUED, 4 * (RUNNING + QUEUED)

    def ask(i: int) -> int:
        answer = httpx.post(f"{sturdy.url}{COMPLETIONS}", timeout=120, json={
            "prompt": PROMPTS[i % 4], "max_tokens": 24, "temperature": 0})  # fmt: skip
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == quiet[PROMPTS[i % 4]]
        else:
            assert answer.headers["retry-after"]
        return answer.status_code

    with ThreadPoolExecutor(count) as pool:
        with sturdy.held():
            answered = pool.map(ask, range(queue))
            assert eventually(lambda: sturdy.running == queue)
            assert [*pool.map(ask, range(queue, count))] == [429] * (count - queue)
        assert [*answered] == [200] * queue
        assert {*pool.map(ask, range(count * (rounds - 1)))} <= {200, 429}


@pytest.mark.parametrize("seconds", [0.5, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("who", ["engine", "api"])
def test_a_process_that_stands_still_for_a_while_goes_on(sturdy, quiet, who, seconds):
    pid = sturdy.engine_pid if who == "engine" else sturdy.process.pid
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(sturdy.complete, prompt=PROMPTS[0])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        assert answer.result()["choices"][0]["text"] == quiet[PROMPTS[0]]


def raw(body: dict) -> bytes:
    text = json.dumps(body).encode()
    head = (f"POST {COMPLETIONS} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(text)}")
    return "\r\n".join((*head, "", "")).encode() + text


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_clients_that_leave_in_every_state(sturdy, is_reset):
    whole, streamed = raw(BODY), raw(BODY | {"stream": True})
    head = whole.index(b"\r\n\r\n") + 4
    for sent, read in ((b"", 0), (whole[:10], 0), (whole[: head - 1], 0), (whole[:head], 0), (whole[: head + 9], 0),
                       (whole, 0), (streamed, 0), (streamed, 1), (streamed, 2000)):  # fmt: skip
        with closing(connected(sturdy)) as client:
            client.sendall(sent)
            got = b""
            while len(got) < read:
                got += client.recv(read - len(got))
            if is_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_random_bytes_on_the_socket(sturdy):
    drawn = random.Random(0)
    good = raw(BODY | {"max_tokens": 1})
    for i in range(40):
        with closing(connected(sturdy)) as client:
            junk = drawn.randbytes(drawn.randrange(1, 3000))
            at = drawn.randrange(len(good))
            client.sendall(junk if i % 2 else good[:at] + junk[:20] + good[at:])
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(4096)
            assert not answer.startswith(b"HTTP/1.1 5"), answer


@pytest.mark.parametrize("count", [RUNNING + QUEUED, pytest.param(100, marks=pytest.mark.long)])
def test_readers_that_do_not_read(sturdy, quiet, count):
    """Others are served meanwhile; when the readers leave, what was made for them is gone."""
    clients = [connected(sturdy) for _ in range(count)]
    with sturdy.held():
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.sendall(raw(BODY | {"stream": True, "logprobs": 5, "max_tokens": 200}))
        assert eventually(lambda: sturdy.running >= RUNNING + QUEUED)
    assert eventually(lambda: sturdy.running == 0), "the engine does not wait for readers"
    answers_as_ever(sturdy, quiet)
    for client in clients:
        client.close()


LOG = """
import logging
from wave64.serve.logs import close_stdout, configure, say
configure("info")
say("ready")
logging.getLogger("wave64").info("a request")
"""


@pytest.mark.parametrize(("end", "status"), [("close_stdout()", 0), ("", 120)])
def test_what_a_full_disk_does_not_take_fails_nothing(end, status):
    """status: 120 is Python's own, for what it could not write at the end."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as sink:
        ran = subprocess.run([sys.executable, "-c", LOG + end], stdout=sink, stderr=subprocess.PIPE, text=True,
                             env=buffered)  # fmt: skip
    assert ran.returncode == status, ran.stderr
    assert "Logging error" not in ran.stderr


@pytest.mark.long
def test_a_log_on_a_full_disk_ends_nothing(model_folder):
    """What cannot be logged is lost; requests are answered."""
    port = free_port()
    command = [sys.executable, "-m", "wave64.launch_server", "--model-path", str(model_folder), "--device", "cpu",
               "--port", str(port), "--log-requests"]  # fmt: skip
    with open("/dev/full", "w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})  # fmt: skip
    try:
        def is_ready() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
            except httpx.TransportError:
                return False

        assert eventually(is_ready, 120)
        answer = httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json={"prompt": "x", "max_tokens": 2}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


# ---- fuzz, in this process

#: Values of every kind, for any field.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["x", "required", "json_object", "text", "^a$", {"type": "object"}, {"type": "json_object"}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "schema", "role", "a", "", "A", "-1", "5"]), inner, max_size=3), max_leaves=6)
#: A body's model -> where it is posted, and the least of it that is served.
BODIES = {CompletionRequest: (COMPLETIONS, {"prompt": "x"}), GenerateRequest: (GENERATE, {"text": "x"}),
          ChatRequest: (CHAT, {"messages": [{"role": "user", "content": "x"}]}), NativeSampling: (GENERATE, {}),
          ResponsesRequest: ("/v1/responses", {"input": "x"}), TokenizeRequest: ("/tokenize", {"prompt": "x"}),
          DetokenizeRequest: ("/detokenize", {"tokens": [5]}), AbortRequest: ("/abort_request", {})}  # fmt: skip
#: What schemathesis found to be answered by status 500.
FOUND = [(DetokenizeRequest, {"tokens": [-1]}), (DetokenizeRequest, {"tokens": [[5], [2**70]]}),
         (NativeSampling, {"logit_bias": {"": None}})]  # fmt: skip


@pytest.fixture(scope="module")
def app(tokenizer_folder):
    return App(Tokenizer(tokenizer_folder))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_in_a_field_is_served_or_refused_in_words(app, data):
    model = data.draw(st.sampled_from([*BODIES]))
    names = st.sampled_from(sorted(model.model_fields))
    served_or_refused(app, model, data.draw(st.dictionaries(names, ANY, min_size=1, max_size=3)))


@pytest.mark.parametrize(("model", "fields"), FOUND)
def test_what_was_not_refused_in_words(app, model, fields):
    assert served_or_refused(app, model, fields) == 400


@pytest.mark.parametrize("fields", [{"rid": "0"}, {"abort_all": True}])
def test_an_abort_of_what_is_not_there_is_served(app, fields):
    assert served_or_refused(app, AbortRequest, fields) == 200


def served_or_refused(app: App, model: type[Body], fields: dict) -> int:
    path, base = BODIES[model]
    fields = base | fields
    body = {"text": "x", "sampling_params": fields} if model is NativeSampling else fields
    text = json.dumps(body).encode()
    app.engine.abort = lambda rid: None  # by a stop string
    answer = app.request("POST", path, content=text)
    assert answer.status_code in (200, 400, 413), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
    return answer.status_code


@pytest.mark.long
def test_schemathesis(model_folder, tmp_path):
    """Requests drawn from /openapi.json, for every endpoint: none is answered by a status of 500 or more.
    SCHEMATHESIS_CASES: how many for each endpoint."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install 'wave64[clients]'")
    cases = os.environ.get("SCHEMATHESIS_CASES", "20")
    with serve(model_folder, tmp_path / "log", "--context-length", "32") as server:
        flags = ["run", f"{server.url}/openapi.json", "--checks=not_a_server_error", f"--max-examples={cases}",
                 "--phases=fuzzing", "--workers=1", "--request-timeout=60", "--generation-database=none"]  # fmt: skip
        code = "from schemathesis.cli import schemathesis; schemathesis()"
        ran = subprocess.run([sys.executable, "-c", code, *flags],
                             capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
        print(ran.stdout[-3000:])
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
