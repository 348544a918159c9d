"""One HTTP/1.1 request with a body of JSON, over a connection of its own; the answer's body comes as it arrives.

asyncio alone, with httptools' parser: a thousand streams cost a client little, so that it measures the server.
"""

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

import httptools


class _Exchange(asyncio.Protocol):
    """Writes the request and gives the answer to `take`, piece by piece; `done` has the status when it has ended."""

    def __init__(self, request: bytes, take: Callable[[bytes], None]) -> None:
        self._request = request
        self._take = take
        self._parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # pyright: ignore[reportAttributeAccessIssue]: TCP's has write()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"no HTTP: {error}"))

    def on_body(self, body: bytes) -> None:
        try:
            self._take(body)
        except ValueError as error:
            self._fail(error)

    def on_message_complete(self) -> None:
        if not self.done.done():
            self.done.set_result(self._parser.get_status_code())
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection before the end of its answer"))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self._transport.close()


def _head(method: str, url: SplitResult, headers: dict[str, str], length: int) -> bytes:
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    fields = {"Host": url.netloc.rpartition("@")[2], "Content-Type": "application/json", "Content-Length": str(length),
              "Connection": "close", **headers}  # fmt: skip
    return "".join([f"{method} {path} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in fields.items()), "\r\n"]).encode()


async def exchange(method: str, address: str, body: bytes, headers: dict[str, str],
                   take: Callable[[bytes], None]) -> int:  # fmt: skip
    """The status of the answer; its body went to `take`. Raises OSError, or the ValueError that `take` raises."""
    url = urlsplit(address)
    made = _head(method, url, headers, len(body)) + body
    secure = ssl.create_default_context() if url.scheme == "https" else None
    host, port = url.hostname or "127.0.0.1", url.port or (443 if secure else 80)
    transport, protocol = await asyncio.get_running_loop().create_connection(
        lambda: _Exchange(made, take), host, port, ssl=secure)  # fmt: skip
    try:
        return await protocol.done
    finally:
        transport.close()


async def fetch(method: str, address: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """(status, body) of a request without one."""
    pieces: list[bytes] = []
    status = await exchange(method, address, b"", headers or {}, pieces.append)
    return status, b"".join(pieces)
