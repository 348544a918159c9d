"""Between the socket and the endpoints: reading bodies, the API key, errors, clients that disconnect."""

import asyncio
import hmac
import logging
import zlib
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from wave64.serve.args import ServerArgs
from wave64.serve.http.access import OPEN_PATHS, Access
from wave64.serve.http.bodies import parse
from wave64.serve.http.metrics import Metrics
from wave64.serve.http.schemas import ApiError, Body

log = logging.getLogger("wave64")

MAX_BODY = 16 << 20  # bytes; a million token ids are half of it
BODY_S = 300.0  # for a whole body; a client that sends a byte now and then would keep its connection
SHORT_BODY = 1 << 16  # bytes that are checked at once, without the detour through a thread
MAX_LOGGED = 500  # characters of a refusal's reason in the log

T = TypeVar("T", bound=Body)
R = TypeVar("R")


class Gone(Exception):
    """The client closed its connection, so no one waits for an answer."""


async def read(request: Request, model: type[T], default: bytes = b"") -> T:
    """The request's body, checked; default: what an empty one means. Refuses one that is too long before reading it
    all, and one that does not end."""
    try:
        body = await asyncio.wait_for(_body(request), BODY_S) or default
    except asyncio.TimeoutError:
        raise ApiError(f"the body: expected all of it within {BODY_S:g} s", code="body_timeout", status=408) from None
    if len(body) <= SHORT_BODY:
        return _checked(model, body)
    return await asyncio.to_thread(_checked, model, body)


async def _body(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise _too_long(f"{length} bytes")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip", ""):
        raise ApiError(f"Content-Encoding: expected gzip or none, got {coding}", status=415)
    gunzip = _Gunzip() if "gzip" in coding else None
    body, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        body += gunzip.push(chunk, MAX_BODY + 1 - len(body)) if gunzip else chunk
        if max(len(body), received) > MAX_BODY:
            raise _too_long("more")
    if gunzip:
        gunzip.check_end()
    return bytes(body)


def _checked(model: type[T], raw: bytes) -> T:
    body = parse(model, raw)
    body.look_through()
    return body


class _Gunzip:
    """Decompress a body as it arrives, up to a limit: a few bytes can expand to gigabytes."""

    def __init__(self) -> None:
        self._unpacking = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def push(self, packed: bytes, limit: int) -> bytes:
        """The decompressed bytes of `packed`, at most `limit`. Raises ApiError if it is not gzip."""
        try:
            body = self._unpacking.decompress(packed, limit)
        except (zlib.error, EOFError) as error:
            raise ApiError(f"the body: expected gzip, as Content-Encoding says: {error}", code="invalid_gzip") from None
        if self._unpacking.unused_data:
            raise ApiError("the body: expected one gzip member, got more after its end", code="invalid_gzip")
        return body

    def check_end(self) -> None:
        """Raises ApiError unless the body was whole."""
        if not self._unpacking.eof:
            raise ApiError("the body: the gzip data ends early", code="invalid_gzip")


def _too_long(got: str) -> ApiError:
    return ApiError(f"the body: expected at most {MAX_BODY} bytes, got {got}", code="body_too_large", status=413)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


class EventStream(StreamingResponse):
    """Server-sent events: each item as JSON, an error that came up on the way as one, then [DONE].

    When the client goes away, `items` is closed, which aborts what it was generating.
    """

    media_type = "text/event-stream"

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._body = self._events(items)
        super().__init__(self._body, headers={"Cache-Control": "no-cache"})

    @staticmethod
    async def _events(items: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(items):
                async for item in items:
                    if "sequence_number" in item:  # of /v1/responses, whose events have names
                        yield f"event: {item['type']}\n".encode()
                    yield b"data: " + msgspec.json.encode(item) + b"\n\n"
        except ApiError as error:
            log.error("a stream ended early: %s", _printable(str(error)))
            yield b"data: " + msgspec.json.encode(error.body) + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._body):
            await super().stream_response(send)


async def unless_gone(request: Request, answer: Coroutine[Any, Any, R]) -> R:
    """Await `answer`; if the client disconnects first, cancel it and raise Gone."""
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
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                what = "the wrong one" if given else "none"
                error = ApiError(f"Authorization: expected 'Bearer ' and the API key of this server, got {what}",
                                 code="invalid_api_key", status=401)  # fmt: skip
                await _answer_error(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def install(app: FastAPI, args: ServerArgs, metrics: Metrics) -> None:
    """Every error of `app` becomes OpenAI's error object; with --api-key, every request needs it, except what a browser
    asks first for pages from --cors-allow-origins."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _answer_error(error, request.scope)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            paths = [route.path for route in app.routes if isinstance(route, Route) and len(route.path) > 1]
            near = next((known for known in paths if known.endswith(path) or path.endswith(known)), None)
            hint = f"; did you mean {near}?" if near else ""  # a base URL without its /v1, or with two
            missing = ApiError(f"{path}: no such endpoint{hint}", code="unknown_url", status=404)
            return _answer_error(missing, request.scope)
        allowed = Headers(error.headers).get("allow")
        message = f"{path}: method {request.method} not allowed, expected {allowed}"
        answer = ApiError(message if allowed else str(error.detail), status=error.status_code)
        return _answer_error(answer, request.scope, error.headers)

    async def gone(request: Request, _: Exception) -> Response:
        log.debug("%s: the client went away", request.url.path)
        return Response(status_code=499)

    async def defect(request: Request, error: Exception) -> Response:
        failed = ApiError(f"the server failed: {type(error).__name__}: {error}", status=500)
        return _answer_error(failed, request.scope)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Gone, gone)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, defect)
    if args.api_key is not None:
        app.add_middleware(ApiKey, key=args.api_key)
    if args.cors_allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=args.cors_allow_origins, allow_methods=["*"],
                           allow_headers=["*"], expose_headers=["x-request-id"])  # fmt: skip
    app.add_middleware(Access, metrics=metrics, logs_requests=args.log_requests)


def _answer_error(error: ApiError, scope: Scope, headers: Any = None) -> Response:
    """The error as an answer, and as a line of the log: operators are asked why."""
    level = logging.ERROR if error.status >= 500 else logging.INFO
    log.log(level, "%s %s: %d: %s", scope["method"], _printable(scope["path"]), error.status, _printable(str(error)))
    extra = {"Connection": "close"} if error.status in (408, 413) else {}  # the rest of the body is not read
    extra |= {"Retry-After": "1"} if error.status == 429 else {}
    return json_response(error.body, error.status, {**(headers or {}), **extra})


def _printable(text: str) -> str:
    """On one line of bounded length, whatever a client sent."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return line if len(line) <= MAX_LOGGED else line[: MAX_LOGGED - 3] + "..."
