"""Compiles what the Triton launchers really launch, for an AMD GPU that need not be there.

`capture(arch)` lets launchers run as they are, configured for `arch`: Triton specialises on their arguments (alignment,
divisibility by 16, ones, None, storage below 2 GiB) and compiles, and where it would launch, the kernel is recorded.
The arguments are tensors without memory (torch's meta device), so a case of the longest context costs nothing, and a
launcher that looks at data, which would also break graph capture, fails here.

    with capture("gfx942") as launches:
        OPS["rms_norm"].backends["triton"].run(**arguments)

`python -m wave64.testing.compile gfx942` prints, as JSON, the figures of every Triton kernel that the large cases
reach. It needs a process without TRITON_INTERPRET: the interpreter replaces kernels when they are defined.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from wave64 import OPS, platform
from wave64.arch import Arch
from wave64.op import Case, Op
from wave64.testing import isa


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled instead of launched."""

    kernel: Any   # triton.compiler.CompiledKernel: .name, .asm["amdgcn"], .asm["hsaco"], .metadata
    grid: Any     # as the launcher gave it: a tuple, or a function of the kernel's arguments

    def figures(self) -> dict[str, Any]:
        """Its row of the golden file."""
        resources, = isa.read_elf(self.kernel.asm["hsaco"])
        code = isa.read_asm(self.kernel.asm["amdgcn"], self.kernel.name)
        metadata = self.kernel.metadata
        return isa.figures(resources, metadata.shared + resources.lds_bytes, metadata.num_warps, code)


class _Driver:
    """What Triton asks a GPU before it compiles. The device's number is the architecture's name: Triton keeps compiled
    kernels by device, so those of several architectures and those of a real GPU stay apart."""

    def __init__(self, arch: Arch):
        self._arch = arch

    def get_current_device(self) -> str:
        return self._arch.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self._arch.name, self._arch.wave_size)


@contextlib.contextmanager
def capture(arch: str) -> Iterator[list[Launch]]:
    """Inside the block Triton launches compile for `arch` and are recorded, in order, instead of launched."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("capture: TRITON_INTERPRET: expected unset, got 1; unset it and start a new process")
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel, grid))
        return kernel

    before = dict(vars(driver))
    with platform.target(arch) as target:
        driver.set_active(_Driver(target))
        JITFunction.run = record
        try:
            yield launches
        finally:
            JITFunction.run = run
            vars(driver).update(before)


def arguments(case: Case) -> dict[str, Any]:
    """The case's arguments with tensors of the right dtype, shape, strides and alignment that hold no data."""
    try:
        with torch.device("meta"):
            return case.make()
    except RuntimeError:   # it looks at values that it drew, so they must exist for a moment
        return pytree.tree_map_only(Tensor, _without_data, case.make())


def _without_data(t: Tensor) -> Tensor:
    storage = torch.empty(t.untyped_storage().nbytes() // t.itemsize, dtype=t.dtype, device="meta")
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def compile_case(op: Op, case: Case, arch: str) -> list[Launch]:
    """What the operator's Triton backend launches for `case` on `arch`; nothing where it declines the arguments."""
    backend, args = op.backends["triton"], arguments(case)
    with capture(arch) as launches:
        if backend.supports is None or backend.supports(**args) is None:
            backend.run(**args)
    return launches


def compile_op(op: Op, arch: str) -> dict[str, dict[str, Any]]:
    """"<case> <kernel>" -> figures, over the large cases; a binary that several cases share is listed once."""
    rows, seen = {}, set()
    for case in op.cases():
        if case.large:
            for launch in compile_case(op, case, arch):
                if launch.kernel.hash not in seen:
                    seen.add(launch.kernel.hash)
                    name = f"{case.id} {launch.kernel.name}"
                    again = sum(key.split("#")[0] == name for key in rows)
                    rows[f"{name}#{again + 1}" if again else name] = launch.figures()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", help="gfx942, gfx950, ...")
    parser.add_argument("ops", nargs="*", metavar="op", help="which operators; default: all that have a Triton backend")
    options = parser.parse_args()
    report = {}
    for op in OPS.values():
        if "triton" in op.backends and (not options.ops or op.name in options.ops):
            try:
                report[op.name] = compile_op(op, options.arch)
            except Exception as e:   # one kernel that does not compile is a finding about that kernel only
                report[op.name] = f"{type(e).__name__}: {e}"
    print(json.dumps({"compiler": f"triton {triton.__version__}", "ops": report}))


if __name__ == "__main__":
    main()
