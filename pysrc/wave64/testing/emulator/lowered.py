"""One instruction as the core takes it: a handler of core/ by its name, and operands as plain numbers.

What is read and written is noted as a binding notes it, so that the checks need no binding of what the core executes.
"""

import functools
import re
import struct
from typing import Any

import numpy as np

from wave64.testing.emulator.binding import BITWISE, DENORMALS_MATTER, FLOATS, SIZES, inline_constant, literal_constant
from wave64.testing.emulator.code_object import Kernel
from wave64.testing.emulator.decode import EXEC, EXECZ, LITERAL, M0, SCC, VCCZ, VGPR0, Instruction
from wave64.testing.emulator.waits import Waits
from wave64.testing.emulator.watch import SCALAR, registers

# as core.h has them
NONE, VECTOR, ONE, CONSTANT, SCC_BIT, VCCZ_BIT, EXECZ_BIT = range(7)
NEGATE, ABSOLUTE, HIGH, FLUSH, QUIET = 1, 2, 4, 8, 16
PLAIN, LOW_KEPT, HIGH_KEPT = range(3)
DPP, SDWA, CMPX = 1, 2, 4
BY_LANE, BY_ALL, MATTERS, FROM_MEMORY, CHOSEN, OWN, UNSEEN = range(7)
VM, LGKM, UNORDERED = 1, 2, 4
SIGNED, LOW_HALF, HIGH_HALF = 32, 64, 128
SOURCES, READS, WRITES, WATCHED = 6, 8, 3, 9
LAYOUT = struct.Struct("<Q3i2H13B3x" + SOURCES * "2BH4B2I" + (READS + WRITES + WATCHED) * "2H")
NO_SOURCE = (0,) * 9
CHOOSES = re.compile(r"v_(pk_)?(max|min|med)")  # to which signalling NaNs are not as others


class Unknown(Exception):
    """The core has no handler for this."""


@functools.cache
def _inline(code: int, kind: str) -> int:
    return _bits(inline_constant(code, kind))


def _bits(value: np.generic) -> int:
    return int(np.asarray(value).view(f"u{value.dtype.itemsize}"))


