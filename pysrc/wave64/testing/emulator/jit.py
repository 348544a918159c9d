"""Triton kernels on the machine: launchers run as they are on CPU tensors, Triton compiles for the architecture, and
where it would launch, the machine code is executed.

    with emulate_triton("gfx942") as ran:
        out = OPS["rms_norm"].backends["triton"].run(x, weight)   # is there at once

Needs a process without TRITON_INTERPRET.
"""

import contextlib
import math
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wave64.testing import compile, isa
from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.memory import Buffer
from wave64.testing.emulator.run import SECONDS, Counts, execute, named


@dataclass(frozen=True)
class _Launch:
    """The same fields as a recorded launch of the hip backend."""

    kernel: str
    code_object: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    lds_bytes: int
    args: bytes


def _packed(arguments: list[dict[str, Any]], values: list[Any]) -> bytes:
    """The kernel's arguments where its metadata has them; scratch that Triton may ask for behind them is none."""
    explicit = [a for a in arguments if not a[".value_kind"].startswith("hidden_")]
    packed = bytearray(max((a[".offset"] + a[".size"] for a in explicit), default=0))
    for argument, value in zip(explicit, values + [0] * (len(explicit) - len(values)), strict=True):
        at, size = argument[".offset"], argument[".size"]
        if isinstance(value, Tensor):
            value = value.data_ptr()
        packed[at:at + size] = struct.pack("<f", value) if isinstance(value, float) else (
            int(value) % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(packed)


def _launch_of(launch: compile.Launch, code_object: str) -> _Launch:
    kernel = launch.kernel
    code = kernel.asm["hsaco"]
    Path(code_object).write_bytes(code)
    described, = (k for k in isa.metadata(code)["amdhsa.kernels"] if k[".name"] == kernel.name)
    grid = launch.grid(launch.arguments) if callable(launch.grid) else launch.grid
    x, y, z = (*grid, 1, 1)[:3]
    return _Launch(kernel.name, code_object, (x, y, z),
                   (kernel.metadata.num_warps * kernel.metadata.warp_size, 1, 1), kernel.metadata.shared,
                   _packed(described[".args"], list(launch.leaves().values())))


@contextlib.contextmanager
def emulate_triton(arch: str, checks: tuple[type, ...] = ALL, granule: int = 1, core: str = "auto"
                   ) -> Iterator[Counts]:
    """Inside, Triton operators take CPU tensors; what kernels may touch are the storages of the tensors that they are
    given; granule, core: as of emulate()."""
    counts = Counts()
    with tempfile.TemporaryDirectory(prefix="wave64-emulator-") as folder:

        def perform(launch: compile.Launch) -> None:
            tensors = {name: value for name, value in launch.leaves().items() if isinstance(value, Tensor)}
            addresses = {name: t.data_ptr() for name, t in tensors.items()}
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
            buffers = [Buffer(named(addresses, start, size) or "a tensor", start, size)
                       for start, size in storages.items() if size]
            recorded = _launch_of(launch, str(Path(folder, f"{launch.kernel.hash}.hsaco")))
            if math.prod(recorded.grid):
                counts.keys.add(launch.key)
                execute(recorded, buffers, counts, checks, SECONDS, granule, core)

        with compile.capture(arch, perform):
            yield counts
