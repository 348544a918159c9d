"""What launches of full size take, from executing a few of their workgroups on the emulator, spread over the grid.

    works(OPS["fp8_block_scaled_mm"], "hip", args, "gfx942")   # (kernel, predict.Work) of each launch, in order

Arguments have their real shapes, on a CPU; memory that no executed workgroup touches is never touched (sparse.py's
`empty` costs nothing until then). Results are not computed. What later launches decide by (the sorting of a mixture of
experts) is executed whole. Workgroups that end at once, since a grid has more than there is work for, do not count. Of
each tensor, bytes that are touched at all are those of the executed workgroups, as often as there are more of them, but
at most all.
"""

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wave64.backends import hip
from wave64.op import Op
from wave64.testing import compile as compiling
from wave64.testing import predict
from wave64.testing.cost import waves_per_simd
from wave64.testing.emulator import jit
from wave64.testing.emulator.cost import LINE, Usage, counting
from wave64.testing.emulator.machine import ENDED, READY, Machine, progressions
from wave64.testing.emulator.memory import Buffer
from wave64.testing.emulator.run import BATCH, Prepared, execute, without_collection

BLOCKS = 4       # workgroups of a launch that are executed
SECONDS = 300.0  # for one of them
#: parts of names of kernels whose results others decide by
DECISIVE = ("align", "sort", "plan")
#: workgroups that are looked at for whether they have work, if there are more, and steps within which most without end
PROBES, STEPS = 128, 160
#: workgroups, of those that go on, that are looked at for longer: some have to search for the work that there is not
SURE, MORE_STEPS = 512, 2000


@dataclass(frozen=True)
class Sample:
    """Of one launch. executed: workgroups that were, of `blocks` in its grid."""

    kernel: str
    executed: int
    blocks: int
    work: predict.Work
    conflict_free: float  # LDS cycles of a workgroup, were there no bank conflicts
    touched: float        # bytes of lines that a workgroup touches at all

    def of_bytes(self, once: float) -> "Sample":
        """Where it is known that all workgroups together touch so many bytes: as many as then are at work. For those
        whose shares differ, which a few of them say too little of."""
        times = once / (self.touched * self.work.blocks)
        return replace(self, work=replace(self.work, blocks=self.work.blocks * times, lines=self.work.lines * times,
                                          once=once))


def works(op: Op, backend: str, args: dict[str, Any], arch: str, blocks: int = BLOCKS,
          before: Callable[[Any], None] = lambda launch: None, parts: tuple[str, ...] = ("",),
          probes: int = PROBES) -> list[Sample]:
    """Of each launch of a call, in order, whose kernel has one of the parts in its name. before: called with each
    recorded launch of HIP's before it is executed, for what workgroups that were not would have left to it. probes: as
    of sample. Raises ValueError where the backend declines the call. Triton's need a process without
    TRITON_INTERPRET."""
    served, found = op.backends[backend], []

    def sampled(launch: Any, tensors: Iterable[Tensor]) -> None:
        if any(part in launch.kernel for part in parts):
            found.append(sample(launch, tensors, blocks, probes))
        elif any(part in launch.kernel for part in DECISIVE):
            execute(launch, memory_of(tensors), checks=())

    with tempfile.TemporaryDirectory(prefix="wave64-sampled-") as folder:

        def perform(launch: compiling.Launch) -> None:
            tensors = [value for value in launch.leaves().values() if isinstance(value, Tensor)]
            made = jit._launch_of(launch, str(Path(folder, f"{launch.kernel.hash}.hsaco")))
            if prod(made.grid):
                sampled(made, tensors)

        launches: Any
        with hip.record(arch) if backend == "hip" else compiling.capture(arch, perform) as launches:
            if served.supports is not None and (why := served.supports(**args)):
                raise ValueError(f"{op.name}: backend {backend} declines: {why}")
            result = served.run(**args)
        for launch in launches if backend == "hip" else ():
            before(launch)
            sampled(launch, launch.tensors.values())
    del result
    return found


