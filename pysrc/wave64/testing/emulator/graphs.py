"""Streams, events and graphs of an emulated device, under the names that torch.cuda has for them.

A graph is what was recorded between the begin and the end of a capture, in order: launches, which the stand-in for
HIP's runtime hands over instead of making them, and torch's own operations, which a dispatch mode sees. A replay makes
the launches again with the same arguments, at the same addresses, and computes torch's operations again into the memory
that their results had: so it reads new inputs where the capture read old ones, as a device's graph does. What would
wait for a device, such as reading a number out of a tensor, is refused while a capture goes on. Not seen is Python that
reads a tensor's memory past torch's dispatch: numpy() and tolist().
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from wave64.op import OPS
from wave64.testing.emulator.driver import Driver

aten = torch.ops.aten
#: what only allocates: the memory of a graph stays as it is between two replays
ALLOCATIONS = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
               aten.new_empty_strided.default}
GLOBAL_MODE = 0  # hipStreamCaptureModeGlobal


class Streams:
    """What torch.cuda offers, of one emulated device."""

    def __init__(self, driver: Driver):
        self._driver, self._current = driver, 0
        self.capturing: CUDAGraph | None = None

    def Stream(self) -> "Stream":
        return Stream(self._driver, self._driver.new_stream())

    def Event(self) -> "Event":
        return Event(self._driver)

    def CUDAGraph(self) -> "CUDAGraph":
        return CUDAGraph(self._driver)

    def current_stream(self) -> "Stream":
        return Stream(self._driver, self._current)

    @property
    def current_handle(self) -> int:
        """HIP's stream that launches go to."""
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        """Launches inside go to this stream."""
        before, self._current = self._current, stream.handle
        try:
            yield
        finally:
            self._current = before

    def synchronize(self) -> None:
        self._driver("hipDeviceSynchronize")

    @contextlib.contextmanager
    def graph(self, graph: "CUDAGraph", pool: Any = None) -> Iterator[None]:
        """What is launched and computed inside is recorded in the graph. Launches are not made; torch's operations are,
        once, on whatever lies in memory."""
        side = self.Stream()
        self._driver("hipStreamBeginCapture", side.handle, GLOBAL_MODE)
        self.capturing = graph
        try:
            with self.stream(side), _Recorder(graph):
                yield
        finally:
            self.capturing = None
            graph.handle = self._driver.new_graph(side.handle)


class Collecting(Streams):
    """Of a device whose launches are collected: what would be recorded in a graph is launched."""

    @contextlib.contextmanager
    def graph(self, graph: "CUDAGraph", pool: Any = None) -> Iterator[None]:
        yield


class Stream:
    """A stream of HIP's by its handle; 0 is the default stream."""

    def __init__(self, driver: Driver, handle: int):
        self._driver, self.handle = driver, handle

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self._driver)
        event.record(other)
        self._driver("hipStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        self._driver("hipStreamSynchronize", self.handle)


class Event:
    """An event of HIP's. Launches are done when they return, so there is nothing to wait for; what HIP refuses is
    refused."""

    def __init__(self, driver: Driver):
        self._driver, self.handle = driver, driver.new_handle("hipEventCreateWithFlags", 0)

    def record(self, stream: Stream | None = None) -> None:
        self._driver("hipEventRecord", self.handle, stream.handle if stream else 0)

    def synchronize(self) -> None:
        self._driver("hipEventSynchronize", self.handle)


class CUDAGraph:
    """Recorded launches and operations of torch's; see the top of this file."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self.handle = 0
        self.nodes: list[Callable[[], None]] = []

    def pool(self) -> None:
        """Each graph has memory of its own."""

    def replay(self) -> None:
        """Make everything again, in order."""
        if not self.handle:
            raise RuntimeError("replay: expected a graph whose capture has ended, got one without")
        with torch.inference_mode():
            for node in self.nodes:
                node()


def _waits(func, args: tuple) -> bool:
    """Whether an operation reads numbers in order to know its result's shape, or is a number itself."""
    if func is aten.index.Tensor:  # by a mask; by indices the shape is theirs
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class _Recorder(TorchDispatchMode):
    """Records each operation of torch's in a graph as it is computed."""

    def __init__(self, graph: CUDAGraph):
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "wave64":
            declared = OPS[func._schema.name.removeprefix("wave64::")]
            given = declared.signature.bind(*args, **kwargs)
            given.apply_defaults()
            with self:  # its launches, and what its launcher asks of torch, are what is recorded
                return declared._kernel(*given.args)
        if _waits(func, args):
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing: it needs a number that the "
                               "device would have to be waited for")
        result = func(*args, **kwargs)
        if func.namespace == "c10d":  # torch.distributed's: its schemas do not say what it writes
            self._graph.nodes.append(lambda: pytree.tree_leaves(func(*args, **kwargs))[-1].wait())
        elif func not in ALLOCATIONS:
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [i for i, x in enumerate(pytree.tree_leaves(result))
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        if not made and not func._schema.is_mutable:
            return  # a view
        into = pytree.tree_leaves(result)

        def again() -> None:
            results = pytree.tree_leaves(func(*args, **kwargs))
            for i in made:
                into[i].copy_(results[i])

        self._graph.nodes.append(again)
