"""`with wave64.profile("out"):` a trace of what runs inside, by torch's profiler or by RPD, with ranges named after
operators and the modules of a model.

torch's profiler writes out.trace.json.gz, for Perfetto and chrome://tracing. RPD, AMD's rocmProfileData, writes
out.rpd, which `python -m wave64 rpd2trace` and `rpd top` read; its Python package, rpdTracerControl, has to be there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from wave64 import backends
from wave64.op import NotSupported

KINDS = ("torch", "rpd")
ACTIVITIES = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}
DOMAIN = "wave64"  # of RPD's ranges


class Recording(Protocol):
    """What profilers have in common. Files are there once stop() has returned."""

    path: Path

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def range(self, name: str) -> contextlib.AbstractContextManager: ...


class TorchRecording:
    """Operators are named by torch, which calls them by their registered names."""

    def __init__(self, path: Path, activities: tuple[str, ...], with_stack: bool, record_shapes: bool):
        self.path = path
        kinds = [ACTIVITIES[each] for each in activities]
        self._profiler = torch.profiler.profile(activities=kinds, with_stack=with_stack, record_shapes=record_shapes,
                                                acc_events=True)  # of the one cycle: torch 2.11 warns without it

    def start(self) -> None:
        self._profiler.start()

    def stop(self) -> None:
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.path))

    def range(self, name: str) -> contextlib.AbstractContextManager:
        return torch.profiler.record_function(name)


class RpdRecording:
    """Operators are ranges, named where they are called."""

    def __init__(self, path: Path):
        self.path = path
        control = rpd_control()
        control.setFilename(name=str(path), append=False)
        self._control = control()
        self._ranges = contextlib.ExitStack()

    def start(self) -> None:
        self._control.start()
        self._ranges.enter_context(backends.around(self._named))

    def stop(self) -> None:
        self._ranges.close()
        self._control.stop()
        self._control.flush()

    def _named(self, op: str, run: Callable) -> Callable:
        @functools.wraps(run)
        def named(*args, **kwargs):
            with self.range(op):
                return run(*args, **kwargs)
        return named

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        self._control.rangePush(DOMAIN, name, "")
        try:
            yield
        finally:
            self._control.rangePop()


def rpd_control() -> Any:
    """RPD's class that starts and stops its tracer. Raises NotSupported where it is not installed, or has not what is
    called here."""
    try:
        control = importlib.import_module("rpdTracerControl").rpdTracerControl
    except (ImportError, OSError, AttributeError) as error:
        raise NotSupported(f"profile: kind: rpd needs the package rpdTracerControl, of ROCm's rocmProfileData "
                           f"({type(error).__name__}: {error}); kind=\"torch\" needs none") from None
    wanted = ("setFilename", "start", "stop", "flush", "rangePush", "rangePop")
    if missing := [name for name in wanted if not hasattr(control, name)]:
        raise NotSupported(f"profile: kind: this rpdTracerControl has no {', '.join(missing)}; another version of "
                           "rocmProfileData has")
    return control


def recording(path: str | Path, kind: str = "torch", *, activities: tuple[str, ...] | None = None,
              with_stack: bool = False, record_shapes: bool = False) -> Recording:
    """What records to a file whose name is `path` and the kind's own ending, in a folder that is made.

    activities  of torch's profiler: "CPU", "GPU"; None: what there is
    raises      NotSupported for a kind that is unknown or cannot be had here, and while torch records already, whose
                second profile would end the process
    """
    if kind not in KINDS:
        raise NotSupported(f"profile: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "rpd":
        return RpdRecording(path if path.suffix == ".rpd" else path.with_name(f"{path.name}.rpd"))
    if torch.autograd.profiler._is_profiler_enabled:
        raise NotSupported("profile: expected no profile that runs already, got one of torch's; end it first")
    if activities is None:
        activities = ("CPU", "GPU") if torch.cuda.is_available() else ("CPU",)
    path = path if path.name.endswith((".json", ".json.gz")) else path.with_name(f"{path.name}.trace.json.gz")
    return TorchRecording(path, activities, with_stack, record_shapes)


@contextlib.contextmanager
def naming(model: nn.Module, make: Callable[[str], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Inside, each call of a module of the model is in a range of its name: model.layers.3.mlp. A replayed graph calls
    none."""
    hooks, open_ranges = [], []

    def enter(name: str) -> Callable:
        def before(module, args):
            entered = make(name)
            entered.__enter__()
            open_ranges.append(entered)
        return before

    def leave(module, args, result):
        open_ranges.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name or type(model).__name__)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def profile(path: str | Path, kind: str = "torch", *, model: nn.Module | None = None,
            activities: tuple[str, ...] | None = None, with_stack: bool = False,
            record_shapes: bool = False) -> Iterator[Path]:
    """Record what runs in the block; gives the file that is there once the block has ended.

    path   of the file; ".trace.json.gz", or ".rpd", is added where it ends otherwise
    kind   "torch": torch's profiler, everywhere; "rpd": ROCm's rocmProfileData, where it is installed
    model  whose modules name ranges, too
    raises NotSupported for a kind that is unknown or cannot be had here, or while torch records already, before
           anything runs
    """
    made = recording(path, kind, activities=activities, with_stack=with_stack, record_shapes=record_shapes)
    with contextlib.ExitStack() as stack:
        made.start()
        stack.callback(made.stop)
        if model is not None:
            stack.enter_context(naming(model, made.range))
        yield made.path
