"""A chat template in a process of its own, with a limit in time and memory: it is a program of somebody else's.

A template can loop for ever, and within one C call that no thread could be interrupted in; so it does not run here.
"""

import asyncio
import json
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any

from wave64.serve.http import templates
from wave64.serve.http.templates import TemplateError, frame

LIMIT_S = 10.0  # of one rendering; a usual one takes a millisecond
START_S = 60.0  # until the process is there, on a machine that is busy

# As `python FILE`, but with the server's own import path: the file's folder has modules named as others' are.
RUN = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"


def render_once(source: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """One conversation in a process of its own, for a thread that can wait. Raises TemplateError."""
    asked = frame({"source": source, "limit_s": LIMIT_S}) + frame({"messages": messages, "variables": variables})
    try:
        ended = subprocess.run(_command(), input=asked, capture_output=True, timeout=START_S)
    except subprocess.TimeoutExpired:
        raise TemplateError(f"the chat template did not end within {START_S:g} s") from None
    answers = ended.stdout
    try:
        ready = 4 + struct.unpack_from("<I", answers)[0]
        answer = json.loads(answers[ready + 4 :])
    except (struct.error, ValueError):
        raise TemplateError(f"the chat template's process ended with status {ended.returncode}") from None
    return _text_of(answer)


def _command() -> list[str]:
    return [sys.executable, "-c", RUN, json.dumps(sys.path), templates.__file__]


def _text_of(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


class TemplateProcess:
    """render(), one conversation after the other; stop() at the end. The process is started when it is needed first,
    and anew after it had to be killed."""

    def __init__(self, source: str, limit_s: float = LIMIT_S) -> None:
        self._source = source
        self._limit_s = limit_s
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The text of a conversation. Raises TemplateError when the template refuses it, does not end within the limit,
        or takes too much memory."""
        async with self._lock:
            is_done = False
            try:
                await self._start()
                request = {"messages": messages, "variables": variables}
                answer = await asyncio.wait_for(self._ask(request), self._limit_s)
                is_done = True
            except asyncio.TimeoutError:
                raise TemplateError(f"the chat template did not end within {self._limit_s:g} s") from None
            except (OSError, EOFError) as error:
                raise TemplateError(f"the chat template's process ended: {error}") from None
            finally:
                if not is_done:  # also where the client went away: no other one may get this answer
                    await self.stop()
        return _text_of(answer)

    async def start(self) -> None:
        """Start the process now, so that the first conversation need not wait for it. Raises TemplateError if that
        fails; the first conversation will try again."""
        if self._is_alive():
            return  # a conversation may be in progress, and need not be waited for
        async with self._lock:
            try:
                await self._start()
            except (asyncio.TimeoutError, OSError, EOFError) as error:
                await self.stop()
                raise TemplateError(f"the chat template's process did not start: {error!r}") from None

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _start(self) -> None:
        if self._is_alive():
            return
        self._process = await asyncio.create_subprocess_exec(
            *_command(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        await asyncio.wait_for(self._ask({"source": self._source, "limit_s": self._limit_s}), START_S)

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(frame(message))
        await process.stdin.drain()
        (length,) = struct.unpack("<I", await process.stdout.readexactly(4))
        return json.loads(await process.stdout.readexactly(length))

    async def stop(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
