"""Runs recorded launches of the hip backend on the machine: the real launcher's grid and arguments, the real code
object's instructions, on CPU tensors.

    with emulate("gfx942") as ran:
        out = OPS["rms_norm"].backends["hip"].run(x, weight)
    # out is there when the block ends; ran.instructions wave instructions were executed
"""

import contextlib
import functools
import gc
import importlib.metadata
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from wave64.backends import hip
from wave64.testing import built, lanes
from wave64.testing.emulator import code_object
from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.machine import Machine, Program, Shape
from wave64.testing.emulator.memory import Buffer

BATCH = 64       # waves that run together, where that many are there
KEPT = 8         # machines that are kept, should their launch be made again
SECONDS = 600.0  # a launch that takes longer is taken for one that never ends
#: operators whose loads take all of the so many bytes in which a tensor begins or ends. sample: bounds a row in words
#: of 4 bytes and drops the half of one behind an odd number of 16-bit logits: to spare it would cost spilled registers,
#: and a word never crosses a page, so hardware has it
GRANULES = {"sample": 4}
#: pointers to what does not exist here: a kernel that follows one is out of bounds
NOT_GIVEN = ("hidden_none", "hidden_printf_buffer", "hidden_hostcall_buffer", "hidden_default_queue",
             "hidden_completion_action", "hidden_multigrid_sync_arg", "hidden_heap_v1", "hidden_queue_ptr",
             "dispatch_ptr_0", "dispatch_ptr_1", "queue_ptr_0", "queue_ptr_1", "dispatch_id_0", "dispatch_id_1")


@dataclass
class Counts:
    """What was executed."""

    launches: int = 0
    waves: int = 0
    instructions: int = 0                                    # of waves
    by_name: dict[str, int] = field(default_factory=dict)    # mnemonic -> wave instructions
    by_numpy: dict[str, int] = field(default_factory=dict)   # of these, those that the core in C left to NumPy
    kernels: set[tuple[str, str]] = field(default_factory=set)  # (<arch>/<code object>, kernel)
    keys: set[str] = field(default_factory=set)              # of Triton's binaries, see compile.Launch
    seconds: float = 0.0                                     # that executing took

    def add(self, machine: Machine, waves: int) -> None:
        self.waves += waves
        for pc in np.flatnonzero(machine.counts).tolist():
            name, count = machine.program.at(pc).name, int(machine.counts[pc])
            self.by_name[name] = self.by_name.get(name, 0) + count
            self.instructions += count
        for name, count in machine.by_numpy.items():
            self.by_numpy[name] = self.by_numpy.get(name, 0) + count


@functools.lru_cache(maxsize=64)
def _program(code: bytes) -> Program:
    return Program(code_object.load(code))


def _with_lines(op: str, arch: str) -> bytes | None:
    """The code object of hip/ops/<op>.hip with line information, which the one that ships has not: compiled when a
    report wants it. None outside of the repository, and without its compiler."""
    try:
        return built.code_object(lanes.sources(), op, arch, "-gline-tables-only").read_bytes()
    except (FileNotFoundError, built.CompileError, importlib.metadata.PackageNotFoundError):
        return None


_machines: dict[tuple, Machine] = {}  # the last ones, the latest last: their instructions are bound to them


def _machine(program: Program, kernel: code_object.Kernel, shape: Shape, checks: tuple[type, ...],
             core: str) -> Machine:
    key = program, kernel.name, shape, checks, core
    machine = _machines[key] = _machines.pop(key, None) or Machine(program, kernel, shape, checks, core)
    if len(_machines) > KEPT:
        _machines.pop(next(iter(_machines))).release()
    return machine


