"""Where we run: HIP, CUDA, CPU or an emulated device, and the architecture of the current device."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from wave64.arch import Arch, lookup, warning

if TYPE_CHECKING:
    from wave64.testing.emulator.device import Device

_target: Arch | None = None
_emulated: "Device | None" = None


@functools.cache
def is_hip() -> bool:
    """True under a ROCm build of torch."""
    return torch.version.hip is not None


def emulated() -> "Device | None":
    """The emulated device (wave64.emulate) whose tensors the CPU's are now, else None."""
    return _emulated


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a GPU's or an emulated one's: to look at its numbers would wait for the device."""
    return _emulated is not None or tensor.device.type != "cpu"


def device_type() -> str:
    """"cuda" (torch's name for HIP devices, too) where a GPU is usable, else "cpu", where an emulated device's tensors
    lie, too."""
    return "cpu" if _emulated is not None else _visible_type()


@functools.cache
def _visible_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """What computes here, in words: "gfx942 (emulated)", torch's name of the GPU, "cpu"."""
    if _emulated is not None:
        return _emulated.name
    return torch.cuda.get_device_name() if device_type() == "cuda" else "cpu"


def streams() -> Any:
    """Streams, events and graphs of the current device: torch.cuda, or what an emulated device has by its names."""
    return torch.cuda if _emulated is None else _emulated.streams


def may_have_gpu() -> bool:
    """Whether there may be a GPU for this build of torch, told without its driver: a process that has asked the driver
    cannot use it in the children that it forks."""
    built = torch.version.hip or torch.version.cuda
    return bool(built) and any(os.path.exists(node) for node in ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg"))


@functools.cache
def _device_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    found = lookup(properties.gcnArchName if is_hip() else f"sm_{properties.major}{properties.minor}")
    if said := warning(found):
        logging.getLogger("wave64").warning("GPU %d: %s", index, said)
    return found


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


@contextlib.contextmanager
def emulating(device: "Device") -> Iterator[None]:
    """Inside, CPU tensors are those of an emulated device, and launchers configure themselves for it."""
    global _emulated
    with target(device.arch.name):
        before, _emulated = _emulated, device
        try:
            yield
        finally:
            _emulated = before
