"""Commands of the documents are run as they stand there (tier `long`), or have a reason why not; servers answer."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_commands import ROOT
from docs_run import REASONS, documented, reason
from test_rpd import CALLS, save_rpd

#: Ends that a command may have: the doctor's where something fails on this machine.
STATUS = {"doctor": {0, 1}}
RUN = [command for command in documented() if reason(command) is None]
SERVERS = [command for command in RUN if "launch_server" in command]
ASKED = [command for command in RUN if command.startswith("curl ")]
SECONDS = 900


def words(command: str) -> tuple[list[str], dict[str, str]]:
    """What is started, and its environment: without the tests' own choice that Triton's kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = shlex.split(command)
    while re.fullmatch(r"\w+=.*", given[0]):
        name, _, environment[name] = given.pop(0).partition("=")
    given = [str(ROOT / word) if "/" in word and (ROOT / word).exists() else word for word in given]
    if given[0] in ("python", "python3"):
        given[0] = sys.executable
    return [str(ROOT / word) if word == "setup_rocm.py" else word for word in given], environment


@contextlib.contextmanager
def served(command: str, folder: Path) -> Iterator[int]:
    """The port of a server that was started so, once it says that it is well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given, environment = words(re.sub(r" --port \d+", "", command))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*given, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        until, well, health = time.monotonic() + SECONDS, False, f"http://127.0.0.1:{port}/health"
        while not well and time.monotonic() < until:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5) as answer:
                well = answer.status == 200
            time.sleep(0.2)
        assert well, (folder / "log").read_text()[-3000:]
        yield port
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15)


def ask(port: int) -> str:
    body = {"model": "any", "prompt": "Four score and", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]["text"]


def test_every_command_is_run_or_has_a_reason():
    every = documented()
    assert len(RUN) > 40
    assert len(SERVERS) > 5
    assert {*RUN} < {*every}
    unused = [pattern for pattern in REASONS if not any(re.search(pattern, command) for command in every)]
    assert unused == []


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in RUN if command not in (*SERVERS, *ASKED)])
def test_a_command_does_what_it_is_said_to(command, tmp_path):
    for name, calls in (("profile", CALLS), ("before", CALLS), ("after", CALLS[1:])):
        save_rpd(tmp_path / f"{name}.rpd", calls=calls)
    given, environment = words(command)
    done = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    allowed = next((those for word, those in STATUS.items() if word in command), {0})
    assert done.returncode in allowed, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("command", SERVERS)
def test_a_server_answers(command, tmp_path):
    with served(command, tmp_path) as port:
        assert ask(port).strip()
        for line in ASKED if "--profile-dir" in command else ():
            asked = shlex.split(line.replace("localhost:30000", f"127.0.0.1:{port}"))
            done = subprocess.run([*asked, "--fail-with-body", "-s"], capture_output=True, text=True, timeout=SECONDS)
            assert done.returncode == 0, done.stdout
