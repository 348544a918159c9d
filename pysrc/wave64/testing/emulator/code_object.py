"""A code object as a loader sees it: segments laid out in memory, kernels, and how their waves start.

Formats: LLVM's "User Guide for AMDGPU Backend" (code object V5 and V6, kernel descriptor of gfx90a to gfx950).
"""

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from wave64.testing import isa
from wave64.testing.emulator import source_lines

PT_LOAD = 1
SHT_RELA = 4
R_AMDGPU_RELATIVE64 = 13
PRELOAD_PROLOGUE_BYTES = 256  # loads kernel arguments for firmware that does not; skipped where hardware preloads


@dataclass(frozen=True)
class Kernel:
    """What the descriptor and the metadata of one kernel say."""

    name: str
    entry: int             # address, relative to where the code object is loaded
    vgprs: int             # AGPRs included
    agpr_offset: int       # the register that is a0
    lds_bytes: int         # declared statically
    scratch_bytes: int     # per lane
    kernarg_bytes: int
    user_sgprs: tuple[str, ...]   # what each holds: "kernarg_lo", "preload", ...
    preload: tuple[int, int]      # (first dword, dwords) of the arguments in SGPRs
    system_sgprs: tuple[str, ...]
    work_item_ids: int     # 0: x, 1: x and y, 2: all
    mode: int              # initial MODE: rounding and denormals
    ieee: bool
    dx10_clamp: bool
    fp16_overflow: bool
    hidden: tuple[tuple[str, int, int], ...]  # (value kind, offset, size) of arguments that the runtime fills
    sgprs: int = 0         # in use

    @property
    def flushes(self) -> bool:
        """Whether MODE has fp32 denormals taken and given as zeros."""
        return not self.mode & 0x30


class CodeObject:
    """Its memory image, and its kernels by name."""

    def __init__(self, code: bytes):
        metadata = isa.metadata(code)
        self._code = code
        #: gives the same machine code with line information, where this one has none and somebody asks
        self.with_lines: Callable[[], bytes | None] | None = None
        self.arch = isa.arch_of(metadata)
        self.image, self.text = _load(code)
        base = self.image.ctypes.data
        _relocate(code, self.image, base)
        symbols = isa.symbols(code)
        self.kernels = {kernel[".name"]: _kernel(kernel, symbols[kernel[".symbol"]], self.image)
                        for kernel in metadata["amdhsa.kernels"]}

    def line(self, address: int) -> str:
        """What source the instruction there came from, "file:line"; "" where the code object does not say. Addresses
        are those of `Kernel.entry`."""
        return source_lines.line_at(self._lines, address)

    @functools.cached_property
    def _lines(self) -> list[source_lines.Row]:
        rows = source_lines.read(self._code)
        if rows or self.with_lines is None or (other := self.with_lines()) is None:
            return rows
        (image, text), own = _load(other), self.image[slice(*self.text)]
        return source_lines.read(other) if text == self.text and np.array_equal(image[slice(*text)], own) else []


@functools.lru_cache(maxsize=64)
def load(code: bytes) -> CodeObject:
    """The same bytes are loaded once."""
    return CodeObject(code)


def _load(code: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    """The image, and the addresses at which its executable segment starts and ends."""
    headers, = struct.unpack_from("<Q", code, 32)
    entry_size, count = struct.unpack_from("<HH", code, 54)
    segments = [struct.unpack_from("<IIQQQQQQ", code, headers + i * entry_size) for i in range(count)]
    loads = [s for s in segments if s[0] == PT_LOAD]
    image = np.zeros((max(address + size for _, _, _, address, _, _, size, _ in loads) + 63) // 64 * 64, np.uint8)
    text = (0, 0)
    for _, flags, offset, address, _, file_size, size, _ in loads:
        image[address:address + file_size] = np.frombuffer(code, np.uint8, file_size, offset)
        if flags & 1:
            text = (address, address + size)
    return image, text


def _relocate(code: bytes, image: np.ndarray, base: int) -> None:
    for kind, offset, _, size, _ in isa.sections(code):
        for at in range(offset, offset + size, 24) if kind == SHT_RELA else ():
            where, info, addend = struct.unpack_from("<QQq", code, at)
            if info & 0xFFFFFFFF != R_AMDGPU_RELATIVE64:
                raise NotImplementedError(f"relocation of kind {info & 0xFFFFFFFF}")
            image[where:where + 8] = np.frombuffer(struct.pack("<Q", base + addend), np.uint8)


def _kernel(metadata: dict[str, Any], address: int, image: np.ndarray) -> Kernel:
    descriptor = image[address:address + 64].tobytes()
    lds, scratch, kernarg, _, entry = struct.unpack_from("<IIIIq", descriptor)
    rsrc3, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", descriptor, 44)
    preload_count, preload_first = preload & 0x7F, preload >> 7
    entry += address + (PRELOAD_PROLOGUE_BYTES if preload_count else 0)
    user = _user_sgprs(properties) + ["preload"] * preload_count
    declared = rsrc2 >> 1 & 0x1F
    if len(user) > declared:
        raise NotImplementedError(f"{metadata['.name']}: {declared} user SGPRs declared, {len(user)} described")
    user += ["unused"] * (declared - len(user))
    system = [name for bit, name in ((7, "x"), (8, "y"), (9, "z"), (10, "info")) if rsrc2 >> bit & 1]
    return Kernel(
        name=metadata[".name"], entry=entry, vgprs=((rsrc1 & 0x3F) + 1) * 8, agpr_offset=((rsrc3 & 0x3F) + 1) * 4,
        lds_bytes=lds, scratch_bytes=scratch, kernarg_bytes=kernarg, user_sgprs=tuple(user),
        preload=(preload_first, preload_count), system_sgprs=tuple(system), work_item_ids=rsrc2 >> 11 & 3,
        mode=rsrc1 >> 12 & 0xFF, ieee=bool(rsrc1 >> 23 & 1), dx10_clamp=bool(rsrc1 >> 21 & 1),
        fp16_overflow=bool(rsrc1 >> 26 & 1),
        hidden=tuple((argument[".value_kind"], argument[".offset"], argument[".size"])
                     for argument in metadata.get(".args", ()) if argument[".value_kind"].startswith("hidden_")),
        sgprs=metadata[".sgpr_count"])


def _user_sgprs(properties: int) -> list[str]:
    """What the user SGPRs hold, in order, as far as the descriptor's kernel code properties say."""
    fields = (("private_segment_buffer", 4), ("dispatch_ptr", 2), ("queue_ptr", 2), ("kernarg", 2), ("dispatch_id", 2),
              ("flat_scratch_init", 2), ("private_segment_size", 1))
    return [f"{name}_{i}" for bit, (name, count) in enumerate(fields) if properties >> bit & 1 for i in range(count)]
