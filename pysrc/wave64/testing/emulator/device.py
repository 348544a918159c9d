"""An emulated device: every operator called inside `with wave64.emulate("gfx942"):` goes through the dispatch of that
card, backends, tuned tables, FP8 flavor and layouts of weights, through its real launchers, and executes its machine
code, HIP's as shipped and Triton's as compiled, on the emulator.

Tensors lie on the CPU. Under the hip backend is `hip/src/runtime.cpp` on the stand-in for HIP's runtime (hip/standin),
which checks launches as HIP does and hands them over; Triton's launches are taken where Triton would launch. A launch
is executed at once, or recorded where its stream captures (graphs.py). It may touch the storages of the tensors it was
given, and no other memory. What torch itself computes on a card is computed by torch on the CPU.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from torch import Tensor

from wave64 import platform
from wave64.arch import EMULATED, Arch, lookup
from wave64.backends import hip
from wave64.op import Backend, NotSupported
from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.driver import Driver
from wave64.testing.emulator.graphs import Collecting, Streams
from wave64.testing.emulator.memory import Buffer, EmulationError
from wave64.testing.emulator.run import GRANULES, SECONDS, Counts, execute, named

log = logging.getLogger("wave64")


class Meter(Protocol):
    """What watches launches while `is_counting`: `checks`, besides the usual ones, count while one is executed, which
    is slower, since the emulator's core does not know them; then `add` is called."""

    checks: tuple[type, ...]
    is_counting: bool

    def add(self, op: str, kernel: str, instructions: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Launch:
    """What `execute` takes. The tensors are kept as long as the launch is."""

    op: str  # of the HIP code object; "" for Triton's
    kernel: str
    code_object: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    lds_bytes: int
    args: bytes
    tensors: dict[str, Tensor]  # by argument
    allocations: tuple[Buffer, ...] = ()  # memory of the runtime's own that its arguments point into

    def buffers(self) -> list[Buffer]:
        """The storages of its tensors, each once, named by the arguments that point into it, and the allocations."""
        addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        storages = (tensor.untyped_storage() for tensor in self.tensors.values())
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
        return [*(Buffer(named(addresses, start, size) or "a tensor", start, size) for start, size in sizes.items()),
                *self.allocations]


@functools.cache
def driver() -> Driver:
    """The stand-in, opened as this process's HIP. Raises NotSupported where the process has another runtime, or none
    can be opened."""
    path = hip.standin()
    opened = Driver(path)
    opened.library.standin_devices(",".join(EMULATED).encode())
    serving = hip.open_standin()
    if serving != path:
        raise NotSupported(f"emulate: this process computes on {serving}, and a process has one runtime: emulate in "
                           "one that has not called an operator on a GPU")
    return opened


class Device:
    """One emulated card, while it is in use. `counts` is all that was executed on it."""

    def __init__(self, arch: str, checks: tuple[type, ...] = ALL, meter: Meter | None = None,
                 collect: Callable[[Any], None] | None = None):
        """collect: takes Triton's launches (testing/compile.py) as they are, neither compiled nor executed."""
        self.arch: Arch = lookup(arch)
        self.counts, self.meter, self._collect = Counts(), meter, collect
        self._checks = checks
        self._index = EMULATED.index(arch)  # of the stand-in's devices
        self._driver = driver()
        self.streams = Streams(self._driver) if collect is None else Collecting(self._driver)
        self._thread = threading.local()  # tensors whose addresses were asked for since the last launch
        self._op = ""  # which operator is served
        self._folder = tempfile.TemporaryDirectory(prefix="wave64-emulator-")

    @property
    def name(self) -> str:
        return f"{self.arch.name} (emulated)"

    # ---- launches of the hip backend, by runtime.cpp and the stand-in

    def _data_ptr(self, tensor: Tensor) -> int:
        self._thread.__dict__.setdefault("tensors", []).append(tensor)
        return tensor.data_ptr()

    def _stream(self, index: int) -> int:
        """Asked once for each launch of an operator, when all its arguments are known."""
        self._thread.given = self._thread.__dict__.pop("tensors", [])
        return self.streams.current_handle

    def _exchange(self, index: int) -> int:
        before = self._driver.get("hipGetDevice")
        self._driver("hipSetDevice", index)
        return before

    def _hip_launched(self, made: SimpleNamespace) -> None:
        op, path = hip_code(self.arch.name, made.code_object)
        by_address = {tensor.data_ptr(): tensor for tensor in self._thread.given}
        tensors = {name: by_address[address] for name, address in pointers(op, made.args).items()
                   if address in by_address}
        self._launched(Launch(op, made.kernel, path, made.grid, made.block, made.lds_bytes, made.args, tensors,
                              self._allocations(op, made.args)), made.is_captured)

    def _allocations(self, op: str, args: bytes) -> tuple[Buffer, ...]:
        """The runtime's memory that fields of the operator's struct point into: the arenas of its ranks."""
        found = {}
        for name, kind, offset in _fields(op):
            if kind in ("8P", "q"):  # arenas; the status record, whose address Python gives as a number
                for address in struct.unpack_from(kind, args, offset):
                    if address > 0 and (at := self._driver.allocation(address)):
                        found[at[0]] = Buffer(name, *at)
        return tuple(found.values())

    # ---- launches of Triton's

    def _triton_launched(self, launches: list, made: Any) -> None:
        from wave64.testing.emulator import jit

        launches.clear()  # which would keep all tensors there ever were
        if self._collect is not None:
            self._collect(made)
            return
        tensors = {name: value for name, value in made.leaves().items() if isinstance(value, Tensor)}
        packed = jit._launch_of(made, str(Path(self._folder.name, f"{made.kernel.hash}.hsaco")))
        if math.prod(packed.grid):
            self.counts.keys.add(made.key)
            launch = Launch("", **vars(packed), tensors=tensors)
            self._launched(launch, self.streams.capturing is not None)

    # ---- both

    def _launched(self, launch: Launch, is_captured: bool) -> None:
        op = self._op
        if not is_captured:
            self._execute(launch, op)
            return
        graph = self.streams.capturing
        assert graph is not None, "a launch on a stream that captures, and no graph"
        graph.nodes.append(lambda: self._execute(launch, op))

    def _execute(self, launch: Launch, op: str) -> None:
        for each in launch.allocations:  # of a replay it may be long gone
            if self._driver.allocation(each.start) != (each.start, each.size):
                raise EmulationError(f"{launch.kernel}: {each.name}: {each.size} bytes of the runtime's memory at "
                                     f"0x{each.start:x} were freed since the launch was recorded")
        meter = self.meter if self.meter is not None and self.meter.is_counting else None
        before, checks = self.counts.instructions, self._checks if meter is None else (*self._checks, *meter.checks)
        execute(launch, launch.buffers(), self.counts, checks, SECONDS, GRANULES.get(launch.op, 1))
        if meter is not None:
            meter.add(op or launch.op, launch.kernel, self.counts.instructions - before)

    def serving(self, op: str, backend: Backend) -> Backend:
        """The backend, whose launches count as the operator's."""
        run = backend.run

        def noted(*args, **kwargs):
            before, self._op = self._op, self._op or op
            try:
                return run(*args, **kwargs)
            finally:
                self._op = before

        return dataclasses.replace(backend, run=noted)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Launches inside are this device's."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(platform.emulating(self))
            self._exchange(self._index)
            self._driver.on_launch(self._hip_launched)
            if hip._hip is not None:
                hip.connect(data_ptr=self._data_ptr, get_device=lambda tensor: self._index,
                            current_device=lambda: self._driver.get("hipGetDevice"), current_stream=self._stream,
                            exchange_device=self._exchange)
                stack.callback(hip.connect)
            if triton_capture := _triton_capture():
                launches: list = []
                perform = functools.partial(self._triton_launched, launches)
                stack.enter_context(triton_capture(self.arch.name, perform, compiled=self._collect is None))
            yield


def _triton_capture() -> Callable | None:
    """Takes Triton's launches; None where there is no Triton."""
    try:
        from wave64.testing.compile import capture
    except ImportError:
        return None
    return capture


@functools.cache
def hip_code(arch: str, code: bytes) -> tuple[str, str]:
    """(operator, path) of a code object that the runtime was given."""
    for op in hip.code_objects()[arch]:
        if hip.code_object(arch, op) == code:
            return op, str(Path(hip._hip.code_object_folder(), arch, f"{op}.co"))
    raise LookupError(f"a code object for {arch} that is none of the package's")


@functools.cache
def _fields(op: str) -> tuple[tuple[str, str, int], ...]:
    return tuple(hip._hip.fields()[op])


def pointers(op: str, args: bytes) -> dict[str, int]:
    """The addresses in an operator's struct, by field."""
    return {name: int.from_bytes(args[offset:offset + 8], "little")
            for name, kind, offset in _fields(op) if kind == "P"}
