"""What the engine's process does while it serves, by torch's profiler: traces for chrome://tracing or Perfetto."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from wave64.serve.messages import Profiled, StartProfile

ACTIVITIES = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}


class Profiler:
    """One trace at a time, of this process: rank 0. Every method is called from the thread that runs the steps."""

    def __init__(self) -> None:
        self._running: profile | None = None
        self._asked = StartProfile("")
        self._steps = 0  # since the start

    def start(self, asked: StartProfile) -> Profiled:
        """Record from here on, until stop() or for `asked.num_steps` steps."""
        if self._running is not None:
            return Profiled("a profile is on its way; stop it first")
        kinds = [kind for kind in asked.activities if kind != "GPU" or torch.cuda.is_available()]
        if not kinds:
            return Profiled("activities: expected CPU, as this engine uses no GPU, got GPU")
        try:
            Path(asked.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return Profiled(f"{asked.folder}: {error.strerror}")
        self._asked, self._steps = asked, 0
        self._running = profile(activities=[ACTIVITIES[kind] for kind in kinds], with_stack=asked.with_stack,
                                record_shapes=asked.record_shapes)  # fmt: skip
        self._running.start()
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
        running.stop()
        file = Path(self._asked.folder) / f"{time.time_ns()}-TP-0.trace.json.gz"
        try:
            running.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            return Profiled(f"{file}: {error}")
        return Profiled(None, str(file))
