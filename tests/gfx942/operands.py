"""What operands of an instruction are made of, for models.py: leaves of pseudo-code over registers and memory, the lane
that DPP reads, the part of a register that SDWA takes or fills.
"""

import numpy as np
from bitvectors import Value


class Registers:
    """VGPR[lane][register] of a wave."""

    def __init__(self, words: np.ndarray):
        self.words = words  # [registers, lanes], then [registers]

    def at(self, index: int) -> "Registers | Slot":
        return Registers(self.words[:, index]) if self.words.ndim == 2 else Slot(self.words[index:index + 1])


class Slot:
    """A leaf over a word of an array."""

    def __init__(self, words: np.ndarray):
        self.words, self.width, self.kind = words, 32, "b"

    def read(self, low: int, width: int) -> int:
        return int(self.words[0]) >> low & (1 << width) - 1

    def write(self, low: int, width: int, bits: int) -> None:
        ones = (1 << width) - 1
        self.words[0] = int(self.words[0]) & ~(ones << low) | (bits & ones) << low

    def replace(self, value: Value) -> None:
        self.write(0, value.width, value.bits)


class Bytes:
    """MEM[address] of what starts at `base`; what ends behind `limit` reads as 0, and is not written."""

    def __init__(self, data: np.ndarray, base: int, limit: int):
        self.data, self.base, self.limit = data, base, limit

    def at(self, address: int) -> "MemoryView":
        return MemoryView(self.data, address - self.base, self.limit)


class MemoryView:
    """A leaf over bytes."""

    def __init__(self, data: np.ndarray, first: int, limit: int):
        self.data, self.first, self.limit, self.width, self.kind = data, first, limit, 32, "b"

    def read(self, low: int, width: int) -> int:
        end = self.first + width // 8
        return int.from_bytes(self.data[self.first:end].tobytes(), "little") if end <= self.limit else 0

    def write(self, low: int, width: int, bits: int) -> None:
        end = self.first + width // 8
        if end <= self.limit:
            self.data[self.first:end] = np.frombuffer(bits.to_bytes(width // 8, "little"), np.uint8)

    def replace(self, value: Value) -> None:
        self.write(0, value.width, value.bits)


def dpp_source(control: int, lane: int) -> int | None:
    """The lane that `lane` reads by DPP, or None."""
    row, column, count = lane // 16 * 16, lane % 16, control & 15
    if control <= 0xFF:                       # quad_perm
        return lane // 4 * 4 + (control >> 2 * (lane % 4) & 3)
    if 0x101 <= control <= 0x10F:             # row_shl
        return lane + count if column + count <= 15 else None
    if 0x111 <= control <= 0x11F:             # row_shr
        return lane - count if column >= count else None
    if 0x121 <= control <= 0x12F:             # row_ror
        return row + (column - count) % 16
    if 0x150 <= control <= 0x15F:             # row_newbcast
        return row + count
    moved = {0x130: lane + 1, 0x138: lane - 1, 0x134: (lane + 1) % 64, 0x13C: (lane - 1) % 64, 0x140: row + 15 - column,
             0x141: lane // 8 * 8 + 7 - lane % 8, 0x142: row - 1, 0x143: 31 if lane >= 32 else -1}[control]
    return moved if 0 <= moved < 64 else None


def selected(bits: int, select: int, extend: int) -> int:
    """SDWA: byte 0 to 3, word 0 to 1, all."""
    if select == 6:
        return bits
    width, at = (8, 8 * select) if select < 4 else (16, 16 * (select - 4))
    part = bits >> at & (1 << width) - 1
    return (part - (part >> width - 1 << width)) & 0xFFFFFFFF if extend else part


def placed(bits: int, written: int, old: int, select: int, unused: int) -> list[int] | int:
    """unused: zeros, the sign's copies, or kept."""
    if select == 6:
        return [bits & 0xFFFFFFFF, bits >> 32] if written == 64 else bits & (1 << written) - 1
    width, at = (8, 8 * select) if select < 4 else (16, 16 * (select - 4))
    part = bits & (1 << width) - 1
    if unused == 1:
        return (part - (part >> width - 1 << width) << at) & 0xFFFFFFFF
    return part << at | (old & ~((1 << width) - 1 << at) if unused == 2 else 0)
