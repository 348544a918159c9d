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
import time
from collections.abc import Callable
from dataclasses import dataclass

from wave64.serve.args import ServerArgs
from wave64.serve.engine.control import Beat, Channel, Died, Hello, Refused, Step, Welcome
from wave64.serve.engine.introduction import hello
from wave64.serve.model_path import resolve_model_path

log = logging.getLogger("wave64")

BEAT_S = 1.0
WAITING = "waiting for a step"
NO_DEVICE = "no device yet"
START_PATIENCE_S = 120.0  # importing torch holds the interpreter, for long on a cold disk
JOIN_S = 600.0  # how long ranks of other hosts may take to come
NOTE_S = 10.0  # how often the log says which have not
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankInfo:
    """Where a rank stands, and where it finds rank 0."""

    rank: int
    local_rank: int  # among those of its host: the number of its device
    control: tuple[str, int]  # host and port where rank 0 listens, or torchrun's store, which knows where
    torchrun: str | None = None  # its run, if it has started the ranks


class Status:
    """What this rank is doing, said to rank 0 every second by a thread of its own, which ends the process when rank 0
    is gone."""

    def __init__(self, watch: Channel, patience_s: float, end: Callable[[int], object]) -> None:
        self.doing, self.device = "importing torch", NO_DEVICE
        self._watch, self._patience, self._end = watch, patience_s, end
        self.starting = True
        self.read = self.size = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def say(self, doing: str, device: str | None = None) -> None:
        """What comes next. Rank 0 hears it at once."""
        self.doing, self.device, self.starting = doing, device or self.device, False
        with contextlib.suppress(OSError):  # the thread sees it, too
            self._send()

    def progress(self, read: int, size: int) -> None:
        """Bytes of weights; the thread says it."""
        self.read, self.size = read, size

    def died(self, error: str) -> None:
        """The last words."""
        with self._lock:
            self._watch.send(Died(self.device, self.doing, error))

    def _send(self) -> None:
        with self._lock:
            patience = START_PATIENCE_S if self.starting else self._patience
            self._watch.send(Beat(self.device, self.doing, patience, self.read, self.size))

    def _beat(self) -> None:
        while True:
            try:
                self._send()
            except OSError:
                break
            if select.select([self._watch], [], [], BEAT_S)[0]:  # rank 0 says nothing here: it is gone
                break
        self._end(int(self.doing != WAITING))


def follow(args: ServerArgs, info: RankInfo, end: Callable[[int], object] = os._exit) -> int:
    """Be a rank until rank 0 ends; the exit status. end: ends the process, from another thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = resolve_model_path(args.model_path, args.revision)
    try:
        where = _rank_0(info)
        steps, watch = (_open(where, hello(name, info.rank, args, folder)) for name in ("steps", "watch"))
        said = steps.receive()
    except (OSError, EOFError, ValueError) as error:  # a ValueError: what answers is no rank 0
        log.error("rank 0 does not answer at %s:%d: %s", *info.control, error)
        return 1
    if not isinstance(said, Welcome):
        log.error("%s", said.error if isinstance(said, Refused) else f"rank 0 said {said}")
        return 1
    status = Status(watch, args.rank_timeout, end)
    try:
        _serve(args, info, (said.host, said.port), steps, status)
    except EOFError:
        pass
    except Exception as error:
        log.debug("rank %d ends", info.rank, exc_info=True)
        from wave64.serve.engine.rank import one_line

        with contextlib.suppress(OSError):  # rank 0 may have ended first
            status.died(one_line(error))
        return 1
    return 0


def end_with(parent: int) -> None:
    """The kernel ends this process when `parent` does, even while it is stopped. Exits if that has happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _rank_0(info: RankInfo) -> tuple[str, int]:
    """Host and port where rank 0 listens."""
    if info.torchrun is None:
        return info.control
    from wave64 import distributed  # imports torch

    host, _, port = distributed.meet(*info.control).get(f"{info.torchrun}/wave64").decode().rpartition(":")
    return host, int(port)


def _open(where: tuple[str, int], introduction: Hello) -> Channel:
    """Hosts may be started in any order: rank 0 is waited for."""
    began = noted = time.monotonic()
    while True:
        try:
            opened = Channel.connect(*where, timeout_s=30.0)
            break
        except OSError:
            now = time.monotonic()
            if now - began > JOIN_S:
                raise
            if now - noted > NOTE_S:
                noted = now
                log.warning("waiting for rank 0 at %s:%d", *where)
            time.sleep(0.2)
    opened.send(introduction)
    return opened


def _serve(args: ServerArgs, info: RankInfo, store: tuple[str, int], steps: Channel, status: Status) -> None:
    from wave64 import distributed
    from wave64.backends import peers
    from wave64.serve.engine.rank import Rank, set_threads, surroundings, use_interface

    use_interface(steps.own_address)
    threads = set_threads(args)
    with surroundings(args, is_first=False):
        rank = Rank(args, info.rank, info.local_rank, distributed.meet(*store), status.say, status.progress)
        threads(rank.runner.weight_bytes)
        status.say(WAITING)
        number = 0
        while True:
            message = steps.receive()
            assert isinstance(message, Step)
            number += 1
            status.doing = f"step {number}"
            rank.runner.forward(*message.schedules)
            peers.check()
            status.doing = WAITING