class Prepared:
    """A recorded launch with what its waves start from: program, kernel, and the buffers of its own."""

    def __init__(self, launch):
        self.launch, self.program = launch, _program(Path(launch.code_object).read_bytes())
        self.kernel = self.program.code.kernels[launch.kernel]
        if op := getattr(launch, "op", None):
            self.program.code.with_lines = functools.partial(_with_lines, op, self.program.code.arch)
        self.arguments = _arguments(launch, self.kernel)
        image = self.program.code.image
        self.buffers = [Buffer("the kernel's arguments", self.arguments.ctypes.data, self.arguments.size),
                        Buffer("the code object", image.ctypes.data, image.size)]
        self.waves, self.blocks = -(-math.prod(launch.block) // 64), math.prod(launch.grid)

    def shape(self, groups: int) -> Shape:
        return Shape(groups, self.waves, self.kernel.lds_bytes + self.launch.lds_bytes)

    def start(self, machine: Machine, first: int, groups: int) -> None:
        """`groups` workgroups from number `first` on stand at the kernel's entry."""
        self.start_some(machine, np.arange(first, first + groups))

    def start_some(self, machine: Machine, numbers: np.ndarray) -> None:
        """The workgroups of these numbers, at most as many as the machine holds, stand at the kernel's entry."""
        machine.start(len(numbers))
        of_all = np.resize(numbers, machine.shape.groups)
        _initial_registers(machine, self.launch, of_all[machine.group], self.arguments)

    def note(self, counts: Counts) -> None:
        counts.launches += 1
        counts.kernels.add((f"{self.program.code.arch}/{Path(self.launch.code_object).name}", self.kernel.name))


def execute(launch, buffers: Iterable[Buffer], counts: Counts | None = None, checks: tuple[type, ...] = ALL,
            seconds: float = SECONDS, granule: int = 1, core: str = "auto") -> Counts:
    """Makes a recorded launch (see hip.record), here and now. `buffers` is all memory that it may touch besides its
    arguments and its code object, to the byte, or its loads to so many bytes (see Memory.register). core: as of
    Machine."""
    began = time.monotonic()
    counts, prepared = counts or Counts(), Prepared(launch)
    prepared.note(counts)
    shape = prepared.shape(max(1, min(prepared.blocks, BATCH // prepared.waves)))
    machine = _machine(prepared.program, prepared.kernel, shape, checks, core)
    machine.memory.register([*buffers, *prepared.buffers], granule)
    try:
        with np.errstate(all="ignore"), without_collection():
            for first in range(0, prepared.blocks, shape.groups):
                live = min(shape.groups, prepared.blocks - first)
                prepared.start(machine, first, live)
                machine.run(seconds)
                counts.add(machine, live * prepared.waves)
    except Exception:  # who makes the launch again begins anew, and hears the same
        for key in [key for key in _machines if key[0] is prepared.program]:
            _machines.pop(key).release()
        raise
    counts.seconds += time.monotonic() - began
    return counts


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Bound instructions are many small objects that stay: looking through them for garbage takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _arguments(launch, kernel: code_object.Kernel) -> np.ndarray:
    """The kernarg segment: the launch's bytes, and what the runtime fills."""
    size = max(kernel.kernarg_bytes, len(launch.args))  # assembly may declare none, and take what the caller gives
    segment = np.zeros(max(64, -(-size // 64) * 64), np.uint8)
    segment[:len(launch.args)] = np.frombuffer(launch.args, np.uint8)
    values = {f"hidden_block_count_{axis}": launch.grid[i] for i, axis in enumerate("xyz")}
    values |= {f"hidden_group_size_{axis}": launch.block[i] for i, axis in enumerate("xyz")}
    values |= {f"hidden_remainder_{axis}": 0 for axis in "xyz"}
    values |= {f"hidden_global_offset_{axis}": 0 for axis in "xyz"}
    values |= {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": launch.lds_bytes}
    values |= dict.fromkeys(NOT_GIVEN, 0)
    for kind, offset, size in kernel.hidden:
        if kind not in values:
            raise NotImplementedError(f"{kernel.name}: the hidden argument {kind}")
        segment[offset:offset + size] = np.frombuffer(int(values[kind]).to_bytes(size, "little"), np.uint8)
    return segment


def _initial_registers(machine: Machine, launch, group: np.ndarray, arguments: np.ndarray) -> None:
    """User and system SGPRs, and v0, as the descriptor enables them. group: of each wave, the number of its
    workgroup."""
    kernel, sgprs = machine.kernel, machine.sgprs
    preloaded = arguments.view(np.uint32)[kernel.preload[0]:]
    preload_at = 0
    for i, what in enumerate(kernel.user_sgprs):
        if what in ("kernarg_0", "kernarg_1"):
            sgprs[:, i] = arguments.ctypes.data >> (32 if what.endswith("1") else 0) & 0xFFFFFFFF
        elif what == "preload":
            sgprs[:, i] = preloaded[preload_at]
            preload_at += 1
        elif what.startswith("private_segment_size"):
            sgprs[:, i] = kernel.scratch_bytes
        elif what in NOT_GIVEN:
            sgprs[:, i] = 0
        elif what != "unused":
            raise NotImplementedError(f"{kernel.name}: a user SGPR with {what}")
    width, height, _ = launch.grid
    numbers = {"x": group % width, "y": group // width % height, "z": group // (width * height)}
    for i, what in enumerate(kernel.system_sgprs, len(kernel.user_sgprs)):
        if what == "info":
            raise NotImplementedError(f"{kernel.name}: workgroup info in an SGPR")
        sgprs[:, i] = numbers[what]
    width, height, depth = launch.block
    lane = (np.arange(machine.count) % machine.shape.waves)[:, None] * 64 + np.arange(64)
    ids = lane % width | lane // width % height << 10 | lane // (width * height) << 20
    machine.vgprs[0] = ids
    beyond = lane >= width * height * depth
    if beyond.any():
        masks = np.packbits(~beyond, axis=1, bitorder="little").view(np.uint64)[:, 0]
        sgprs.view(np.uint64)[:, 63] = masks


def _storages(tensors: dict[str, Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages of a launch's tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors.values())
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def named(addresses: dict[str, int], start: int, size: int) -> str:
    """What reports call a buffer: the arguments that point into it; "" if none does."""
    return " and ".join(name for name, address in addresses.items() if start <= address < start + size)


@contextlib.contextmanager
def emulate(arch: str, checks: tuple[type, ...] = ALL, granule: int = 1, core: str = "auto") -> Iterator[Counts]:
    """Inside, hip operators take CPU tensors; their launches are executed, in order, when the block ends. A launch may
    touch the storages of the tensors that it was given, to the byte; granule: loads may also touch the rest of the
    `granule` bytes in which one begins or ends. See GRANULES. core: as of Machine."""
    counts = Counts()
    with hip.record(arch) as launches:
        yield counts
    for launch in launches:
        addresses = {name: tensor.data_ptr() for name, tensor in launch.tensors.items()}
        buffers = [Buffer(named(addresses, start, size) or "a tensor", start, size)
                   for start, size in _storages(launch.tensors).items()]
        execute(launch, buffers, counts, checks, SECONDS, max(granule, GRANULES.get(launch.op, 1)), core)


