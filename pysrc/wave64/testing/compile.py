"""Compiles what the Triton launchers really launch, for a GPU that need not be there (figures: for an AMD one).

`capture(arch)` lets launchers run as they are, configured for `arch`: Triton specializes on their arguments (alignment,
divisibility by 16, ones, None, storage below 2 GiB) and compiles, and where it would launch, the kernel is recorded.
The arguments are tensors without memory (torch's meta device), so a case of the longest context costs nothing, and a
launcher that looks at data, which would also break graph capture, fails here.

    with capture("gfx942") as launches:
        OPS["rms_norm"].backends["triton"].run(**arguments)

`python -m wave64.testing.compile gfx942` prints, as JSON, the figures of every Triton kernel that the operators' cases
reach and of every HIP kernel in the package. It needs a process without TRITON_INTERPRET: the interpreter replaces
kernels when they are defined.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from wave64 import OPS, platform, triton_ops
from wave64.arch import Arch, lookup
from wave64.backends import hip, import_triton_kernels
from wave64.op import Case, Op
from wave64.testing import isa

Rows = dict[str, dict[str, Any]]

if why := import_triton_kernels():  # on a machine without a GPU nothing else has imported them
    raise ImportError(why)


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled instead of launched."""

    kernel: Any   # triton.compiler.CompiledKernel: .name, .asm["amdgcn"], .asm["hsaco"], .metadata; None: not compiled
    key: str      # launches of one key are of one binary
    grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]  # as the launcher gave it; of the arguments
    arguments: dict[str, Any]  # by name
    make: Callable[[], Any]  # compiles it

    def leaves(self) -> dict[str, Any]:
        """The arguments with the fields of NamedTuples by their own names; without those that are not passed to the
        binary, where it is compiled."""
        signature = self.kernel.src.signature if self.kernel else {}
        found = {}
        for name, value in self.arguments.items():
            kind = signature.get(name)
            if hasattr(value, "_fields") and kind != "constexpr":
                kinds = kind or (None,) * len(value)
                found |= {field: part for field, part, its in zip(value._fields, value, kinds, strict=True)
                          if its != "constexpr"}
            elif kind != "constexpr":
                found[name] = value
        return found

    def figures(self) -> dict[str, Any]:
        """Its row of the golden file."""
        resources, = isa.read_elf(self.kernel.asm["hsaco"])
        code = isa.read_asm(self.kernel.asm["amdgcn"], self.kernel.name)
        metadata = self.kernel.metadata
        return isa.figures(resources, metadata.shared + resources.lds_bytes, metadata.num_warps) | code.figures()


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
        if self._arch.vendor == "nvidia":
            return GPUTarget("cuda", int(self._arch.name.removeprefix("sm_")), self._arch.wave_size)
        return GPUTarget("hip", self._arch.name, self._arch.wave_size)


def _key(function: JITFunction, args: tuple, kwargs: dict[str, Any]) -> str:
    """What Triton tells the binaries of a function apart by: types, what it specializes on, and options."""
    device = driver.active.get_current_device()  # pyright: ignore[reportAttributeAccessIssue]  # no part of DriverBase
    *_, binder = function.device_caches[device]
    _, specialization, options = binder(*args, **kwargs)
    return f"{function.__name__} {specialization} {sorted(options.items())}"


@contextlib.contextmanager
def capture(arch: str, perform: Callable[[Launch], None] | None = None,
            compiled: bool = True) -> Iterator[list[Launch]]:
    """Inside the block Triton launches compile for `arch` and are recorded, in order, instead of launched. perform:
    what is done with each there and then, in its place. compiled: False to record only, which costs nearly nothing."""
    if knobs.runtime.interpret:
        raise RuntimeError("capture: TRITON_INTERPRET: expected unset, got 1; unset it and start a new process")
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        key = _key(self, args, kwargs)
        make = functools.partial(run, self, *args, grid=grid, warmup=True, **kwargs)
        kernel = make() if compiled else None
        given = dict(zip((p.name for p in self.params), args, strict=False))
        bound = {p.name: given.get(p.name, kwargs.get(p.name, p.default)) for p in self.params}
        launches.append(Launch(kernel, key, grid, bound, make))
        if perform:
            perform(launches[-1])
        return kernel

    before = dict(vars(driver))
    with platform.target(arch) as target:
        driver.set_active(_Driver(target))  # pyright: ignore[reportArgumentType]  # has what compiling asks for
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
        return _moved(case.make(), "meta")


