"""What stands between the socket and the endpoints: reading bodies, the API key, errors, clients that go away."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from wave64.serve.protocol import ApiError, parse

log = logging.getLogger("wave64")

MAX_BODY = 16 << 20  # bytes; a million token ids are half of it
OPEN_PATHS = ("/health", "/health_generate")  # asked by load balancers, which have no key

T = TypeVar("T", bound=BaseModel)
R = TypeVar("R")


class Gone(Exception):
    """The client closed its connection, so nobody waits for an answer."""


async def read(request: Request, model: type[T]) -> T:
    """The request's body, checked. Refuses one that is too long before reading it all."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise _too_long(f"{length} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise _too_long("more")
    return parse(model, bytes(body))


def _too_long(got: str) -> ApiError:
    return ApiError(f"the body: expected at most {MAX_BODY} bytes, got {got}", code="body_too_large", status=413)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


class EventStream(StreamingResponse):
    """Server-sent events: each item as JSON, an error that came up on the way as one, then [DONE].

    When the client goes away, `items` is closed, which aborts what it was generating.
    """

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[Any]) -> None:
        super().__init__(self._events(items), headers={"Cache-Control": "no-cache"})

    @staticmethod
    async def _events(items: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        try:
            async with aclosing(items):
                async for item in items:
                    yield b"data: " + msgspec.json.encode(item) + b"\n\n"
        except ApiError as error:
            yield b"data: " + msgspec.json.encode(error.body) + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


async def unless_gone(request: Request, answer: Coroutine[Any, Any, R]) -> R:
    """Await `answer`, or cancel it when the client goes away first, and raise Gone."""
    task = asyncio.create_task(answer)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ApiKey:
    """ASGI middleware: refuses requests that do not carry the key as a bearer token."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                what = "the wrong one" if given else "none"
                error = ApiError(f"Authorization: expected 'Bearer ' and the API key of this server, got {what}",
                                 code="invalid_api_key", status=401)  # fmt: skip
                await _answer_error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def install(app: FastAPI, api_key: str | None) -> None:
    """Every error of `app` becomes OpenAI's error object; with an `api_key`, every request needs it."""

    async def api_error(_: Request, error: ApiError) -> Response:
        return _answer_error(error)

    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return _answer_error(ApiError(f"{path}: no such endpoint", code="unknown_url", status=404))
        allowed = Headers(error.headers).get("allow")
        message = f"{path}: method {request.method} not allowed, expected {allowed}"
        answer = ApiError(message if allowed else str(error.detail), status=error.status_code)
        return _answer_error(answer, error.headers)

    async def gone(request: Request, _: Exception) -> Response:
        log.debug("%s: the client went away", request.url.path)
        return Response(status_code=499)

    async def defect(_: Request, error: Exception) -> Response:
        return _answer_error(ApiError(f"the server failed: {type(error).__name__}: {error}", status=500))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Gone, gone)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, defect)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)


def _answer_error(error: ApiError, headers: Any = None) -> Response:
    close = {"Connection": "close"} if error.status == 413 else {}  # what is left of the body is not read
    return json_response(error.body, error.status, {**(headers or {}), **close})
