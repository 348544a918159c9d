"""What the engine's process does while it serves, recorded by torch's profiler or RPD: traces for Perfetto."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from wave64.op import NotSupported
from wave64.serve.messages import Profiled, StartProfile
from wave64.tools.profile import Recording, recording


class Profiler:
    """One trace at a time, of this process: rank 0. Every method is called from the thread that runs the steps."""

    def __init__(self) -> None:
        self._running: Recording | None = None
        self._asked = StartProfile("")
        self._steps = 0  # since the start

    def start(self, asked: StartProfile) -> Profiled:
        """Record from here on, until stop() or for `asked.num_steps` steps."""
        if self._running is not None:
            return Profiled("a profile is on its way; stop it first")
        kind = "rpd" if "RPD" in asked.activities else "torch"
        kinds = tuple(each for each in asked.activities if each == "CPU" or each == "GPU" and torch.cuda.is_available())
        if kind == "torch" and not kinds:
            return Profiled("activities: expected CPU, as this engine uses no GPU, got GPU")
        try:
            made = recording(Path(asked.folder) / f"{time.time_ns()}-TP-0", kind, activities=kinds,
                             with_stack=asked.with_stack, record_shapes=asked.record_shapes)  # fmt: skip
        except OSError as error:
            return Profiled(f"{asked.folder}: {error.strerror}")
        except NotSupported as error:
            return Profiled(str(error))
        self._asked, self._steps, self._running = asked, 0, made
        made.start()
        return Profiled(None)

    def step(self) -> None:
        """A step has ended."""
        self._steps += 1
        if self._running is not None and self._steps == self._asked.num_steps:
            self.stop()

    def stop(self) -> Profiled:
        """Write the trace."""
        if self._running is None:
            return Profiled("no profile is on its way; start one first")
        running, self._running = self._running, None
        try:
            running.stop()
        except (OSError, RuntimeError) as error:
            return Profiled(f"{running.path}: {error}")
        return Profiled(None, str(running.path))
