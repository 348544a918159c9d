"""One kernel of AITER's on one piece of work: its launch, memory and fp64 result; how it is executed on the emulator,
held to the checks and counted; and the same counts of our kernels on the same work."""

import contextlib
import multiprocessing
import re
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from wave64 import OPS, platform, quant
from wave64.arch import lookup
from wave64.op import Case
from wave64.testing import contract, predict
from wave64.testing.cost import times_us, waves_per_simd
from wave64.testing.emulator import checks as checks_
from wave64.testing.emulator import code_object
from wave64.testing.emulator.cost import Counting, Usage, counting
from wave64.testing.emulator.jit import emulate_triton
from wave64.testing.emulator.machine import ENDED, READY, Machine, progressions
from wave64.testing.emulator.memory import Buffer, EmulationError
from wave64.testing.emulator.run import BATCH, Prepared, emulate, execute

PAGE = 4096
TURN = 12          # instructions that a wave executes before the others get their turn
SECONDS = 600.0
BEYOND = 1 << 17  # bytes behind a buffer that kernels known to read past it may touch, on all sides of which there are


class Arrays:
    """Named memory of a launch, each array on pages of its own."""

    def __init__(self):
        self.by_name: dict[str, np.ndarray] = {}
        self._raw: list[np.ndarray] = []

    def new(self, name: str, shape: tuple[int, ...], dtype: type, fill: float) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.zeros(size + PAGE + BEYOND, np.uint8)
        self._raw.append(raw)
        start = -raw.ctypes.data % PAGE
        got = raw[start:start + size].view(dtype).reshape(shape)
        got[...] = fill
        self.by_name[name] = got
        return got

    def put(self, name: str, values: np.ndarray) -> np.ndarray:
        got = self.new(name, values.shape, values.dtype, 0)
        got[...] = values
        return got

    def buffers(self, beyond: int) -> list[Buffer]:
        return [Buffer(name, x.ctypes.data, x.nbytes + beyond) for name, x in self.by_name.items()]


@dataclass
class Launch:
    """What a piece of work needs to be executed once. args: of each rank, where several take part."""

    grid: tuple[int, int, int]
    block: int
    args: bytes | list[bytes]
    arrays: Arrays
    error: Callable[[], float]  # of the result against fp64, in units of its largest number


@dataclass
class Ours:
    """Our operator on the same work. kernels: what the names of the kernels that count contain; "": all. ranks: of a
    collective instead of `make`, from an architecture the launches of all ranks, their memory, and what looks at the
    results."""

    op: str
    make: Callable[[], dict] = dict
    kernels: str = ""
    ranks: Callable[[str], tuple[list, list[Buffer], Callable[[], None]]] | None = None


@dataclass
class Work:
    """make: draws arguments and memory anew. allowed: how large the error may be. note: where ours is other work."""

    family: str
    what: str
    object: str
    make: Callable[[], Launch]
    allowed: float
    ours: Ours
    note: str = ""


@dataclass
class Row:
    """What one kernel, or ours together, needed."""

    who: str
    kernel: str
    instructions: int  # of waves
    usages: dict[str, Usage]
    error: float | None = None
    findings: list[str] = field(default_factory=list)


# ---- numbers

def slots(*values: np.ndarray | int | float | None) -> bytes:
    """Arguments as AITER's assembly takes them, each in 16 bytes: addresses, fp32, unsigned integers."""
    packed = []
    for value in values:
        if isinstance(value, np.ndarray):
            packed.append(struct.pack("<Q8x", value.ctypes.data))
        elif isinstance(value, float):
            packed.append(struct.pack("<f12x", value))
        else:
            packed.append(struct.pack("<Q8x", value or 0))
    return b"".join(packed)


def bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def wide(bits: np.ndarray) -> np.ndarray:
    """bf16 as fp64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def fp8(x: np.ndarray, arch: str) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, what they stand for in fp64), of the architecture's e4m3."""
    with platform.target(arch):
        drawn = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(quant.fp8_dtype())
    return drawn.view(torch.uint8).numpy(), drawn.double().numpy()


def of_fp8(octets: np.ndarray, arch: str) -> np.ndarray:
    """The numbers in fp64 that bytes stand for."""
    with platform.target(arch):
        return torch.from_numpy(octets.copy()).view(quant.fp8_dtype()).double().numpy()


