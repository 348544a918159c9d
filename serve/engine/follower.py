"""A rank other than 0: it builds its part of the model, then runs the forward pass of every step that rank 0 sends.

It ends when rank 0 does, whatever it is doing: a thread watches the connection, since the main thread may wait in a
collective. Nothing heavy is imported before that thread is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wave64.serve.args import ServerArgs
from wave64.serve.engine.control import Beat, Channel, Died, Refused, Step
from wave64.serve.engine.introduction import hello
from wave64.serve.model_path import resolve_model_path

log = logging.getLogger("wave64")

BEAT_S = 1.0
START_PATIENCE_S = 120.0  # importing torch holds the interpreter, for long on a cold disk
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and where it finds rank 0: its control connections and torch's store, (host, port) each."""

    rank: int
    local_rank: int  # among those of its host: the number of its device
    control: tuple[str, int]
    store: tuple[str, int]


class Status:
    """What this rank is doing, said to rank 0 every second by a thread of its own, which ends the process when rank 0
    is gone."""

    def __init__(self, watch: Channel, patience_s: float, end: Callable[[int], object]) -> None:
        self.doing, self.device = "importing torch", "no device yet"
        self._watch, self._patience, self._end = watch, patience_s, end
        self.starting = True
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def say(self, doing: str, device: str | None = None) -> None:
        """What comes next. Rank 0 hears it at once."""
        self.doing, self.device, self.starting = doing, device or self.device, False
        with contextlib.suppress(OSError):  # the thread sees it, too
            self._send()

    def died(self, error: str) -> None:
        """The last words."""
        with self._lock:
            self._watch.send(Died(self.device, self.doing, error))

    def _send(self) -> None:
        with self._lock:
            patience = START_PATIENCE_S if self.starting else self._patience
            self._watch.send(Beat(self.device, self.doing, patience))

    def _beat(self) -> None:
        while True:
            try:
                self._send()
            except OSError:
                break
            if select.select([self._watch], [], [], BEAT_S)[0]:  # rank 0 says nothing here: it is gone
                break
        self._end(1)


def follow(args: ServerArgs, place: Place, end: Callable[[int], object] = os._exit) -> int:
    """Be a rank until rank 0 ends; the exit status. end: ends the process, from another thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = resolve_model_path(args.model_path, args.revision)
    try:
        watch, steps = (_open(name, args, place, folder) for name in ("watch", "steps"))
    except OSError as error:
        log.error("rank %d: rank 0 does not listen on %s:%d: %s", place.rank, *place.control, error)
        return 1
    status = Status(watch, args.watchdog_timeout, end)
    try:
        _serve(args, place, steps, status)
    except EOFError:
        pass
    except Exception as error:
        log.debug("rank %d ends", place.rank, exc_info=True)
        from wave64.serve.engine.engine import one_line

        with contextlib.suppress(OSError):  # rank 0 may have ended first
            status.died(one_line(error))
        return 1
    return 0


def end_with(parent: int) -> None:
    """The kernel ends this process when `parent` does, even while it is stopped. Exits if that has happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _open(channel: str, args: ServerArgs, place: Place, folder: Path) -> Channel:
    opened = Channel.connect(*place.control, timeout_s=30.0)
    opened.send(hello(channel, place.rank, args, folder))
    return opened


def _serve(args: ServerArgs, place: Place, steps: Channel, status: Status) -> None:
    from wave64 import distributed
    from wave64.serve.engine.engine import Rank, emulation, set_threads

    threads = set_threads(args)
    with emulation(args):
        rank = Rank(args, place.rank, place.local_rank, distributed.meet(*place.store), status.say)
        threads(rank.runner.weight_bytes)
        status.say("waiting for a step")
        number = 0
        while True:
            message = steps.receive()
            if isinstance(message, Refused):
                raise EOFError(message.error)
            assert isinstance(message, Step)
            number += 1
            status.doing = f"step {number}"
            rank.runner.forward(*message.schedules)
            status.doing = "waiting for a step"
