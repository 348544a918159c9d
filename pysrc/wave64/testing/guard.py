"""Bounds of what Triton's interpreter reads and writes on a CPU: inside `watched`, every address that a mask lets
through must lie in memory of a tensor that the launch was given, else the access is not made and `Outside` is raised.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from wave64.op import describe

Range = tuple[int, int, str]


class Outside(RuntimeError):
    """An access to memory of none of the launch's tensors."""


class _Bounds:
    """Of the launch that runs, where its tensors lie."""

    def __init__(self):
        self.kernel, self.ranges, self.fault = "", [], None
        self.last = (1, 0)  # where the last access lay, and mostly the next does
        #: address of a storage -> where, in it, memory is in use, and what to call it; all of others is
        self.known: dict[int, tuple[list[tuple[int, int]], str]] = {}

    def enter(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        ranges = []
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            spans, called = self.known.get(start, ([(0, storage.nbytes())], ""))
            text = f"{called + ', ' if called else ''}{name} of {kernel} ({describe(tensor)})"
            ranges += [(start + low, start + high, text) for low, high in spans if high > low]
        self.kernel, self.ranges, self.last = kernel, sorted(ranges), (1, 0)
        self.starts = np.array([start for start, _, _ in self.ranges], np.uint64)
        self.ends = np.array([end for _, end, _ in self.ranges], np.uint64)

    def check(self, verb: str, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        addresses = np.asarray(addresses).reshape(-1).astype(np.uint64, copy=False)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask, bool).reshape(-1), addresses.shape)]
        if not addresses.size or self.last[0] <= int(addresses.min()) and int(addresses.max()) + size <= self.last[1]:
            return
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        held = at >= 0
        if held.any():
            held &= addresses + np.uint64(size) <= self.ends[np.maximum(at, 0)]
        if held.all():
            self.last = self.ranges[int(at[0])][:2]
            return
        self.fault = f"{verb} {size} bytes {self.whereabouts(int(addresses[~held][0]))}"
        raise Outside(self.fault)

    def whereabouts(self, address: int) -> str:
        if not self.ranges:
            return f"at 0x{address:x}: {self.kernel} was given no tensor"
        start, end, text = min(self.ranges, key=lambda r: r[0] - address if address < r[0] else max(0, address - r[1]))
        if address < start:
            return f"{start - address} bytes before {text}"
        return f"{address - start} bytes into {text}, of {end - start} bytes"


class _Watching:
    """Triton's memory accesses, each checked first."""

    def __init__(self, module, bounds: _Bounds):
        self._module, self._check = module, bounds.check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def load(self, ptrs, mask, other, dtype):
        self._check("loads", ptrs, mask, np.dtype(dtype).itemsize)
        return self._module.load(ptrs, mask, other, dtype)

    def store(self, ptrs, values, mask):
        self._check("stores", ptrs, mask, values.dtype.itemsize)
        return self._module.store(ptrs, values, mask)

    def atomic_rmw(self, kind, ptrs, values, mask, semantics):
        self._check("changes", ptrs, mask, values.dtype.itemsize)
        return self._module.atomic_rmw(kind, ptrs, values, mask, semantics)

    def atomic_cas(self, ptrs, expected, values, semantics):
        self._check("changes", ptrs, None, values.dtype.itemsize)
        return self._module.atomic_cas(ptrs, expected, values, semantics)


@contextlib.contextmanager
def watched(known: dict[int, tuple[list[tuple[int, int]], str]] | None = None) -> Iterator[None]:
    """Inside, interpreted kernels keep to the tensors that they are given; nothing is watched where kernels are
    compiled. known: address of a storage -> (what of it is in use, its name), of those that are more than a tensor.
    Raises Outside when the block ends by an access that does not."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or isinstance(interpreter._interpreter, _Watching):
        yield
        return
    bounds = _Bounds()
    bounds.known.update(known or {})
    executor, module = interpreter.GridExecutor, interpreter._interpreter
    call = executor.__call__

    def launch(self, *args, **kwargs):
        given = dict(zip(inspect.signature(self.fn).parameters, args, strict=False)) | kwargs
        for value in list(given.values()):
            if hasattr(value, "_fields"):  # a NamedTuple of arguments
                given |= value._asdict()
        bounds.enter(self.fn.__name__, {name: x for name, x in given.items() if isinstance(x, Tensor)})
        return call(self, *args, **kwargs)

    executor.__call__, interpreter._interpreter = launch, _Watching(module, bounds)
    try:
        yield
    except Exception:
        if bounds.fault:  # whatever the interpreter made of it
            raise Outside(bounds.fault) from None
        raise
    finally:
        executor.__call__, interpreter._interpreter = call, module
