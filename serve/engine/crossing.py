"""How a step's arrays reach the device and its results come back, without the host waiting for the device.

On a GPU, all arrays of a step cross in one copy from pinned memory, on a stream of its own: it runs while the device
computes the step before. torch's caching allocators see to it that no memory is used again before it has been read.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 16


class Crossing:
    """Takes arrays of the host to one device. Where that computes on the host's memory, nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, arrays: dict[str, NDArray]) -> dict[str, Tensor]:
        """The arrays, as tensors on the device."""
        if self._side is None:
            return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        pinned = torch.empty(packed_size(arrays), dtype=torch.uint8, pin_memory=True)
        pack(arrays, pinned.numpy())
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._side):
            there = pinned.to(self._device, non_blocking=True)
        computing.wait_stream(self._side)
        there.record_stream(computing)
        return unpack(arrays, there)


def packed_size(arrays: dict[str, NDArray]) -> int:
    """Bytes that they take one behind the other, a few at least."""
    return max(ALIGN, sum(_aligned(array) for array in arrays.values()))


def pack(arrays: dict[str, NDArray], memory: NDArray[np.uint8]) -> None:
    """Copy them into `memory` one behind the other."""
    end = 0
    for array in arrays.values():
        memory[end : end + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        end += _aligned(array)


def unpack(arrays: dict[str, NDArray], memory: Tensor) -> dict[str, Tensor]:
    """Each as a view of bytes that pack() has filled."""
    views, end = {}, 0
    for name, array in arrays.items():
        views[name] = memory[end : end + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        end += _aligned(array)
    return views


def _aligned(array: NDArray) -> int:
    return -(-array.nbytes // ALIGN) * ALIGN


_DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32, "uint8": torch.uint8}


class Fetched:
    """Tensors on their way back to the host."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._event = None
        if tensors and tensors[0].device.type == "cuda":
            self._tensors = [torch.empty_like(each, device="cpu", pin_memory=True) for each in tensors]
            for there, here in zip(tensors, self._tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tensors = tensors

    def wait(self) -> list[Tensor]:
        """The tensors, in main memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
