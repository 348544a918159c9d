"""The api process's side of the engine: it starts the engine process, sends requests, and hands outputs to who waits.

Everything runs on one event loop. A stream that is closed early, for whatever reason, aborts what it left unfinished.
Where streams are read slower than the engine adds to them, tokens of several steps become one Output: so with many
streams each token costs less, and answers do not fall behind.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import asdict
from typing import Any

import zmq
import zmq.asyncio

from wave64.serve.args import ServerArgs
from wave64.serve.http.schemas import ApiError
from wave64.serve.messages import (
    Abort,
    Alive,
    Failed,
    FlushCache,
    Flushed,
    Output,
    Profiled,
    Ready,
    Request,
    StartProfile,
    Statistics,
    StopProfile,
    ToEngine,
    Vocabulary,
    decode_to_api,
    encode,
)

log = logging.getLogger("wave64")

LAST_WORDS_S = 1.0  # how long the reason of an engine that has exited may still be on its way
LOOKS = 10  # in that time; a busy machine may let this process sleep through one of them
SILENCE_S = 0.5  # how often it is looked whether the engine still speaks
STOP_S = 1.0  # how long an engine may take to exit at SIGTERM; it has nothing to save


class Inbox:
    """The Outputs of a stream that were not taken yet, one at most for each rid, in the order in which they came."""

    def __init__(self) -> None:
        self._outputs: dict[str, Output] = {}
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None  # done when something has come

    def put(self, output: Output) -> None:
        """Add an Output, to one of the same rid that waits, if there is one. None is added behind an error."""
        if self._error is not None:
            return
        if (waiting := self._outputs.get(output.rid)) is None:
            self._outputs[output.rid] = output
        else:
            _append(waiting, output)
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End the stream with an error, once what has come is taken."""
        self._error = self._error or error
        self._wake()

    async def get(self) -> Output:
        """Wait for the next Output, and take it. Raises the error that ends the stream."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._outputs.pop(next(iter(self._outputs)))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _append(output: Output, later: Output) -> None:
    """Add what a later step gave the same request."""
    output.token_ids += later.token_ids
    if later.logprobs is not None:
        output.logprobs = (output.logprobs or []) + later.logprobs
    output.prompt_logprobs = output.prompt_logprobs or later.prompt_logprobs
    output.cached_tokens += later.cached_tokens
    output.finish_reason, output.matched_stop, output.error = later.finish_reason, later.matched_stop, later.error


class EngineClient:
    """start(), then run() for as long as the engine lives; stream() and abort() meanwhile; stop() at the end."""

    def __init__(self, args: ServerArgs, torchrun: str | None = None) -> None:
        """torchrun: its run, where it has started the other ranks."""
        self._args, self._torchrun = args, torchrun
        self.ready: Ready | None = None  # set when the engine is
        self.is_ready = asyncio.Event()
        self.statistics: Statistics | None = None  # after the engine's last step
        self.lost: str | None = None  # why there is no engine any more
        self._heard = 0.0  # when the engine last spoke
        self._doing: str | None = None  # what rank 0 of several is doing, as it reports
        self._inboxes: dict[str, Inbox] = {}  # by rid, one for all rids of a stream
        self._answers: deque[asyncio.Future[Flushed | Profiled]] = deque()  # that the engine owes, oldest first
        self._folder = tempfile.TemporaryDirectory(prefix="wave64-")
        self._context = zmq.Context()
        self._outputs = zmq.asyncio.Socket(  # pyright: ignore[reportGeneralTypeIssues]: pyzmq types `self` otherwise
            self._context, zmq.PULL)
        self._requests = self._context.socket(zmq.PUSH)  # never blocks: its queue has no bound
        for pipe in (self._outputs, self._requests):
            pipe.setsockopt(zmq.SNDHWM, 0)
            pipe.setsockopt(zmq.RCVHWM, 0)
            pipe.setsockopt(zmq.LINGER, 0)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the engine process. In a session of its own: Ctrl-C in a terminal is for the api process alone."""
        requests, outputs = (f"ipc://{self._folder.name}/{name}" for name in ("requests", "outputs"))
        self._outputs.bind(outputs)
        self._requests.connect(requests)
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "wave64.serve.engine.process", stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        settings = {"args": asdict(self._args), "requests": requests, "outputs": outputs, "parent": os.getpid(),
                    "torchrun": self._torchrun}
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.close()

    async def run(self) -> str:
        """Dispatch the engine's messages until it ends. Returns why it ended."""
        assert self._process is not None  # since start()
        receiving = asyncio.create_task(self._receive())
        exited = asyncio.create_task(self._process.wait())
        silent = asyncio.create_task(self._silence())
        try:
            await asyncio.wait({receiving, exited, silent}, return_when=asyncio.FIRST_COMPLETED)
            for _ in range(LOOKS):
                if receiving not in (await asyncio.wait({receiving}, timeout=LAST_WORDS_S / LOOKS))[1]:
                    break
            if receiving.done():
                self.lost = receiving.result()
            else:
                self.lost = silent.result() if silent.done() else _obituary(await exited)
        finally:
            for task in (receiving, exited, silent):
                task.cancel()
        self.fail_all(f"the engine is gone: {self.lost}")
        return self.lost

    async def _receive(self) -> str:
        """Read messages until there is one that says why the engine ends."""
        while True:
            message = decode_to_api(await self._outputs.recv())
            self._heard = time.monotonic()
            if isinstance(message, Alive):
                self._doing = message.doing
                continue
            if isinstance(message, Failed):
                return message.error
            if isinstance(message, Ready):
                self.ready = message
                self.is_ready.set()
                continue
            if isinstance(message, Flushed | Profiled):
                if not (answer := self._answers.popleft()).done():  # else its client has gone
                    answer.set_result(message)
                continue
            self.statistics = message.statistics or self.statistics
            for output in message.outputs:
                if inbox := self._inboxes.get(output.rid):  # else it was aborted meanwhile
                    inbox.put(output)

    async def _silence(self) -> str:
        """Wait until rank 0 of several, which says once a second that it lives, has not for too long; the reason. The
        process is ended: it may be stopped, and would take no other signal."""
        limit = self._args.rank_timeout
        while self._doing is None or time.monotonic() - self._heard < limit:
            await asyncio.sleep(SILENCE_S)
        assert self._process is not None
        self._process.kill()
        rank, _, doing = self._doing.partition(": ")
        return f"{rank} has not answered for {limit:.0f} s (--rank-timeout) while {doing}"

    async def stream(self, requests: list[Request]) -> AsyncGenerator[Output, None]:
        """The outputs of some requests as they come, until each has finished. Raises ApiError (5xx) when one cannot go
        on. Closing the iterator aborts the rest."""
        if self.lost is not None:
            raise ApiError(f"the engine is gone: {self.lost}", status=503)
        if self.ready is None:
            raise ApiError("the model is still loading; try again when GET /health answers 200", status=503)
        inbox = Inbox()
        live = {request.rid for request in requests}
        if taken := live & self._inboxes.keys() or len(live) < len(requests):
            raise ApiError(f"rid: {taken} is that of another request", "rid", "invalid_value")
        try:
            for request in requests:
                self._inboxes[request.rid] = inbox
                self._send(request)
            while live:
                output = await inbox.get()
                if output.finish_reason == "error":
                    live.discard(output.rid)
                    if output.token_ids:
                        yield Output(output.rid, output.token_ids, None, None, output.logprobs, output.prompt_logprobs)
                    raise ApiError(output.error or "the engine gave no reason", status=500)
                if output.finish_reason is not None:
                    live.discard(output.rid)
                    self._inboxes.pop(output.rid, None)
                yield output
        finally:
            for request in requests:
                if self._inboxes.pop(request.rid, None) and request.rid in live:
                    self._send(Abort(request.rid))

    def abort(self, rid: str) -> None:
        """End one request of a stream; the stream takes it as finished."""
        if inbox := self._inboxes.pop(rid, None):
            self._send(Abort(rid))
            inbox.put(Output(rid, [], "abort"))

    async def flush_cache(self) -> bool:
        """Empty the engine's prefix cache; False where requests run or wait. Raises ApiError (503) as stream()."""
        return (await self._answer(FlushCache())).done

    async def profile(self, message: StartProfile | StopProfile) -> list[str]:
        """Begin a profile of the engine, or end it; the files written. Raises ApiError."""
        answer = await self._answer(message)
        if answer.error is not None:
            raise ApiError(answer.error)
        return [answer.file] if answer.file else []

    async def _answer(self, message: FlushCache | StartProfile | StopProfile) -> Any:
        if self.lost is not None or self.ready is None:
            raise ApiError("there is no engine", status=503)
        self._answers.append(answer := asyncio.get_running_loop().create_future())
        self._send(message)
        return await answer

    def abort_all(self, rid: str | None = None) -> None:
        """End requests at once, of one name or all; their answers end with finish_reason "abort"."""
        for each in list(self._inboxes) if rid is None else [rid]:
            self.abort(each)

    def expire(self, rids: Iterable[str], why: str) -> None:
        """End the streams of some requests with an error of status 504."""
        for inbox in {self._inboxes[rid] for rid in rids if rid in self._inboxes}:
            inbox.fail(ApiError(why, code="request_timeout", status=504))

    def fail_all(self, why: str) -> None:
        """End every stream with an error of status 503."""
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(ApiError(why, status=503))
        for inbox in set(self._inboxes.values()):
            inbox.fail(ApiError(why, status=503))

    @property
    def num_live(self) -> int:
        """Requests that the engine works on."""
        return len(self._inboxes)

    def tell(self, message: Vocabulary) -> None:
        """Send a message that is not a request, before the next requests."""
        self._send(message)

    def _send(self, message: ToEngine) -> None:
        self._requests.send(encode(message))

    def kill(self) -> None:
        """End the engine process at once, with all that it started."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._folder.cleanup()

    async def stop(self) -> None:
        """End the engine process, by force if it does not end itself, and close the pipes."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            exited = asyncio.create_task(self._process.wait())
            await asyncio.wait({exited}, timeout=STOP_S)
            if not exited.done():
                self._process.kill()
            await exited
        self._outputs.close()
        self._context.destroy()
        self._folder.cleanup()


def _obituary(status: int) -> str:
    """The meaning of the exit status of an engine that sent no last message."""
    if status >= 0:
        return f"the engine process exited with status {status}; its log is above"
    name = signal.Signals(-status).name
    hint = ", which is what the kernel sends when memory runs out" if name == "SIGKILL" else ""
    return f"the engine process was ended by signal {name}{hint}"