def memory_of(tensors: Iterable[Tensor]) -> list[Buffer]:
    """The storages under tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return [Buffer("a tensor", *each) for each in storages.items()]


def sample(launch: Any, tensors: Iterable[Tensor], blocks: int = BLOCKS, probes: int = PROBES) -> Sample:
    """Executes a few workgroups of a recorded launch, side by side. tensors: all memory that it may touch. probes:
    workgroups that are looked at for whether they have work."""
    prepared, counter, storages = Prepared(launch), counting(), memory_of(tensors)
    buffers = [*storages, *prepared.buffers]
    if any(part in launch.kernel for part in DECISIVE):
        picks, working = np.arange(prepared.blocks), 1.0
    else:
        probed = chosen(prepared.blocks, min(max(blocks, probes), prepared.blocks))
        busy = at_work(prepared, buffers, probed, STEPS)
        some = busy[::-(-len(busy) // SURE)]
        sure = at_work(prepared, buffers, some, MORE_STEPS)
        picks = sure[::max(1, len(sure) // blocks)][:blocks]
        working = len(busy) / len(probed) * len(sure) / len(some)
    at_once = max(1, min(len(picks), BATCH // prepared.waves))
    machine = Machine(prepared.program, prepared.kernel, prepared.shape(at_once), (counter,))
    machine.memory.register(buffers)
    usage, = counter.usages.values()
    with np.errstate(all="ignore"), without_collection():
        for first in range(0, len(picks), at_once):
            prepared.start_some(machine, picks[first:first + at_once])
            machine.run(SECONDS)
    machine.release()
    work = scaled(usage, len(picks), prepared.blocks * working, {each.start: each.size for each in storages})
    return Sample(launch.kernel, len(picks), prepared.blocks, work, usage.conflict_free / len(picks),
                  len(usage.lines) * LINE / len(picks))


def at_work(prepared: Prepared, buffers: list[Buffer], probed: np.ndarray, steps: int) -> np.ndarray:
    """Those that do not end within so many steps, or store something; all where none does."""
    machine, found = Machine(prepared.program, prepared.kernel, prepared.shape(1), ()), []
    machine.memory.register(buffers)
    with np.errstate(all="ignore"), without_collection():
        for block in probed.tolist():
            prepared.start(machine, block, 1)
            for _ in range(4):
                ready = machine.states == READY
                for pc in np.unique(machine.pcs[ready]).tolist():
                    for piece in progressions(np.flatnonzero(ready & (machine.pcs == pc))):
                        machine.party(*piece).run(pc, machine.program.length, steps // 4)
            if not (machine.states == ENDED).all() or stores(machine):
                found.append(block)
    machine.release()
    return np.array(found) if found else probed


def stores(machine: Machine) -> bool:
    """Whether a wave has executed an instruction that writes to global memory."""
    names = (machine.program.at(pc).name for pc in np.flatnonzero(machine.counts).tolist())
    return any(name.startswith(("global_", "flat_", "buffer_")) and ("store" in name or "atomic" in name)
               for name in names)


def chosen(blocks: int, count: int) -> np.ndarray:
    """`count` of `blocks` workgroups, the first and others anywhere: in no step that a grid's sides may share."""
    return np.array([0, *sorted((1 + np.random.default_rng(0).choice(blocks - 1, count - 1, replace=False)).tolist())])


def scaled(usage: Usage, executed: int, blocks: float, storages: dict[int, int]) -> predict.Work:
    """The launch of `blocks` workgroups, of which `executed` were counted."""
    work, times = predict.work_of(replace(usage, blocks=executed), waves_per_simd(usage)), blocks / executed
    starts, held = sorted(storages), dict.fromkeys(storages, 0)
    for line in usage.lines:
        at = bisect_right(starts, (line + 1) * LINE - 1) - 1
        if at >= 0 and line * LINE < starts[at] + storages[starts[at]]:
            held[starts[at]] += LINE
    once = sum(min(size * times, storages[start]) for start, size in held.items())
    return replace(work, blocks=blocks, once=once, lines=work.lines * times)


def longest(works: list[predict.Work]) -> str:
    """What launches one after another need longest, their starts among it, with data that no cache has."""
    found = {"starting launches": predict.CONSTANTS.start * len(works)}
    for work in works:
        for name, us in predict.parts_us(work, True).items():
            found[name] = found.get(name, 0) + us
    return max(found, key=found.__getitem__)
