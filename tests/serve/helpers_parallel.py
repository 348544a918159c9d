"""Ranks in processes that stay: each runs one engine, or a rank of one, after another: torch is imported once."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from wave64.serve.messages import Output, Request


def collect(engine: Any, *requests: Request) -> dict[str, Output]:
    """Add the requests, run the engine dry, and join each one's Outputs."""
    whole: dict[str, Output] = {}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            joined = whole.setdefault(output.rid, Output(output.rid, [], logprobs=[]))
            assert joined.finish_reason is None
            joined.token_ids += output.token_ids
            joined.logprobs = (joined.logprobs or []) + (output.logprobs or [])
            assert not (joined.prompt_logprobs and output.prompt_logprobs)  # they come once
            joined.prompt_logprobs = joined.prompt_logprobs or output.prompt_logprobs
            joined.finish_reason, joined.matched_stop = output.finish_reason, output.matched_stop
            joined.error = output.error
            joined.cached_tokens += output.cached_tokens
    assert engine.scheduler.cache.num_available == engine.pool.num_pages
    return whole


class Pool:
    """`size` processes. run() makes the first so many of them the ranks of an engine."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, flags: dict[str, Any], requests: Sequence[Request]) -> tuple[dict[str, Output], Any]:
        """The outputs of an engine with these flags, and Engine's `overlap`, by rid, and its Statistics. Raises what
        building it raises."""
        size = flags.get("tp_size", 1)
        self._pipes[0].send((flags, None, requests))
        for _ in range(size - 1):
            info = self._pipes[0].recv()
            if isinstance(info, BaseException):
                raise info
            self._pipes[info.rank].send((flags, info, ()))
        outcome = self._pipes[0].recv()
        for pipe in self._pipes[1:size]:
            assert pipe.recv() == 0
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from wave64 import distributed
    from wave64.serve.args import ServerArgs
    from wave64.serve.engine.engine import Engine
    from wave64.serve.engine.follower import follow
    from wave64.serve.engine.team import Team
    from wave64.serve.model_path import resolve_model_path

    class PoolTeam(Team):
        def _start(self, info):
            pipe.send(info)

        def _end(self):
            os._exit(1)

    torch.set_num_threads(1)
    while True:
        flags, info, requests = pipe.recv()
        overlap = flags.pop("overlap", None)
        args = ServerArgs(**flags)
        if info is not None:
            pipe.send(follow(args, info, end=lambda status: None))
            distributed.leave()
            continue
        team = None
        try:
            team = PoolTeam(args, resolve_model_path(args.model_path), print) if args.tp_size > 1 else None
            engine = Engine(args, team, overlap)
            answer = collect(engine, *requests), engine.statistics()
        except Exception as error:
            answer = error
        if team is not None:
            team.close()
            distributed.leave()
        pipe.send(answer)
