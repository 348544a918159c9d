"""A model in a program of one's own, without a server: what /generate answers, by SGLang's names.

    with wave64.Engine(model_path="demo-llama") as engine:
        print(engine.generate("Four score and", {"max_new_tokens": 40, "temperature": 0})["text"])

The engine is a process, as behind a server; a thread here talks to it.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import ValidationError

from wave64.serve.args import ServerArgs
from wave64.serve.http.bodies import in_words
from wave64.serve.http.generation import Generator
from wave64.serve.http.native import Generate
from wave64.serve.http.replicas import engines
from wave64.serve.http.schemas import ApiError, GenerateRequest
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.model_path import TOKENIZER_FILES, resolve_model_path

T = TypeVar("T")
Json = dict[str, Any]


class Engine:
    """A model that generates. Settings are the server's flags by their names in Python: tp_size=2 is --tp-size 2."""

    def __init__(self, **settings: Any) -> None:
        """Returns when the model is there. Raises ArgsError for a bad setting, RuntimeError with the engine's reason
        when it cannot start."""
        self._args = ServerArgs.from_names(settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wave64", daemon=True)
        self._thread.start()
        self._generator: Generator | None = None
        folder = resolve_model_path(self._args.model_path, self._args.revision)
        self._client = engines(replace(self._args, model_path=str(folder)))
        atexit.register(self.shutdown)
        try:
            self._submit(self._start(str(folder))).result()
        except BaseException:
            self.shutdown()
            raise

    async def _start(self, folder: str) -> None:
        args = self._args
        await self._client.start()
        self._running = asyncio.create_task(self._client.run())
        where = resolve_model_path(args.tokenizer_path or folder, args.revision, TOKENIZER_FILES)
        tokenizer = await asyncio.to_thread(Tokenizer, where, args.chat_template)
        ready = asyncio.create_task(self._client.is_ready.wait())
        await asyncio.wait({self._running, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._running.done():
            raise RuntimeError(self._running.result())
        self._generator = Generator(args, self._client, tokenizer)
        await self._generator.warm_up()

    def generate(self, prompt: str | list[str] | None = None, sampling_params: Json | list[Json] | None = None,
                 input_ids: list[int] | list[list[int]] | None = None, stream: bool = False,
                 **fields: Any) -> Any:  # fmt: skip
        """What /generate answers: an object, or a list for several prompts; with `stream`, an iterator of objects, each
        with all of the text so far.

        fields  further ones of /generate, such as return_logprob, top_logprobs_num, rid
        raises  ValueError for a request that cannot be served, RuntimeError when the engine fails
        """
        found = self._iterate(self._results(self._job(prompt, sampling_params, input_ids, fields), stream))
        if stream:
            return found
        (answer,) = found
        return answer

    async def async_generate(self, prompt: str | list[str] | None = None,
                             sampling_params: Json | list[Json] | None = None,
                             input_ids: list[int] | list[list[int]] | None = None, stream: bool = False,
                             **fields: Any) -> Any:  # fmt: skip
        """As generate(), awaited; with `stream`, the iterator is asynchronous. Cancelling it aborts the request."""
        found = self._aiterate(self._results(self._job(prompt, sampling_params, input_ids, fields), stream))
        if stream:
            return found
        (answer,) = [each async for each in found]
        return answer

    def flush_cache(self) -> bool:
        """Empty the prefix cache; False while requests run."""
        return self._wait(self._client.flush_cache())

    def shutdown(self) -> None:
        """End the engine's process. What runs is given up."""
        atexit.unregister(self.shutdown)
        if self._thread.is_alive():
            self._submit(self._stop()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    async def _stop(self) -> None:
        if self._generator is not None:
            await self._generator.close()
        await self._client.stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _job(self, prompt: Any, sampling_params: Any, input_ids: Any, fields: Json) -> Generate:
        if self._generator is None or not self._thread.is_alive():
            raise RuntimeError("the engine was shut down")
        given = {"text": prompt, "sampling_params": sampling_params, "input_ids": input_ids, **fields}
        try:
            body = GenerateRequest.model_validate(given)
            body.look_through()
        except ValidationError as error:
            raise _for_callers(in_words(error)) from None
        except ApiError as error:
            raise _for_callers(error) from None
        return Generate(body, self._generator)

    @staticmethod
    async def _results(job: Generate, stream: bool) -> AsyncGenerator[Any, None]:
        """What the job answers: in parts, or all of it at once."""
        await job.prepare()
        if stream:
            async with aclosing(job.stream()) as items:
                async for item in items:
                    yield item
        else:
            yield await job.answer()

    def _iterate(self, items: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while (item := self._wait(anext(items, None))) is not None:
                yield item
        finally:
            self._wait(items.aclose())

    async def _aiterate(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        try:
            while (item := await asyncio.wrap_future(self._submit(anext(items, None)))) is not None:
                yield item
        except ApiError as error:
            raise _for_callers(error) from None
        finally:
            await asyncio.wrap_future(self._submit(items.aclose()))

    def _submit(self, work: Any) -> Future[Any]:
        async def run() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(work if asyncio.iscoroutine(work) else run(), self._loop)

    def _wait(self, work: Coroutine[Any, Any, T] | Any) -> T:
        try:
            return self._submit(work).result()
        except ApiError as error:
            raise _for_callers(error) from None


def _for_callers(error: ApiError) -> Exception:
    return ValueError(str(error)) if error.status < 500 else RuntimeError(str(error))
