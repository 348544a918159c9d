"""Several engines behind one api process: `--dp-size N` without `--enable-dp-attention`.

Each request goes to the engine that works on the fewest. An engine that is lost ends the server, as a single one does:
behind a router other servers go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partialmethod
from typing import Any

import msgspec

from wave64.serve.args import ServerArgs
from wave64.serve.http.engine_client import EngineClient
from wave64.serve.messages import Output, Ready, Request, StartProfile, Statistics, StopProfile


def engines(args: ServerArgs, torchrun: str | None = None) -> EngineClient | Replicas:
    """One engine, or several, according to the flags."""
    if args.replicas == 1:
        return EngineClient(args, torchrun)
    seed = args.random_seed
    return Replicas([
        EngineClient(replace(args, base_gpu_id=args.base_gpu_id + i * args.tp_size,
                             random_seed=None if seed is None else seed + i))
        for i in range(args.replicas)
    ])  # fmt: skip


class Replicas:
    """Several engines with the interface of EngineClient."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self._clients = clients
        self.is_ready = asyncio.Event()
        self.lost: str | None = None

    @property
    def ready(self) -> Ready | None:
        """What every engine can serve."""
        said = [client.ready for client in self._clients if client.ready is not None]
        if len(said) < len(self._clients):
            return None
        return min(said, key=lambda ready: ready.max_total_num_tokens)

    @property
    def statistics(self) -> Statistics | None:
        """Added up."""
        said = [msgspec.structs.astuple(client.statistics) for client in self._clients if client.statistics]
        return Statistics(*map(sum, zip(*said, strict=True))) if said else None

    @property
    def num_live(self) -> int:
        """Requests that the engines work on."""
        return sum(client.num_live for client in self._clients)

    async def start(self) -> None:
        """Start the engine processes."""
        for client in self._clients:
            await client.start()

    async def run(self) -> str:
        """Dispatch the engines' messages until one of them ends. Returns which one, and why."""
        running = [asyncio.create_task(client.run()) for client in self._clients]
        waiting = asyncio.create_task(self._wait())
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            number = next(i for i, task in enumerate(running) if task.done())
            self.lost = f"replica {number}: {running[number].result()}"
        finally:
            for task in (*running, waiting):
                task.cancel()
        self.fail_all(f"the engine is gone: {self.lost}")
        return self.lost

    async def stream(self, requests: list[Request]) -> AsyncGenerator[Output, None]:
        """As EngineClient.stream, of the engine that works on the fewest requests."""
        client = min(self._clients, key=lambda each: each.num_live)
        async with aclosing(client.stream(requests)) as outputs:
            async for output in outputs:
                yield output

    async def flush_cache(self) -> bool:
        """As EngineClient.flush_cache, of every engine; whether all did."""
        return all(await asyncio.gather(*(client.flush_cache() for client in self._clients)))

    async def profile(self, message: StartProfile | StopProfile) -> list[str]:
        """As EngineClient.profile, of every engine."""
        files = await asyncio.gather(*(client.profile(message) for client in self._clients))
        return [file for each in files for file in each]

    def to_each(self, name: str, *args: Any) -> None:
        """Call EngineClient.<name>(*args) of every engine."""
        for client in self._clients:
            getattr(client, name)(*args)

    tell, abort = partialmethod(to_each, "tell"), partialmethod(to_each, "abort")
    abort_all, expire = partialmethod(to_each, "abort_all"), partialmethod(to_each, "expire")
    fail_all, kill = partialmethod(to_each, "fail_all"), partialmethod(to_each, "kill")

    async def stop(self) -> None:
        """End the engine processes, by force those that do not end themselves."""
        await asyncio.gather(*(client.stop() for client in self._clients))

    async def _wait(self) -> None:
        for client in self._clients:
            await client.is_ready.wait()
        self.is_ready.set()
