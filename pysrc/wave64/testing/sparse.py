"""Memory of which a few spans are in use: copies of pools that are larger than the machine's memory may be.

On a CPU such memory is mapped and costs nothing until it is touched, which the kernel of the operating system remembers
for every 4096 bytes: so what reads or writes elsewhere is found.
"""

import ctypes
import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from wave64.op import Case
from wave64.pools import rows_in_use

Spans = list[tuple[int, int]]
#: Linux's MAP_NORESERVE, which Python names from 3.13 on: untouched memory does not count as promised.
NORESERVE = 0x4000


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor whose memory, on a CPU, comes as it is touched, 4096 bytes at a time."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8).view(dtype).view(shape)


class _Undrawn(TorchDispatchMode):
    """Floating point numbers of more than VAST bytes are made without their values: zeros, that come when touched."""

    VAST = 16 << 20

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0] if _vast(args[0]) else func(*args, **kwargs)
        given = pytree.tree_leaves((args, kwargs))
        made = func(*pytree.tree_map(_meta, args), **pytree.tree_map(_meta, kwargs) | (
            {} if any(isinstance(x, Tensor) for x in given) else {"device": "meta"}))
        if isinstance(made, Tensor) and _vast(made):
            flat = empty((made.untyped_storage().nbytes() // made.itemsize,), made.dtype, torch.device("cpu"))
            return flat.as_strided(made.shape, made.stride())
        return func(*args, **kwargs)


def _vast(x: Tensor) -> bool:
    return x.is_floating_point() and x.nbytes > _Undrawn.VAST


def _meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def undrawn(case: Case) -> dict[str, Any]:
    """The arguments of a case on the CPU, of which large tensors of floating point numbers are zeros that take memory
    where they are touched: for who wants to see a few workgroups at work, whatever they compute."""
    torch.manual_seed(0)
    with _Undrawn():
        return case.make()


def spans(pool: Tensor) -> Spans:
    """Bytes of the storage under a sparse pool that are in use, (start, end), in order."""
    row = int(sum((n - 1) * s for n, s in zip(pool.shape[1:], pool.stride()[1:], strict=True))) + 1
    starts = sorted(pool.storage_offset() + i * pool.stride(0) for i in rows_in_use(pool))
    return [(start * pool.element_size(), (start + row) * pool.element_size()) for start in map(int, starts)]


def widened(pool: Tensor) -> Tensor:
    """A sparse pool in fp64, in the same rows of as many."""
    wide = empty(tuple(pool.shape), torch.float64, pool.device)
    for row in rows_in_use(pool):
        wide[row].copy_(pool[row])
    return wide


def held(pool: Tensor, rows: list[int]) -> Tensor:
    """These rows of a pool, one after the other."""
    return torch.stack([pool[row].view(torch.uint8) for row in rows]).view(pool.dtype)


def touched(storage: Tensor, used: Spans) -> int | None:
    """The first byte of memory from `empty`, given as bytes, that somebody read or wrote outside the pages of memory
    of the spans; None where that is not known, or on a device that does not know."""
    if storage.device.type != "cpu":
        return None
    resident = np.zeros(-(-storage.numel() // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.numel()),
                    ctypes.c_void_p(resident.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    for start, end in used:
        resident[start // mmap.PAGESIZE:-(-end // mmap.PAGESIZE)] = 0
    found = np.flatnonzero(resident & 1)
    return int(found[0]) * mmap.PAGESIZE if found.size else None
