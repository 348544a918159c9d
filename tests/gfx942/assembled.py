"""Kernels written in assembly, for tests of the emulator: assembled by the clang of the package ziglang, run as
launches are."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.memory import Buffer
from wave64.testing.emulator.run import Counts, execute

_KERNEL = """
.text
.globl {name}
.p2align 8
.type {name},@function
{name}:
{body}
s_endpgm
.rodata
.p2align 6
.amdhsa_kernel {name}
  .amdhsa_group_segment_fixed_size {lds}
  .amdhsa_private_segment_fixed_size {scratch}
  .amdhsa_enable_private_segment {uses_scratch}
  .amdhsa_kernarg_size {arguments}
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_system_sgpr_workgroup_id_y 1
  .amdhsa_system_vgpr_workitem_id 1
  .amdhsa_float_denorm_mode_32 3
  .amdhsa_next_free_vgpr 128
  .amdhsa_accum_offset 64
  .amdhsa_next_free_sgpr 64
.end_amdhsa_kernel
"""
_METADATA = """
.amdgpu_metadata
---
amdhsa.version: [1, 2]
amdhsa.target: amdgcn-amd-amdhsa--{arch}
amdhsa.kernels:
{kernels}
...
.end_amdgpu_metadata
"""
_ENTRY = """  - {{.name: {name}, .symbol: {name}.kd, .kernarg_segment_size: {arguments}, .kernarg_segment_align: 8,
     .group_segment_fixed_size: {lds}, .private_segment_fixed_size: {scratch}, .wavefront_size: 64, .sgpr_count: 64,
     .vgpr_count: 128, .max_flat_workgroup_size: 1024, .args: [{hidden}]}}"""
_HIDDEN = "{{.value_kind: {kind}, .offset: {offset}, .size: {size}}}"


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="wave64-assembled-")


@functools.cache
def assemble(arch: str, kernels: tuple[tuple[str, str], ...], lds: int = 0, scratch: int = 0,
             hidden: tuple[tuple[str, int, int], ...] = ()) -> Path:
    """The code object of kernels (name, body). s[0:1] holds the address of the arguments, s2 and s3 the block's x and
    y, v0 the lane's x, and from bit 10 on its y. hidden: (kind, offset, bytes) of arguments that the runtime fills."""
    sizes = {"lds": lds, "scratch": scratch, "arguments": max([16, *(offset + size for _, offset, size in hidden)]),
             "hidden": ", ".join(_HIDDEN.format(kind=kind, offset=offset, size=size) for kind, offset, size in hidden)}
    text = f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n'
    text += "".join(_KERNEL.format(name=name, body=body, uses_scratch=int(scratch > 0), **sizes)
                    for name, body in kernels)
    text += _METADATA.format(arch=arch, kernels="\n".join(_ENTRY.format(name=name, **sizes) for name, _ in kernels))
    stem = Path(folder().name, f"{arch}-{abs(hash((kernels, lds, scratch, hidden)))}")
    source, made, linked = (stem.with_suffix(suffix) for suffix in (".s", ".o", ".co"))
    source.write_text(text)
    zig = [sys.executable, "-m", "ziglang"]
    for command in ([*zig, "clang", "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", "-o", made, source],
                    [*zig, "ld.lld", "-shared", "-o", linked, made]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return linked


def run(code: Path, kernel: str, given: np.ndarray, result: np.ndarray, *, grid: tuple[int, int] = (1, 1),
        block: tuple[int, int] | int = 64, checks: tuple[type, ...] = ALL,
        seconds: float = 60.0, granule: int = 1, core: str = "auto") -> Counts:
    """Runs a kernel whose arguments are the addresses of two arrays."""
    args = given.ctypes.data.to_bytes(8, "little") + result.ctypes.data.to_bytes(8, "little")
    lanes = block if isinstance(block, tuple) else (block, 1)
    launch = SimpleNamespace(kernel=kernel, code_object=code, grid=(*grid, 1), block=(*lanes, 1), lds_bytes=0,
                             args=args)
    buffers = [Buffer("given", given.ctypes.data, given.nbytes), Buffer("result", result.ctypes.data, result.nbytes)]
    return execute(launch, buffers, checks=checks, seconds=seconds, granule=granule, core=core)
