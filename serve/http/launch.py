"""Start and end of the server: `python -m wave64.launch_server`.

This is the api process: it claims the port, starts the engine process, and speaks HTTP while the engine computes. It
imports no torch: what it knows of the model comes in `Ready`. It ends with status 0 at SIGTERM, at Ctrl-C and when its
terminal closes, and with status 1 and one line on stderr when something is wrong. A second signal ends it at once, with
status 1, whatever runs.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from wave64.serve.args import ArgsError, ServerArgs, without_effect
from wave64.serve.http.app import create_app
from wave64.serve.http.generation import Generator
from wave64.serve.http.replicas import engines
from wave64.serve.http.schemas import ApiError
from wave64.serve.http.tokenizer import Tokenizer, TokenizerError
from wave64.serve.logs import close_stdout, configure, say
from wave64.serve.model_path import BUILT_IN, TOKENIZER_FILES, resolve_model_path
from wave64.serve.node import Torchrun, rank_infos, run_node

log = logging.getLogger("wave64")

T = TypeVar("T")

HEAD_S = 60.0  # for a connection's first request, and for the head of any
GRACE_S = 5  # for running requests after the server received a signal to end


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends the server. Returns the exit status."""
    torchrun = Torchrun.from_environment()
    argv = sys.argv[1:] if argv is None else argv
    args = ServerArgs.from_cli([*(torchrun.flags() if torchrun else ()), *argv])
    configure(args.log_level, args.log_format)
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.root.level))
    logging.getLogger("wave64.access").setLevel((args.log_level_http or args.log_level).upper())
    try:
        if torchrun is not None:
            torchrun.check(args)
            if torchrun.rank:
                return run_node(args, [torchrun.info()])
        elif args.node_rank:
            return run_node(args, rank_infos(args))
    except ArgsError as error:
        print(f"wave64.launch_server: error: {error}", file=sys.stderr)
        return 1
    for number in _ends():
        signal.signal(number, signal.default_int_handler)  # until there is an event loop, which takes them over
    try:
        listener = listen(args.host, args.port)
        for line in without_effect(argv):
            log.info(line)
        folder = resolve_model_path(args.model_path, args.revision)
        return run_loop(_serve(args, listener, folder, torchrun.run if torchrun else None))
    except KeyboardInterrupt:
        return 0
    except (ArgsError, TokenizerError, EngineEnded) as error:
        print(f"wave64.launch_server: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        close_stdout()


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, on uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _ends() -> list[signal.Signals]:
    """The signals that end the server. SIGHUP stays ignored under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (not ignored)


class EngineEnded(RuntimeError):
    """The engine could not start, or died."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Claimed first of all, so that a port in use is known before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ArgsError(f"--host: {host}: {error.strerror}") from None
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: listens to IPv4, too
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ArgsError(f"--port: cannot listen on {host}:{port}: {why}; choose another port") from None


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are _serve's; uvicorn would raise them again at the end, and the exit status would be theirs


async def _serve(args: ServerArgs, listener: socket.socket, folder: Path, torchrun: str | None) -> int:
    told_to_end = asyncio.Event()
    client = engines(replace(args, model_path=str(folder)), torchrun)
    generator = None

    def end() -> None:
        if told_to_end.is_set():
            log.warning("told to end again: ending at once")
            client.kill()
            os._exit(1)
        told_to_end.set()

    for number in _ends():
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        await client.start()
        engine = asyncio.create_task(client.run())
        tokenizer_folder = folder
        if args.tokenizer_path:
            tokenizer_folder = resolve_model_path(args.tokenizer_path, args.revision, TOKENIZER_FILES)
        tokenizer = await asyncio.to_thread(_tokenizer, tokenizer_folder, args.chat_template)
        generator = Generator(args, client, tokenizer, _openable(args.model_path, folder),
                              _openable(args.tokenizer_path or args.model_path, tokenizer_folder))  # fmt: skip
        server = _Server(http_config(args, create_app(generator)))
        serving = asyncio.create_task(server.serve([listener]))
        announcing = asyncio.create_task(_announce(generator))
        ending = asyncio.create_task(told_to_end.wait())
        try:
            await asyncio.wait({engine, serving, ending, announcing}, return_when=asyncio.FIRST_COMPLETED)
            if announcing.done():
                announcing.result()
                await asyncio.wait({engine, serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                log.info("told to end; running requests have %d s to finish", GRACE_S)
                asyncio.get_running_loop().call_later(GRACE_S, client.fail_all, "the server is shutting down")
            server.should_exit = True
            await serving
        finally:
            announcing.cancel()
            ending.cancel()
            await asyncio.wait({announcing})  # before what it uses is closed under it
        if engine.done():
            raise EngineEnded(engine.result())
        engine.cancel()
        return 0
    finally:
        if generator is not None:
            await generator.close()
        await client.stop()


def closes_slow_heads(protocol: Any) -> Any:
    """uvicorn's protocol, but connections are closed whose client sends nothing, or a head that does not end. uvicorn
    would keep them for ever: only for another request, after an answer, it waits for a limited time. And a client that
    speaks HTTP/1.0 gets no chunks, which it does not know: h11 ends its answer with the connection."""

    class Protocol(protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            asyncio.get_running_loop().call_later(HEAD_S, self._look, transport, None)

        def data_received(self, data: bytes) -> None:
            first_line = data.partition(b"\r\n")[0]
            if self.cycle is None and first_line.endswith(b" HTTP/1.0") and not isinstance(self, H11Protocol):
                self.connections.discard(self)
                other = closes_slow_heads(H11Protocol)(self.config, self.server_state, self.app_state, self.loop)
                other.connection_made(self.transport)
                self.transport.set_protocol(other)
                other.data_received(data)
            else:
                super().data_received(data)

        def _look(self, transport: Any, before: Any) -> None:
            """Closes the connection if it waits for a head since the last look, when `before` was answered."""
            if transport.get_protocol() is not self:
                return
            is_idle = self.cycle is None or self.cycle.response_complete
            waits = is_idle and self.timeout_keep_alive_task is None
            if waits and before is self.cycle:
                transport.close()
            if not transport.is_closing():
                asyncio.get_running_loop().call_later(HEAD_S, self._look, transport, self.cycle if waits else self)

    return Protocol


def http_config(args: ServerArgs, app: Any) -> uvicorn.Config:
    """How HTTP is spoken."""
    protocol = closes_slow_heads(AutoHTTPProtocol)
    return uvicorn.Config(app, http=protocol, log_config=None, lifespan="off", timeout_graceful_shutdown=GRACE_S + 2,
                          timeout_keep_alive=args.timeout_keep_alive, access_log=False, ssl_keyfile=args.ssl_keyfile,
                          ssl_certfile=args.ssl_certfile, ssl_keyfile_password=args.ssl_keyfile_password,
                          ssl_ca_certs=args.ssl_ca_certs or None,
                          ssl_cert_reqs=ssl.CERT_REQUIRED if args.ssl_ca_certs else ssl.CERT_NONE)  # fmt: skip


def _tokenizer(folder: Path, chat_template: str | None) -> Tokenizer:
    made = Tokenizer(folder, chat_template)
    _ = made.end_ids  # which takes a while the first time
    return made


def _openable(name: str, folder: Path) -> str:
    """A name that a client's transformers can open: a hub name as it is, else the folder."""
    is_hub_name = name not in BUILT_IN and not Path(name).expanduser().is_dir()
    return name if is_hub_name else str(folder.resolve())


async def _announce(generator: Generator) -> None:
    """Wait for the engine, warm it up, and say that requests are welcome."""
    await generator.client.is_ready.wait()
    ready, args = generator.ready, generator.args
    log.info("%s on %s in %s: context of %d tokens, KV pool of %d", args.model_name, ready.device, ready.dtype,
             ready.context_length, ready.max_total_num_tokens)  # fmt: skip
    if not args.skip_server_warmup:
        try:
            await generator.warm_up()
        except ApiError as error:
            raise EngineEnded(f"the warm-up request failed: {error}") from None
    gc.collect()
    gc.freeze()  # a collection would look at all that was imported, and hold up every stream for that long
    generator.is_serving = True
    log.info("listening on http%s://%s:%d", "s" if args.ssl_certfile else "", args.host, args.port)
    say("The server is fired up and ready to roll!")
