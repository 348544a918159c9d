"""A step that does not end, because a kernel or a collective waits for ever: the stacks of all threads are written to
the log, and the process ends with words instead of keeping its clients waiting.

    with Watchdog(300.0, expire).watching(): ...     # around a step; expire(seconds) is called from another thread

Time in which the thread compiles a Triton kernel does not count: a first step may compile for minutes.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

CHECK_S = 1.0
COMPILERS = ("triton.compiler", "triton.runtime.build")  # modules whose frames mean that a kernel is being compiled


def dump_stacks_on_signal() -> None:
    """SIGUSR1 writes the stacks of all threads to stderr: so a rank says where it is, and so may a person ask it."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


class Watchdog:
    """Watches the thread that makes it, by a thread of its own. timeout_s: how long a step may take."""

    def __init__(self, timeout_s: float, expire: Callable[[float], object], check_s: float = CHECK_S) -> None:
        self._timeout, self._expire, self._check = timeout_s, expire, check_s
        self._watched = threading.get_ident()
        self._began: float | None = None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def _watch(self) -> None:
        step, counted, last = None, 0.0, time.monotonic()
        while True:
            time.sleep(self._check)
            now, began = time.monotonic(), self._began
            if began != step:
                step, counted = began, 0.0
                last = began or now
            if began is not None:
                if not _compiles(sys._current_frames().get(self._watched)):
                    counted += now - last
                if counted > self._timeout and self._began == began:
                    faulthandler.dump_traceback(all_threads=True)
                    self._expire(now - began)
                    return
            last = now


def _compiles(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(COMPILERS):
            return True
        frame = frame.f_back
    return False
