"""Memory as the machine reaches it: addresses of this process, but only inside the buffers that were registered.

A `Space` is bytes that many lanes read and write at once, at offsets; LDS is one. `Memory` is the space that spans all
registered buffers: its offsets come out of `locate`, which raises where an access leaves them.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class EmulationError(RuntimeError):
    """A kernel did what hardware leaves undefined, or what its author did not mean."""


class Space:
    """Bytes, a multiple of 16; offsets are int64 arrays of one dimension, one per access, checked by who calls."""

    def __init__(self, data: np.ndarray):
        self.u8 = data
        self.u16, self.u32 = data.view(np.uint16), data.view(np.uint32)
        self.pairs, self.quads = self.u32.reshape(-1, 2), self.u32.reshape(-1, 4)
        self.changes: int | None = None  # stores and atomics that left other bytes than they found; None: not counted

    def load(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """[accesses, words] uint32; one and two bytes extended by zeros."""
        if width == 1:
            return self.u8[offsets].astype(np.uint32)[:, None]
        low = int(np.bitwise_or.reduce(offsets, initial=0))
        if width == 2 and not low & 1:
            return self.u16[offsets >> 1].astype(np.uint32)[:, None]
        if width == 4 and not low & 3:
            return self.u32[offsets >> 2][:, None]
        if width == 8 and not low & 7:
            return self.pairs[offsets >> 3]
        if width == 16 and not low & 15:
            return self.quads[offsets >> 4]
        if not low & 3:
            return self.u32[(offsets >> 2)[:, None] + np.arange(width // 4)]
        got = self.u8[offsets[:, None] + np.arange(width)]
        return (got.view(np.uint16).astype(np.uint32) if width == 2 else got.view(np.uint32))

    def store(self, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
        """words: [accesses, words] uint32. Where lanes store to the same place, the last one wins."""
        low = int(np.bitwise_or.reduce(offsets, initial=0))
        if width == 1:
            self._put(self.u8, offsets, words[:, 0])
        elif width == 2 and not low & 1:
            self._put(self.u16, offsets >> 1, words[:, 0])
        elif width == 4 and not low & 3:
            self._put(self.u32, offsets >> 2, words[:, 0])
        elif width == 8 and not low & 7:
            self._put(self.pairs, offsets >> 3, words)
        elif width == 16 and not low & 15:
            self._put(self.quads, offsets >> 4, words)
        elif width >= 4 and not low & 3:
            self._put(self.u32, (offsets >> 2)[:, None] + np.arange(width // 4), words)
        else:
            data = np.ascontiguousarray(words.astype(np.uint16) if width == 2 else words).view(np.uint8)
            self._put(self.u8, offsets[:, None] + np.arange(width), data)

    def _put(self, view: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
        if self.changes is not None:
            self.changes += int((view[index] != values.astype(view.dtype)).any())
        view[index] = values

    def atomic(self, offsets: np.ndarray, kind: type, change: Callable, *operands: np.ndarray) -> np.ndarray:
        """new = change(old, *operands), one lane after the other where they meet; gives the old values."""
        view, index = self._aligned(offsets, kind)
        old, left = np.empty(len(offsets), kind), np.arange(len(offsets))
        while left.size:
            _, first = np.unique(index[left], return_index=True)
            now = left[first]
            at = index[now]
            old[now] = view[at]
            self._put(view, at, change(old[now], *(operand[now] for operand in operands)))
            left = np.delete(left, first)
        return old

    def accumulate(self, offsets: np.ndarray, kind: type, change: np.ufunc, operand: np.ndarray) -> None:
        """As `atomic`, where the order does not matter and the old values are not asked for."""
        view, index = self._aligned(offsets, kind)
        elements, which = np.unique(index, return_inverse=True)
        values = view[elements]  # apart, for `at` would copy all of a view that spans its operand, as Memory's does
        change.at(values, which, operand)
        self._put(view, elements, values)

    def _aligned(self, offsets: np.ndarray, kind: type) -> tuple[np.ndarray, np.ndarray]:
        size = np.dtype(kind).itemsize
        if int(np.bitwise_or.reduce(offsets, initial=0)) & (size - 1):
            raise EmulationError(f"an atomic on {size} bytes at an address that is no multiple of {size}")
        return self.u8.view(kind), offsets // size


@dataclass(frozen=True)
class Buffer:
    """Bytes that kernels may touch."""

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Memory(Space):
    """Registered buffers. What lies between them is spanned, never touched: neither stored nor, to the byte, loaded.
    Hardware would let loads go on to the end of a page, but what they find there belongs to another tensor, or to none.
    For kernels that are known to do so, and are right all the same, `register` widens what may be loaded."""

    def __init__(self):
        self.buffers: list[Buffer] = []
        #: called before every access: addresses, width, and `which` of `locate`
        self.watch: Callable[[np.ndarray, int, np.ndarray | None], None] | None = None

    def register(self, buffers: list[Buffer], granule: int = 1) -> None:
        """These and no others from now on. granule: a power of two; loads may take all of the so many bytes, aligned,
        in which a buffer begins or ends."""
        self.buffers = sorted((b for b in buffers if b.size), key=lambda b: (b.start, -b.size))
        starts, ends = (np.array([getattr(b, side) for b in self.buffers], np.uint64) for side in ("start", "end"))
        ends = np.maximum.accumulate(ends)  # one buffer may lie inside another
        self.stored = _Ranges(starts, ends)
        last = np.uint64(granule - 1)
        self.loaded = _Ranges(starts & ~last, ends + last & ~last)
        self.base = int(starts[0]) & ~63
        span = (int(ends[-1]) - self.base + 63) // 64 * 64
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.base)))

    def locate(self, addresses: np.ndarray, width: int, writes: bool = False,
               which: np.ndarray | None = None) -> np.ndarray:
        """Offsets for `addresses` (uint64). Raises OutOfBounds unless all `width` bytes of each are in one buffer.
        which: the accesses of an instruction that these are (bool), where they are not all."""
        if addresses.size:
            if self.watch:
                self.watch(addresses, width, which)
            outside = (self.stored if writes else self.loaded).outside(addresses, width)
            if outside is not None:
                address = int(addresses[outside])
                raise OutOfBounds(outside, f"{'writes' if writes else 'reads'} {width} bytes at 0x{address:x}, "
                                  f"{self.whereabouts(address)}")
        return (addresses - np.uint64(self.base)).view(np.int64)

    def whereabouts(self, address: int) -> str:
        """Where an address lies relative to the nearest buffers, in words."""
        def off(b: Buffer) -> int:
            return b.start - address if address < b.start else max(0, address - b.end)

        near = min(self.buffers, key=off)
        if address < near.start:
            return f"{near.start - address} bytes before {near.name} ({near.size} bytes at 0x{near.start:x})"
        return f"{address - near.start} bytes into {near.name}, which has {near.size} (at 0x{near.start:x})"


class OutOfBounds(EmulationError):
    """`access`: which of the accesses it was."""

    def __init__(self, access: int, text: str):
        super().__init__(text)
        self.access = access


class _Ranges:
    """Sorted ranges of addresses."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray):
        self.starts, self.ends = starts, ends
        self.last = (1, 0)  # the range that held the last access, which mostly holds the next

    def outside(self, addresses: np.ndarray, width: int) -> int | None:
        """The first access that is not all in one range."""
        if self.last[0] <= int(addresses.min()) and int(addresses.max()) + width <= self.last[1]:
            return None
        buffer = np.searchsorted(self.starts, addresses, side="right") - 1
        ends = self.ends[np.maximum(buffer, 0)]
        inside = (buffer >= 0) & (ends >= np.uint64(width)) & (addresses <= ends - np.uint64(width))
        if not inside.all():
            return int(np.flatnonzero(~inside)[0])
        self.last = (int(self.starts[buffer[0]]), int(ends[0]))
        return None
