"""Rows of the software: torch, Triton, the HIP runtime, wave64's code objects, one of which is really loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform as machine_of
from collections.abc import Iterator
from typing import NamedTuple

import torch

from wave64 import platform
from wave64.backends import hip
from wave64.tools.doctor.machine import FAIL, OK, WARN, Machine, Row

TRITON_TESTED = ("3.6", "3.9")
GET_TORCH = "install torch's build for ROCm: https://pytorch.org/get-started/locally (Linux, pip, ROCm)"


class Software(NamedTuple):
    """What this environment has. Text that starts with "no" or an error's words say why something is not there."""

    python: str
    torch: str
    rocm: str | None  # torch.version.hip
    cuda: str | None
    sees_gpu: bool  # torch.cuda.is_available()
    triton: str | None
    runtime: str | None  # the HIP (or CUDA) runtime that wave64 opens
    runtime_error: str
    built: dict[str, list[str]]  # architecture -> operators with code objects
    build_error: str
    kernel: str | None  # what an operator by its code object gave: None where none was tried
    amdsmi: str | None


def this_software() -> Software:
    runtime, runtime_error = None, hip.extension_error or ""
    if not runtime_error:
        try:
            runtime = hip.runtime()
        except RuntimeError as e:
            runtime_error = str(e)
    return Software(f"{machine_of.python_version()} on {machine_of.system()} {machine_of.release()}", torch.__version__,
                    torch.version.hip, torch.version.cuda, torch.cuda.is_available(),
                    version("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"), runtime, runtime_error,
                    {} if hip.extension_error else hip.code_objects(), hip.extension_error or "", run_kernel(),
                    version("amdsmi"))


def version(*packages: str) -> str | None:
    """The version of the first of `packages` that is installed, with its name where that is not the first's."""
    for package in packages:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return found if package == packages[0] else f"{found} ({package})"
    return None


def run_kernel() -> str | None:
    """Loads a code object, runs it on the first GPU and compares: "right", or what is wrong. None without a GPU."""
    if not torch.cuda.is_available():
        return None
    import wave64

    try:
        x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
        with wave64.use(silu_and_mul="hip"):
            found = wave64.ops.silu_and_mul(x)
        gate, up = x.float().chunk(2, dim=-1)
        wanted = torch.nn.functional.silu(gate) * up
        return "right" if torch.allclose(found.float(), wanted, rtol=1e-2, atol=1e-2) else "wrong results"
    except Exception as e:  # whatever keeps the kernel from running is what this row is for
        return f"{type(e).__name__}: {e}".partition("\n")[0]


def software_rows(machine: Machine, software: Software) -> Iterator[Row]:
    amd = bool(machine.gpus() or machine.amd_devices())
    yield Row("python", OK, software.python)
    yield from _torch(software, amd)
    triton = software.triton
    if triton is None:
        yield Row("triton", WARN if amd else OK, "not installed", "operators without a HIP kernel run as the reference",
                  "install the Triton that belongs to torch's ROCm build")
    elif not any(triton.startswith(f"{tested}.") or triton == tested for tested in TRITON_TESTED):
        yield Row("triton", WARN, triton, f"wave64 is tested with {' and '.join(TRITON_TESTED)}: compilers change what "
                  "kernels compute and cost", "python -m wave64 check")
    else:
        yield Row("triton", OK, triton)
    if software.runtime is not None:
        yield _runtime(software)
    else:
        yield Row("HIP runtime", FAIL if amd else OK, "none" if not amd else software.runtime_error,
                  "no kernel of the extension can run" if amd else "", "" if not amd else GET_TORCH)
    yield _code_objects(machine, software)
    if software.kernel is not None:
        right = software.kernel == "right"
        why, command = ("", "") if right else ("this machine's kernels cannot be trusted", "python -m wave64 check")
        yield Row("a kernel", OK if right else FAIL if amd else WARN, f"silu_and_mul: {software.kernel}", why, command)
    yield Row("amdsmi", OK, software.amdsmi or "not installed: throttling is not looked at")


def _torch(software: Software, amd: bool) -> Iterator[Row]:
    made_for = f"ROCm {software.rocm}" if software.rocm else f"CUDA {software.cuda}" if software.cuda else "the CPU"
    found = f"{software.torch}, built for {made_for}"
    if amd and not software.rocm:
        yield Row("torch", FAIL, found, "there is an AMD GPU, which this torch cannot use: pip prefers CUDA's build",
                  GET_TORCH)
    elif amd and not software.sees_gpu:
        yield Row("torch", FAIL, f"{found}; it sees no GPU",
                  "devices, groups or visible-device variables: see their rows",
                  "python -m wave64 doctor, its other rows first")
    else:
        yield Row("torch", OK, found)


def _runtime(software: Software) -> Row:
    return Row("HIP runtime", OK, str(software.runtime))


def _code_objects(machine: Machine, software: Software) -> Row:
    if software.build_error:
        return Row("code objects", FAIL, software.build_error, "HIP kernels are not there",
                   "python3 setup_rocm.py install")
    shown = ", ".join(f"{arch} ({len(ops)})" for arch, ops in software.built.items()) or "none"
    lacking = sorted({gpu.arch for gpu in machine.gpus() if not gpu.integrated} - set(software.built))
    if lacking:
        return Row("code objects", WARN, f"{shown}; none for {', '.join(lacking)}", "operators run on portable kernels",
                   f"python3 setup_rocm.py install --archs '{';'.join(lacking)}'")
    return Row("code objects", OK, shown)


def build_notes() -> list[str]:
    """What compiled for each architecture, and what is missing, as the build has said."""
    if hip.extension_error is not None:
        return []
    return [*hip.compilers().splitlines(), *hip.missing_code_objects().splitlines()]


def backend_table() -> str:
    import wave64

    device = platform.device_name() if torch.cuda.is_available() else platform.device_type()
    return f"\nwhat serves each operator on {device}:\n{wave64.table()}"
