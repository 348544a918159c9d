"""The application in the test's own process, over an engine that says the same whatever it is asked."""

import asyncio
import json

import httpx

from wave64.serve.args import ServerArgs
from wave64.serve.http.app import create_app
from wave64.serve.http.generation import Generator
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Output, Ready, Statistics, TokenLogprob

CONTEXT = 2048


class SameAnswer:
    """Stands in for EngineClient: every request gets `tokens`, one by one, then its `end`."""

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        self.tokens = tokens
        self.ready = Ready(CONTEXT, CONTEXT, vocab_size, "cpu", "float32", [], {})
        self.lost = None
        self.num_live = 0
        self.statistics: Statistics | None = None
        self.requests = []
        self.end = "length"

    async def stream(self, requests):
        self.requests += requests
        for request in requests:
            tokens = self.tokens[: request.params.max_new_tokens]
            prompt = None
            if request.prompt_logprobs:
                prompt = [None, *(TokenLogprob(i, -1.0) for i in request.input_ids[1:])]
            for i, token in enumerate(tokens):
                logprobs = [TokenLogprob(token, -1.0)] if request.top_logprobs >= 0 else None
                end = self.end if i == len(tokens) - 1 else None
                yield Output(request.rid, [token], end, logprobs=logprobs, prompt_logprobs=prompt if i == 0 else None)
            if not tokens:
                yield Output(request.rid, [], "length", prompt_logprobs=prompt)

    def tell(self, message) -> None:
        self.told = message

    async def profile(self, message) -> list[str]:
        self.told = message
        return []

    def abort(self, rid: str) -> None:
        raise AssertionError(f"{rid} was aborted")

    def abort_all(self, rid: str | None = None) -> None:
        """None of this engine's requests are left to abort."""


class App:
    """The application, to be asked with post() and get(), or with ask() from a coroutine."""

    def __init__(self, tokenizer: Tokenizer, answer: str = "ok", **args) -> None:
        tokens = tokenizer.encode(answer, add_special_tokens=False)
        self.engine = SameAnswer(tokens, tokenizer.vocab_size)
        self.generator = Generator(ServerArgs(**{"served_model_name": "tiny", **args}), self.engine, tokenizer)
        self.generator.is_serving = True
        self.asgi = create_app(self.generator)

    async def ask(self, method: str, path: str, **how) -> httpx.Response:
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://app", timeout=None) as http:
            return await http.request(method, path, **how)

    def request(self, method: str, path: str, **how) -> httpx.Response:
        async def once() -> httpx.Response:
            try:
                return await self.ask(method, path, **how)
            finally:
                await self.generator.close()  # its process belongs to this event loop

        return asyncio.run(once())

    def post(self, path: str, **body) -> httpx.Response:
        return self.request("POST", path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def prompt(self, messages: list[dict], **body) -> str:
        """What the engine is asked to continue for some chat messages."""
        answer = self.post("/v1/chat/completions", messages=messages, max_tokens=1, **body)
        assert answer.status_code == 200, answer.text
        return self.generator.tokenizer.decode(self.engine.requests[-1].input_ids, skip_special_tokens=False)


async def hang_up(app: App, path: str, body: dict, leave: asyncio.Event) -> int:
    """Sends a request and closes the connection at `leave`; the status that the application ends with."""
    status, sent = [], False

    async def receive() -> dict:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
             "raw_path": path.encode(), "query_string": b"", "headers": [], "scheme": "http", "server": ("app", 80),
             "client": ("c", 1), "root_path": ""}  # fmt: skip
    await app.asgi(scope, receive, send)
    return status[0]