def preshuffled(weight: np.ndarray, group: int = 16) -> np.ndarray:
    """Rows in groups, columns in groups of 32, of which each row's 16 bytes lie together."""
    *outer, rows, columns = weight.shape
    grouped = weight.reshape(-1, rows // group, group, columns // 32, 2, 16).transpose(0, 1, 3, 4, 2, 5)
    return np.ascontiguousarray(grouped).reshape(*outer, rows, columns)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error over the largest number; infinity where something was not written."""
    worst = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
    return float(worst) if np.isfinite(worst) else float("inf")


# ---- executing

def in_turn(launches: list, buffers: list[Buffer], checks: tuple[type, ...]) -> None:
    """As `execute`, but all waves go on at the same rate, as hardware's nearly do: code that leaves out a barrier
    counts on that. Several launches run at once, each on a device of its own, which all see one memory at once."""
    prepared = [Prepared(each) for each in launches]
    groups = max(1, min(prepared[0].blocks, BATCH // prepared[0].waves)) if len(prepared) == 1 else prepared[0].blocks
    machines = [Machine(each.program, each.kernel, each.shape(groups), checks) for each in prepared]
    for machine, each in zip(machines, prepared, strict=True):
        machine.memory.register([*buffers, *(more for each in prepared for more in each.buffers)])
    until = time.monotonic() + SECONDS
    with np.errstate(all="ignore"):
        for first in range(0, prepared[0].blocks, groups):
            for machine, each in zip(machines, prepared, strict=True):
                each.start(machine, first, min(groups, each.blocks - first))
            while running := [machine for machine in machines if not (machine.states == ENDED).all()]:
                for machine in running:
                    _turn(machine)
                if time.monotonic() > until:
                    raise EmulationError(f"still running after {SECONDS:g} s")
            for machine in machines:
                machine.ended()
    for machine in machines:
        machine.release()


def _turn(machine: Machine) -> None:
    ready = machine.states == READY
    if not ready.any():
        machine.meet()
    for pc in np.unique(machine.pcs[ready]).tolist():
        for piece in progressions(np.flatnonzero(ready & (machine.pcs == pc))):
            machine.party(*piece).run(pc, machine.program.length, TURN)


@contextlib.contextmanager
def prepared_by(code: bytes, launch: Launch, grid: tuple[int, int, int] | None = None
                ) -> Iterator[list[SimpleNamespace]]:
    """The launch of each rank, as the emulator takes it. grid: instead of the launch's."""
    with tempfile.TemporaryDirectory(prefix="wave64-aiter-") as folder:
        path = Path(folder, "kernel.co")
        path.write_bytes(code)
        kernel = next(iter(code_object.load(code).kernels))
        ranks = launch.args if isinstance(launch.args, list) else [launch.args]
        yield [SimpleNamespace(kernel=kernel, code_object=str(path), grid=grid or launch.grid, lds_bytes=0, args=args,
                               block=(launch.block, 1, 1)) for args in ranks]


def theirs(work: Work, code: bytes, strict: bool = True) -> Row:
    """AITER's kernel: what the checks find in it, then its result and what it costs. strict: with the checks."""
    def run(checks: tuple[type, ...], beyond: int) -> None:
        launch = work.make()
        with prepared_by(code, launch) as recorded:
            if len(recorded) > 1:
                in_turn(recorded, launch.arrays.buffers(beyond), checks)
            else:
                execute(recorded[0], launch.arrays.buffers(beyond), checks=checks)

    found = findings(run) if strict else []
    counter, launch = counting(), work.make()
    with prepared_by(code, launch) as recorded:
        in_turn(recorded, launch.arrays.buffers(BEYOND), (counter,))
    kernel = recorded[0].kernel
    instructions = sum(usage.instructions for usage in counter.usages.values())
    return Row("AITER", kernel, instructions, counter.usages, launch.error(), found)


def findings(run: Callable) -> list[str]:
    """What the checks say, each of them by itself where they do not all keep silent."""
    try:
        run(checks_.ALL, 0)
        return []
    except EmulationError:
        pass
    found = []
    for check, beyond in ((), 0), *(((check,), BEYOND) for check in checks_.ALL):
        try:
            run(check, beyond)
        except EmulationError as e:
            found.append(re.sub(r"\S+\+0x", "+0x", str(e).splitlines()[0]))
    return found


def ours(work: Work, arch: str) -> Row:
    """Our kernels on the same work, by the backend that serves there."""
    op, counter, serves = OPS[work.ours.op], counting(), ["hip"]
    if work.ours.ranks:
        launches, buffers, verify = work.ours.ranks(arch)
        in_turn(launches, buffers, (counter,))
        verify()
        return _of_ours(work, serves[0], counter)
    with platform.target(arch):
        args = contract.draw(Case(work.what, work.ours.make), "cpu", 0)
        serves = [name for name in ("hip", "triton") if name in op.backends and not (
            op.backends[name].supports and op.backends[name].supports(**args))]
        with (emulate if serves[0] == "hip" else emulate_triton)(arch, (counter,)):
            op.backends[serves[0]].run(**args)
    return _of_ours(work, serves[0], counter)


def _of_ours(work: Work, backend: str, counter: type[Counting]) -> Row:
    usages = {name: usage for name, usage in counter.usages.items() if work.ours.kernels in name}
    instructions = sum(usage.instructions for usage in usages.values())
    return Row(f"{work.ours.op} ({backend})", ", ".join(usages), instructions, usages)


# ---- reporting

def in_processes(function: Callable, tasks: list, jobs: int) -> Iterator:
    """function(task) of each task, in order, in so many processes; in this one, where that is 1."""
    if jobs == 1:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, tasks)