def _moved(args: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on `device`, uninitialized: on a CPU, addresses of pages that is never touched."""
    def move(t: Tensor) -> Tensor:
        storage = torch.empty(t.untyped_storage().nbytes() // t.itemsize, dtype=t.dtype, device=device)
        return storage.as_strided(t.shape, t.stride(), t.storage_offset())

    return pytree.tree_map_only(Tensor, move, args)


def compile_case(op: Op, case: Case, arch: str, compiled: bool = True) -> list[Launch]:
    """What the operator's Triton backend launches for `case` on `arch`; nothing where it declines the arguments."""
    backend = op.backends["triton"]
    with capture(arch, compiled=compiled) as launches:
        args = arguments(case)  # here, since which FP8 type a case draws is up to the architecture
        if backend.supports is None or backend.supports(**args) is None:
            backend.run(**args)
    return launches


def triton_rows(op: Op, arch: str, assembly: Path | None = None) -> Rows:
    """"<case> <kernel>" -> figures, over all cases, large ones first; a binary that cases share is listed once. "large"
    tells the rows that belong in the golden file, those of sparse pools among them, from variants that need only
    compile and stay within limits.
    In the folder `assembly`, where it is given, the text of each row's machine code is left."""
    rows, seen = {}, set()
    for case in sorted(op.cases(), key=lambda case: (not case.large, not case.sparse)):
        for launch in compile_case(op, case, arch):
            if launch.kernel.hash not in seen:
                seen.add(launch.kernel.hash)
                name = f"{case.id} {launch.kernel.name}"
                again = sum(key.split("#")[0] == name for key in rows)
                key = f"{name}#{again + 1}" if again else name
                rows[key] = launch.figures() | {"large": case.large or bool(case.sparse)}
                if assembly:
                    file = assembly / f"{arch}.{op.name}.{key.replace(' ', '.')}.s"
                    file.write_text(launch.kernel.asm["amdgcn"])
    return rows


def hip_compiler(arch: str) -> str | None:
    """What made the code objects for `arch`; None where there are none."""
    built = hip.code_objects().get(arch) if hip._hip else None
    return isa.compiler(hip.code_object(arch, built[0])) if built else None


def hip_rows(op: Op, arch: str) -> Rows:
    """The same for the operator's code object, as the wheel ships it; and "- <kernel>" -> figures for kernels that no
    large case reaches, in blocks of the most lanes they allow. A code object has no assembly text: no loops here."""
    wave, rows, reached = lookup(arch).wave_size, {}, set()
    kernels = {k.name: k for k in isa.read_elf(hip.code_object(arch, op.name))}
    for case in filter(lambda case: case.large, op.cases()):
        backend = op.backends["hip"]
        with hip.record(arch) as launches:
            args = _moved(arguments(case), "cpu")  # here, since which FP8 type a case draws is up to the architecture
            if backend.supports is None or backend.supports(**args) is None:
                backend.run(**args)
        for launch in launches:
            if launch.op != op.name:  # another operator's kernel, whose own rows have it
                continue
            kernel, shape = kernels[launch.kernel], (launch.kernel, launch.block, launch.lds_bytes)
            if shape not in reached:
                rows[f"{case.id} {kernel.name}"] = isa.figures(
                    kernel, kernel.lds_bytes + launch.lds_bytes, -(-math.prod(launch.block) // wave))
            reached |= {shape, kernel.name}
    return rows | {f"- {name}": isa.figures(kernel, kernel.lds_bytes, kernel.max_block // wave)
                   for name, kernel in kernels.items() if name not in reached}


def kernels(arch: Arch) -> set[str]:
    """Names of the kernels in wave64.triton_ops that `arch` launches, as that folder names them: `_<stem>_kernel`. Not
    Hopper's, and of a kernel in two files, for CDNA and portable, the one."""
    other = "_portable" if arch.matrix == "mfma" else "_cdna"
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{triton_ops.__name__}.")
               and f"{triton_ops.__name__}.hopper." not in name and not name.endswith(other)]
    return {f.__name__ for m in modules for f in vars(m).values()
            if isinstance(f, JITFunction) and f.__name__.endswith("_kernel") and other not in f.__name__}


def measure(backend: str, ops: Iterable[Op], rows: Callable[[Op], Rows]) -> dict[str, Rows | str]:
    """op -> rows, or the error: what does not compile is a finding about that operator only."""
    found: dict[str, Rows | str] = {}
    for op in ops:
        if backend in op.backends:
            try:
                found[op.name] = rows(op)
            except Exception as e:
                found[op.name] = f"{type(e).__name__}: {e}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arch", help="gfx942, gfx950, ...")
    parser.add_argument("ops", nargs="*", metavar="op", default=list(OPS), help="default: every operator")
    parser.add_argument("--backend", choices=("triton", "hip"), help="default: both")
    parser.add_argument("--asm", type=Path, metavar="FOLDER", help="write each Triton kernel's assembly there")
    options = parser.parse_args()
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"op: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    if options.asm:
        options.asm.mkdir(parents=True, exist_ok=True)
    arch, ops, version = options.arch, [OPS[name] for name in options.ops], hip_compiler(options.arch)
    compiled = measure("triton", ops, lambda op: triton_rows(op, arch, options.asm)) if options.backend != "hip" else {}
    built = measure("hip", ops, lambda op: hip_rows(op, arch)) if version and options.backend != "triton" else {}
    print(json.dumps({
        "compilers": {"triton": triton.__version__, "hip": version}, "triton": compiled, "hip": built,
        "kernels": sorted(kernels(lookup(arch)))}))


if __name__ == "__main__":
    main()
