"""Where we run: HIP, CUDA or CPU, and the architecture of the current device."""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from wave64.arch import Arch, lookup

_target: Arch | None = None


@functools.cache
def is_hip() -> bool:
    """True under a ROCm build of torch."""
    return torch.version.hip is not None


@functools.cache
def device_type() -> str:
    """"cuda" (torch's name for HIP devices, too) where a GPU is usable, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def may_have_gpu() -> bool:
    """Whether there may be a GPU for this build of torch, told without its driver: a process that has asked the driver
    cannot use it in the children that it forks."""
    built = torch.version.hip or torch.version.cuda
    return bool(built) and any(os.path.exists(node) for node in ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg"))


@functools.cache
def _device_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if is_hip():
        return lookup(properties.gcnArchName)
    return lookup(f"sm_{properties.major}{properties.minor}")


def arch() -> Arch | None:
    """The architecture kernels are launched for: the current device's, or the one named by `target`. None on CPU."""
    if _target is not None:
        return _target
    return _device_arch(torch.cuda.current_device()) if device_type() == "cuda" else None


def compute_units() -> int:
    """Compute units (multiprocessors) to spread blocks over; the table's figure when cross-compiling, 1 on CPU."""
    if _target is not None:
        return _target.compute_units
    if device_type() == "cpu":
        return 1
    return _compute_units(torch.cuda.current_device())


@functools.cache
def _compute_units(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextlib.contextmanager
def target(name: str) -> Iterator[Arch]:
    """Launchers configure themselves for architecture `name` inside the block, whatever machine this is."""
    global _target
    before, _target = _target, lookup(name)
    try:
        yield _target
    finally:
        _target = before
