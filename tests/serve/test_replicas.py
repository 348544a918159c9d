"""`--dp-size 2`: two engines behind one port, by load; one that is lost ends the server with a line that says which."""

import asyncio
import os
import signal
import threading
from typing import Any

import httpx
from helpers_processes import engines
from helpers_server import READY_S, eventually, is_alive, serve

from wave64.serve.args import ServerArgs
from wave64.serve.http import replicas
from wave64.serve.http.engine_client import EngineClient
from wave64.serve.messages import Output, Request, SamplingParams, Statistics


class Fake:
    """A client whose engine answers a request when the test says so."""

    def __init__(self, name: str) -> None:
        self.name, self.live, self.go = name, 0, asyncio.Event()
        self.statistics = None if name == "c" else Statistics(1, 2, 3, 4, 5, 6, 7)
        self.ready, self.is_ready, self.aborted, self.failed = None, asyncio.Event(), [], None

    @property
    def num_live(self) -> int:
        return self.live

    async def run(self) -> str:
        await self.go.wait()
        return f"{self.name} is gone"

    async def stream(self, requests):
        self.live += 1
        try:
            await asyncio.sleep(0)
            yield Output(requests[0].rid, [ord(self.name)], "stop")
            await self.go.wait()
        finally:
            self.live -= 1

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    def fail_all(self, why: str) -> None:
        self.failed = why


def test_requests_go_where_fewest_are_and_a_loss_is_everyones():
    async def run() -> None:
        fakes: list[Any] = [Fake(name) for name in "abc"]
        made = replicas.Replicas(fakes)
        streams, answered = [], []
        for i in range(5):
            streams.append(made.stream([Request(str(i), [1], SamplingParams())]))
            answered.append(chr((await anext(streams[-1])).token_ids[0]))
        assert answered == ["a", "b", "c", "a", "b"]
        await streams[2].aclose()
        assert [fake.live for fake in fakes] == [2, 2, 0], "a stream that is closed is its engine's, too"
        assert made.num_live == 4
        made.abort("3")
        assert all(fake.aborted == ["3"] for fake in fakes)
        assert made.statistics == Statistics(2, 4, 6, 8, 10, 12, 14)
        running = asyncio.create_task(made.run())
        fakes[0].is_ready.set()
        await asyncio.sleep(0)
        assert not made.is_ready.is_set(), "all of them have to be"
        fakes[1].go.set()
        assert await running == made.lost == "replica 1: b is gone"
        assert all(fake.failed == "the engine is gone: replica 1: b is gone" for fake in fakes)
        for stream in streams:
            await stream.aclose()

    asyncio.run(run())


def test_each_has_its_devices_and_its_seed():
    made = replicas.engines(ServerArgs(tp_size=2, dp_size=3, base_gpu_id=1, random_seed=5))
    assert isinstance(made, replicas.Replicas)
    assert [(each._args.base_gpu_id, each._args.random_seed) for each in made._clients] == [(1, 5), (3, 6), (5, 7)]
    asyncio.run(made.stop())
    alone = replicas.engines(ServerArgs(tp_size=2, dp_size=2, enable_dp_attention=True))
    assert isinstance(alone, EngineClient)
    asyncio.run(alone.stop())


def test_two_engines_answer_until_one_is_killed(tmp_path):
    body = {"prompt": "Four score", "max_tokens": 20}
    with serve("demo-llama", tmp_path / "log", "--dp-size", "2", "--max-total-tokens", "2048") as server:
        pids = engines(server.process.pid)
        assert len(pids) == 2
        long = {**body, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        assert server.get("/health").json()["status"] == "ok"
        with httpx.stream("POST", server.url + "/v1/completions", json=long, timeout=60) as stream:
            next(stream.iter_lines())
            answers = []
            asked = threading.Thread(target=lambda: answers.append(server.complete(**body)))
            asked.start()
            asked.join()
            assert answers[0]["choices"][0]["text"].startswith(" and seven years ago")
            os.kill(pids[1], signal.SIGKILL)
            assert server.process.wait(READY_S) == 1
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("wave64.launch_server: error: replica 1: the engine process was ended by signal SIGKILL")
    assert eventually(lambda: not any(map(is_alive, pids)))