def with_table(text: str, lines: list[str]) -> str:
    """A document whose table with the first of these lines, its heading, is made of the others."""
    before, heading, rest = text.partition(f"{lines[0]}\n")
    assert heading, f"no table with the heading {lines[0]}"
    behind = rest.split("\n")
    end = next(i for i, line in enumerate(behind) if not line.startswith("|"))
    return before + "\n".join([*lines, *behind[end:]])


COLUMNS = ("work", "kernel", "instructions", "matrix", "vector", "LDS (conflict-free)", "KiB, each once", "waves/SIMD",
           "bound, us", "by", "predicted, us", "ours / AITER", "error (allowed)", "executed, s")


def predicted_us(work: Work, row: Row) -> float | None:
    """Of one call with data that no cache has; None of collectives, whose ranks wait for each other."""
    if work.ours.ranks:
        return None
    return sum(predict.predicted_us(predict.work_of(usage, waves_per_simd(usage)), True)
               for usage in row.usages.values())


def ratio(us: float | None, theirs: float | None) -> str:
    """Of the times, and whether the model can tell them apart."""
    if us is None or theirs is None:
        return ""
    tie = 1 / predict.TIE < us / theirs < predict.TIE
    return f"{us / theirs:.2f}{' (a tie)' if tie else ''}"


def cells(work: Work, row: Row, arch: str, seconds: float, other: Row | None = None) -> list[str]:
    """Of a row of the table. Cycles in thousands, of all waves; kernels of ours run one after the other. other:
    AITER's row next to ours."""
    us = predicted_us(work, row)
    bounds = [times_us(usage) for usage in row.usages.values()]
    longest = [max(each, key=each.__getitem__) for each in bounds]
    total = sum(each[name] for each, name in zip(bounds, longest, strict=True))
    cycles = {unit: sum(u.cycles[unit] for u in row.usages.values()) / 1e3
              for unit in ("matrix", "vector", "transcendental", "lds")}
    free = sum(u.conflict_free for u in row.usages.values()) / 1e3
    return [work.what, row.who, f"{row.instructions:,}", f"{cycles['matrix']:.1f}",
            f"{cycles['vector'] + cycles['transcendental']:.1f}", f"{cycles['lds']:.1f} ({free:.1f})",
            f"{sum(u.once() for u in row.usages.values()) / 1024:.0f}",
            ", ".join(f"{waves_per_simd(usage):g}" for usage in row.usages.values()), f"{total:.2f}",
            ", ".join(longest), "" if us is None else f"{us:.1f}",
            "" if other is None else ratio(us, predicted_us(work, other)),
            "" if row.error is None else f"{row.error:.1e} ({work.allowed:.0e})", f"{seconds:.0f}"]


def compare(work: Work, code: bytes, arch: str) -> tuple[list[list[str]], Row]:
    """Cells of the table's rows, and AITER's row. Raises AssertionError where its result is wrong."""
    began = time.monotonic()
    row = theirs(work, code)
    assert row.error is not None
    assert row.error <= work.allowed, (
        f"{work.object} on {work.what}: {row.error:.2e} from fp64, {work.allowed:.0e} allowed")
    between = time.monotonic()
    other = ours(work, arch)
    return [cells(work, row, arch, between - began), cells(work, other, arch, time.monotonic() - between, row)], row


def heading(arch: str) -> str:
    return f"{lookup(arch).product}, {arch}: thousands of cycles, all waves"