class Lowered:
    """One instruction, lowered. reads, writes: as a binding has them."""

    def __init__(self, instruction: Instruction, kernel: Kernel, arch: str):
        self.instruction, self.fields, self.kernel, self.arch = instruction, instruction.fields, kernel, arch
        self.reads: list[tuple[str, int, int]] = []
        self.writes: list[tuple[str, int, int]] = []
        self.src: list[tuple] = []
        self.handler = self.suffix = ""
        self.imm = self.more = self.jump = self.dst = self.mask = self.modifier = self.half = self.omod = 0
        self.clamp = self.select = self.unused = 0
        self.flush = 0  # of a result of fp32
        self.canonical = FLUSH * kernel.flushes | QUIET * (not kernel.ieee)  # of sources of fp32
        self.rule = BY_LANE
        self.machine: Any = None  # this and the next as a binding has them, while a check looks at it
        self.pc = 0
        self.unheeded = 0   # of the reads, how many at the end the handler itself looks at
        self.exchange: tuple[np.ndarray, np.ndarray, np.ndarray, bool] | None = None  # lanes, there, written, zero

    def number(self, field: str) -> int:
        return self.instruction.number(field)

    def literal(self) -> int:
        assert self.instruction.literal is not None
        return self.instruction.literal

    # ---- operands, each of which is noted

    def note(self, into: list, register: int, count: int, agpr: bool = False) -> int:
        register += self.kernel.agpr_offset if agpr else 0
        if register + count > self.kernel.vgprs:
            raise Unknown
        into.append(("v", register, count))
        return register

    def source(self, code: int, kind: str, modifiers: int = 0, agpr: bool = False, select: tuple = (0, 0, 0)) -> None:
        size = SIZES[kind]
        modifiers |= self.by_mode(kind)
        if modifiers & (NEGATE | ABSOLUTE) and kind not in FLOATS:
            raise Unknown
        if code >= VGPR0:
            register = self.note(self.reads, code - VGPR0, max(1, size // 4), agpr)
            self.src.append((VECTOR, modifiers, register, *select, 0, 0, 0))
        elif code == LITERAL or 128 <= code <= 248:
            self.src.append(self._constant(code, kind, modifiers, select))
        elif code in (SCC, VCCZ, EXECZ):
            self.src.append(({SCC: SCC_BIT, VCCZ: VCCZ_BIT, EXECZ: EXECZ_BIT}[code], modifiers, 0, *select, 0, 0, 0))
        elif (code < 124 or code in (M0, EXEC, EXEC + 1)) and not (size == 8 and code & 1):
            self.reads.append(("s", code, max(1, size // 4)))
            self.src.append((ONE, modifiers, code, *select, 0, 0, 0))
        else:
            raise Unknown

    def by_mode(self, kind: str) -> int:
        """What the kernel's MODE does to a source. Raises Unknown where NumPy has to see to it."""
        name = self.instruction.name
        if kind not in FLOATS or not self.canonical or name.startswith(BITWISE):
            return 0
        if self.kernel.flushes and name.startswith(DENORMALS_MATTER) or kind != "f" and CHOOSES.match(name):
            raise Unknown
        return self.canonical if kind == "f" else 0

    def _constant(self, code: int, kind: str, modifiers: int, select: tuple) -> tuple:
        size = SIZES[kind]
        if code == LITERAL:
            value = _bits(literal_constant(self.literal(), kind))
            if modifiers & HIGH and size == 2:
                value = self.literal() >> 16
        elif code in (*range(128, 209), *range(240, 249)):
            value = _inline(code, kind)
        else:
            raise Unknown
        return CONSTANT, modifiers, 0, *select, 0, value & 0xFFFFFFFF, value >> 32

    def immediate(self, value: int) -> None:
        self.src.append((CONSTANT, 0, 0, 0, 0, 0, 0, value & 0xFFFFFFFF, 0xFFFFFFFF if value < 0 else 0))

    def nothing(self) -> None:
        self.src.append(NO_SOURCE)

    def vector_result(self, register: int, words: int = 1, agpr: bool = False) -> None:
        self.dst = self.note(self.writes, register, words, agpr)

    def scalar_result(self, register: int, words: int) -> None:
        if words == 2 and register & 1:
            raise Unknown
        self.writes.append(("s", register, words))
        self.dst = register

    def mask_result(self, register: int) -> None:
        if register & 1:
            raise Unknown
        self.writes.append(("s", register, 2))
        self.mask = register

    # ---- to bytes

    def pack(self, address: int, exchange: int) -> bytes:
        """address: of the handler; exchange: number of the lanes that it exchanges."""
        name, family = self.instruction.name, self.instruction.family
        counters = Waits._counters(name, family)
        counter = sum({"vm": VM, "lgkm": LGKM}[c] for c in counters)
        if counters and family in ("SMEM", "FLAT"):
            counter |= UNORDERED
        reads, writes = _ranges(self.reads[:len(self.reads) - self.unheeded]), _ranges(self.writes)
        if counters:
            written = set(registers(self.writes))
            all_read = [r for r in registers(self.reads) if r not in written]
            watched = _joined(all_read + (list(written) if len(counters) > 1 else []))
        else:
            watched = reads + writes
        if len(reads) > READS or len(writes) > WRITES or len(watched) > WATCHED:
            watched = _joined(registers(self.reads + self.writes)) if not counters else watched
            reads, writes = _joined(registers(self.reads)), _joined(registers(self.writes))
            if len(reads) > READS or len(writes) > WRITES or len(watched) > WATCHED:
                address = 0
                reads = writes = watched = []
        more = exchange if self.exchange is not None else self.more
        flat: list[int] = []
        for each in self.src + [NO_SOURCE] * (SOURCES - len(self.src)):
            flat += each
        for ranges, capacity in ((reads, READS), (writes, WRITES), (watched, WATCHED)):
            for each in ranges:
                flat += each
            flat += [0] * (2 * (capacity - len(ranges)))
        return LAYOUT.pack(address, self.imm, more, self.jump, self.dst, self.mask, self.instruction.words, self.rule,
                           counter, self.modifier, self.half, self.omod, self.clamp, self.select, self.unused,
                           len(reads), len(writes), len(watched), self.flush, *flat)


def _ranges(noted: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((first + SCALAR if kind == "s" else first, count) for kind, first, count in noted))


def _joined(numbers: list[int]) -> list[tuple[int, int]]:
    """Registers as ranges (first, count)."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found
