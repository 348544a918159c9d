"""What a kernel asks of a compute unit, counted where it is executed: cycles by unit, LDS conflicts and memory lines
from the real addresses. `wave64.testing.cost` makes bounds of it.

Rates are AMD's published ones (CDNA3 and CDNA4 instruction set manuals, "AMD matrix cores" on its blog). Left out: that
instructions wait for each other, issue limits, cache hits, the time that a line takes to come.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.checks import Check
from wave64.testing.emulator.machine import READY

LINE = 128  # bytes of a line of the L2 cache
#: floating-point operations of the matrix cores of a SIMD in a cycle, by the dtype of the factors
MATRIX_RATES = {"gfx942": {"f64": 64, "f32": 64, "f16": 512, "bf16": 512, "i8": 1024, "fp8": 1024, "bf8": 1024},
                "gfx950": {"f64": 32, "f32": 64, "f16": 1024, "bf16": 1024, "i8": 2048, "fp8": 2048, "bf8": 2048,
                           "f8f6f4": 2048}}
#: LDS banks of 4 bytes, each of which serves one word in a cycle
BANKS = {"gfx942": 32, "gfx950": 64}
_MATRIX = re.compile(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?(f64|f32|f16|bf16|i8|fp8|bf8|f8f6f4)")
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_QUARTER = re.compile(r"v_(mul_lo_u32|mul_hi_[iu]32|mad_[iu]64_[iu]32)|v_\w+_f64")


@dataclass
class Usage:
    """Of one kernel's launches, over all waves. Cycles are of one SIMD (lds: of the compute unit)."""

    arch: str
    block_waves: int
    lds_bytes: int          # of a block
    vgprs: int              # that a wave's lanes are given
    waves: int = 0
    blocks: int = 0
    cycles: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("matrix", "vector", "transcendental", "scalar", "lds"), 0))
    conflict_free: int = 0  # LDS cycles, were there no conflicts
    requested: int = 0      # bytes of global memory that lanes asked for
    touched: int = 0        # bytes of the lines that each wave's instructions touched
    barriers: int = 0
    lines: set[int] = field(default_factory=set)  # that were touched at all

    @property
    def compulsory(self) -> int:
        """Bytes that must come from, or go to, device memory at least once."""
        return len(self.lines) * LINE


def unit_of(name: str, family: str, arch: str) -> tuple[str, int]:
    """(unit, cycles of it that an instruction takes for a wave); ("", 0) of those counted by their addresses."""
    if name.startswith("v_mfma"):
        found = _MATRIX.match(name)
        if not found:
            raise NotImplementedError(f"no rate of {name} is known")
        m, n, k, blocks = (int(x) if x else 1 for x in found.groups()[:4])
        return "matrix", max(4, 2 * m * n * k * blocks // MATRIX_RATES[arch][found[5]])
    if family.startswith(("SOP", "SMEM")):
        return "scalar", 4
    if family in ("DS", "GLOBAL", "FLAT", "SCRATCH", "MUBUF"):
        return "", 0
    if _TRANSCENDENTAL.match(name):
        return "transcendental", 16
    return "vector", 16 if _QUARTER.match(name) else 4


def lds_cycles(offsets: np.ndarray, width: int, banks: int) -> tuple[int, int]:
    """(cycles, cycles without conflicts) of one wave's access of `width` bytes at `offsets`, of active lanes in order:
    as many lanes at a time as all banks can serve; a bank serves a word for all who want it, then the next."""
    lanes, words = max(1, 4 * banks // max(width, 4)), max(1, width // 4)
    total, groups = 0, 0
    for first in range(0, len(offsets), lanes):
        wanted = np.unique((offsets[first:first + lanes, None] // 4 + np.arange(words)).ravel())
        total += int(np.bincount(wanted % banks, minlength=banks).max())
        groups += 1
    return total, groups


class Counting(Check):
    """Adds to the usage of its machine's kernel. `counting()` makes a class, and with it the usages, for one run."""

    usages: dict[str, Usage]

    def __init__(self, machine):
        super().__init__(machine)
        kernel, shape = machine.kernel, machine.shape
        fresh = Usage(machine.arch, shape.waves, shape.lds_bytes, kernel.vgprs)
        self.usage = self.usages.setdefault(kernel.name, fresh)

    def start(self) -> None:
        live = int((self.machine.states == READY).sum())
        self.usage.waves += live
        self.usage.blocks += live // self.machine.shape.waves

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, family, count = b.instruction.name, b.instruction.family, b.party.count
        unit, cycles = unit_of(name, family, self.machine.arch)
        usage, memory = self.usage, self.machine.memory

        def counted():
            if unit:
                usage.cycles[unit] += cycles * count
                usage.barriers += count if name == "s_barrier" else 0
                if family != "SMEM":
                    return execute()
            self._binding = b
            memory.watch = self._located
            try:
                return execute()
            finally:
                memory.watch = None
        return counted

    def _located(self, addresses: np.ndarray, width: int) -> None:
        party, usage = self._binding.party, self.usage
        lines = (addresses // np.uint64(LINE)).astype(np.int64)
        usage.requested += len(addresses) * width
        wave = np.nonzero(party.mask)[0]
        if len(wave) == len(lines):
            usage.touched += len(np.unique(wave * 2**42 + lines)) * LINE
        else:
            usage.touched += len(np.unique(lines)) * LINE
        usage.lines.update(np.unique(lines).tolist())

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        waves = np.nonzero(b.party.mask)[0]
        for wave in np.unique(waves):
            cycles, least = lds_cycles(offsets[waves == wave], width, BANKS[self.machine.arch])
            self.usage.cycles["lds"] += cycles
            self.usage.conflict_free += least


def counting() -> type[Counting]:
    return type("Counting", (Counting,), {"usages": {}})
