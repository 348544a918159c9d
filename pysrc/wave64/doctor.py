"""What this machine has and what wave64 makes of it: `python -m wave64.doctor`."""

import importlib.metadata
import platform as machine

import torch

import wave64
from wave64 import platform
from wave64.backends import hip


def version(*packages: str) -> str | None:
    """The version of the first of `packages` that is installed, with its name where that is not the first's."""
    for package in packages:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return found if package == packages[0] else f"{found} ({package})"
    return None


def torch_build() -> str:
    rocm, cuda = torch.version.hip, torch.version.cuda
    return f"{torch.__version__}, built for {f'ROCm {rocm}' if rocm else f'CUDA {cuda}' if cuda else 'CPU'}"


def gpus() -> list[str]:
    """One line per GPU that torch sees: name, memory, and the capability table's row."""
    lines = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            arch = platform.arch()
        assert arch is not None, "there is a GPU"
        lines.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {arch.name}: "
                     f"wave of {arch.wave_size}, {arch.lds_bytes // 1024} KiB of LDS, "
                     f"{arch.matrix or 'no'} matrix cores, FP8 {arch.fp8 or 'none'}")
    return lines


def code_objects() -> list[str]:
    if hip.extension_error:
        return [f"none: {hip.extension_error}"]
    lines = [f"{arch}: {', '.join(ops)}" for arch, ops in hip.code_objects().items()]
    return lines + hip.missing_code_objects().splitlines()


def hip_runtime() -> list[str]:
    if hip.extension_error:
        return []
    try:
        return [hip.runtime()]
    except RuntimeError as e:
        return [str(e)]


def facts() -> list[tuple[str, list[str]]]:
    triton = version("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton")
    return [
        ("wave64", [version("wave64") or "not installed (running from the source tree)"]),
        ("python", [f"{machine.python_version()} on {machine.system()} {machine.release()}, {machine.machine()}"]),
        ("torch", [torch_build()]),
        ("triton", [triton or "not installed"]),
        ("hip runtime", hip_runtime()),
        ("gpu", gpus() or ["none that torch can use"]),
        ("code objects", code_objects()),
        ("compilers", hip.compilers().splitlines() if hip.extension_error is None else []),
    ]


def main() -> None:
    for name, values in facts():
        for i, value in enumerate(values):
            print(f"{name if i == 0 else '':14}{value}")
    print()
    print(wave64.table())


if __name__ == "__main__":
    main()
