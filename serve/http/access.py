"""Around every request: its id, a line in the access log with what it took, and the count of answers.

A line has neither prompts nor answers; with --log-requests a second one has them.
"""

import json
import logging
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wave64.serve.http.metrics import Metrics

log = logging.getLogger("wave64.access")

OPEN_PATHS = ("/", "/health", "/health_generate", "/metrics", "/ping", "/version")  # asked without a key, and often
MAX_ID = 128  # characters of a client's own id


class Access:
    """ASGI middleware. `scope["state"]["choices"]` is where an endpoint leaves what it generated."""

    def __init__(self, app: ASGIApp, metrics: Metrics, logs_requests: bool) -> None:
        self._app, self._metrics, self._logs_requests = app, metrics, logs_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if 0 < len(given) <= MAX_ID and given.isascii() and given.isprintable() else uuid4().hex
        scope["path"] = scope["path"].rstrip("/") or "/"  # a redirect, which most routers answer, loses a proxy's https
        state = scope.setdefault("state", {})
        state["choices"] = []
        began, status = time.perf_counter(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.answered(status)
            if scope["path"] not in OPEN_PATHS:
                self._note(scope, name, status, time.perf_counter() - began)
            if self._logs_requests:
                for choice in state["choices"]:
                    said = choice.described()
                    log.info("id %s: %s", name, json.dumps(said),
                             extra={"fields": {"id": name, **said}})  # fmt: skip

    @staticmethod
    def _note(scope: Scope, name: str, status: int, seconds: float) -> None:
        choices = scope["state"]["choices"]
        prompt = sum(len(choice.prompt_ids) for choice in choices)
        generated = sum(len(choice.all.token_ids) for choice in choices)
        path = "".join(c if c.isprintable() else "\ufffd" for c in scope["path"])
        host, port = scope.get("client") or ("-", 0)
        log.info('%s:%d - "%s %s HTTP/%s" %d in %.3f s, %d prompt and %d generated tokens, id %s', host, port,
                 scope["method"], path, scope["http_version"], status, seconds, prompt, generated, name,
                 extra={"fields": {"client": f"{host}:{port}", "method": scope["method"], "path": path, "id": name,
                                   "status": status, "seconds": round(seconds, 6), "prompt_tokens": prompt,
                                   "generated_tokens": generated}})  # fmt: skip
