"""Requests of all kinds at once, for a while: answers stay what they are alone, and nothing is left behind."""

import os
import random
import threading
import time
from pathlib import Path

import httpx
import pytest
from helpers_server import POOL, eventually, serve

CLIENTS = 6
TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "additionalProperties": False, "required": ["a"], "properties": {"a": {"enum": ["x", "y"]}}}}}
PROMPTS = ["It is", "Four score and seven", "We", "the people, " * 40]


def left_open(pid: int) -> tuple[int, int]:
    """Threads and descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


def resident_mb(pid: int) -> float:
    """Memory of a process that is in RAM, in MB."""
    return int(next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if line.startswith("VmRSS")).split()[1]) / 1024


class Client(threading.Thread):
    """Sends one drawn request after another until `until`, and keeps what it saw go wrong."""

    def __init__(self, url: str, seed: int, expected: dict[str, str], until: float):
        super().__init__()
        self.http = httpx.Client(base_url=url, timeout=120)
        self.random, self.expected, self.until = random.Random(seed), expected, until
        self.count, self.wrong = 0, []

    def run(self) -> None:
        kinds = [self.greedy, self.streamed, self.left, self.sampled, self.called, self.formed, self.aborted]
        with self.http:
            while time.monotonic() < self.until and not self.wrong:
                try:
                    kind = self.refused if self.random.random() < 0.1 else self.random.choice(kinds)
                    kind(self.random.choice(PROMPTS))
                except (AssertionError, httpx.HTTPError, KeyError) as error:
                    self.wrong.append(repr(error))
                self.count += 1

    def post(self, **body) -> httpx.Response:
        return self.http.post("/v1/completions", json={"temperature": 0, "max_tokens": 16, **body})

    def greedy(self, prompt: str) -> None:
        answer = self.post(prompt=prompt)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == self.expected[prompt]

    def streamed(self, prompt: str) -> None:
        with self.http.stream("POST", "/v1/completions", json={
                "prompt": prompt, "temperature": 0, "max_tokens": 16, "stream": True}) as answer:
            assert answer.status_code == 200
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"

    def left(self, prompt: str) -> None:
        """The client goes after the first chunk of many."""
        with self.http.stream("POST", "/v1/completions", json={
                "prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": True}) as answer:
            assert next(answer.iter_lines()).startswith("data: ")

    def sampled(self, prompt: str) -> None:
        options = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "presence_penalty": 0.5, "logprobs": 2, "n": 3}
        answer = self.post(prompt=prompt, **options)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 3

    def called(self, prompt: str) -> None:
        """A tool that has to be called, streamed or not."""
        is_streamed = self.random.random() < 0.5
        answer = self.http.post("/v1/chat/completions", json={
            "messages": [{"role": "user", "content": prompt}], "tools": [TOOL], "tool_choice": "required",
            "parallel_tool_calls": False, "max_tokens": 300, "stream": is_streamed, "temperature": 0})  # fmt: skip
        assert answer.status_code == 200, answer.text
        assert '"tool_calls"' in answer.text

    def formed(self, prompt: str) -> None:
        """An answer in a prescribed form, one of a few or one that no one has asked for before."""
        number = self.random.randrange(10**9) if self.random.random() < 0.2 else self.random.randrange(5)
        answer = self.post(prompt=prompt, guided_regex=f"{number}(a|b)", max_tokens=40)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] in (f"{number}a", f"{number}b")

    def aborted(self, prompt: str) -> None:
        """By its name, while it streams."""
        rid = f"{self.random.random()}"
        with self.http.stream("POST", "/generate", json={
                "text": prompt, "rid": rid, "stream": True,
                "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}) as answer:  # fmt: skip
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert httpx.post(f"{self.http.base_url}/abort_request", json={"rid": rid}, timeout=120).status_code == 200
            last = [line for line in lines if line.startswith("data: {")][-1]
        assert '"type":"abort"' in last

    def refused(self, prompt: str) -> None:
        assert self.post(prompt=prompt, max_tokens=10**6).status_code == 400


@pytest.mark.parametrize("seconds", [3, pytest.param(300, marks=pytest.mark.long)])
def test_a_server_in_use_keeps_its_answers_and_its_memory(model_folder, tmp_path, seconds):
    log = tmp_path / "log"
    with serve(model_folder, log, "--max-total-tokens", str(POOL)) as server:
        expected = {prompt: server.complete(prompt=prompt, max_tokens=16)["choices"][0]["text"] for prompt in PROMPTS}

        def run(duration: float) -> int:
            clients = [Client(server.url, seed, expected, time.monotonic() + duration) for seed in range(CLIENTS)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert [client.wrong for client in clients if client.wrong] == []
            assert eventually(lambda: server.running == 0), "a request that was left or refused still runs"
            print(f"{sum(client.count for client in clients)} requests in {duration} s")
            return sum(client.count for client in clients)

        assert run(seconds) >= CLIENTS  # by now every path was taken, and buffers have their size
        pids = server.process.pid, server.engine_pid
        before, was_open = list(map(resident_mb, pids)), list(map(left_open, pids))
        assert run(seconds) >= CLIENTS
        after = list(map(resident_mb, pids))
        assert eventually(lambda: all(now <= then + 1 for a, b in zip(was_open, map(left_open, pids), strict=True)
                                      for then, now in zip(a, b, strict=True))), was_open
        assert eventually(lambda: server.get("/server_info").json()["statistics"]["pages_used"] == 0)
        # the whole pool must still be there: a prompt and an answer that fill it
        usage = server.complete(prompt=[5] * 1000, max_tokens=1000, ignore_eos=True)["usage"]
        assert usage["completion_tokens"] == 1000
        assert server.stop() == 0
    assert "Traceback" not in log.read_text()
    if seconds > 60:  # in a few seconds a garbage collection more or less is all the difference
        print(f"resident: {before} MB, then {after} MB")
        assert all(b < 1.05 * a for a, b in zip(before, after, strict=True)), (before, after)
