"""What a kernel asks of a compute unit, counted where it is executed: cycles by unit, LDS conflicts and memory lines
from the real addresses. `wave64.testing.cost` makes bounds of it, and says what they leave out.

Rates:
- Matrix instructions take passes of 4 cycles: table 28 of AMD's CDNA3 and CDNA4 instruction set manuals, as in
  hazards.py. At 4 SIMDs, AMD's compute units and clocks these are AMD's peaks. Shapes that gfx950 shares with gfx942
  take as long there, so only its wider ones reach the peak: 16x16x16 in bf16 is half as fast as 16x16x32.
- A SIMD has 16 lanes: vector instructions take 4 cycles for a wave, in fp64 and integer products too (AMD's peaks in
  fp64; LLVM's scheduling models of gfx942 and gfx950), transcendental ones four times as long.
- A SIMD starts a scalar instruction every 4 cycles. Waits, nops and branches need no scalar unit.
- LDS banks are 4 bytes wide, and 32 of them serve a word each in a cycle, where gfx950 loads 64. Lanes take turns, as
  many as all banks can serve. Loads of 16 bytes have their own order of lanes: AMD's "Avoiding LDS Bank Conflicts" for
  gfx942; of gfx950 it was measured, like the 32 banks of its stores, by HipKittens (Stanford, 2025).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.checks import Check
from wave64.testing.emulator.decode import Instruction
from wave64.testing.emulator.hazards import passes_of
from wave64.testing.emulator.lanes import READ
from wave64.testing.emulator.machine import READY

LINE, SHIFT = 64, 6  # bytes that device memory moves at least; two such are a line of the caches
WAVES = 50           # bits below the wave in a key of (wave, line)
#: LDS banks that serve a word in a cycle: of loads, of stores and atomics
BANKS = {"gfx942": (32, 32), "gfx950": (64, 32)}
IN_TURN = np.arange(64)
#: lane -> when it has its turn, of loads of 16 bytes: four lanes at a time, in each half of a wave alike
WIDE_LOADS = {arch: np.add.outer([0, 32], np.add.outer(4 * np.argsort(fours), range(4)).ravel()).ravel()
              for arch, fours in (("gfx942", [0, 5, 1, 4, 2, 7, 3, 6]), ("gfx950", [0, 3, 5, 6, 1, 2, 4, 7]))}
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_CROSSBAR = ("ds_bpermute", "ds_permute", "ds_swizzle")  # a word of each lane through the LDS unit, none of its memory


@dataclass
class Usage:
    """Of all launches of a kernel, over all waves. Cycles are of one SIMD (lds: of the compute unit)."""

    arch: str
    block_waves: int
    lds_bytes: int          # of a block
    vgprs: int              # that a wave's lanes are given
    sgprs: int
    waves: int = 0
    blocks: int = 0
    instructions: int = 0   # of waves
    cycles: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("matrix", "vector", "transcendental", "scalar", "lds"), 0))
    conflict_free: int = 0  # LDS cycles, were there no conflicts
    requested: int = 0      # bytes of global memory that lanes (scalar loads: waves) asked for
    #: bytes of the lines of 64 and of 128 bytes that each wave's instructions touched
    touched: dict[int, int] = field(default_factory=lambda: {LINE: 0, 2 * LINE: 0})
    barriers: int = 0
    #: loads of global memory, each issued when a wave had waited for the one before: the longest chain of any wave
    chain: int = 0
    lines: set[int] = field(default_factory=set)  # of 64 bytes, that were touched at all

    def once(self, line: int = LINE) -> int:
        """Bytes of the lines, of 64 or 128 bytes, that were touched at all."""
        return line * len(self.lines if line == LINE else {number >> 1 for number in self.lines})


def seen(instruction: Instruction) -> bool:
    """Whether `Counting` has to see each execution of an instruction."""
    return (instruction.family in ("SMEM", "GLOBAL", "FLAT", "MUBUF") or instruction.name in ("s_waitcnt", "s_barrier")
            or instruction.family == "DS" and not instruction.name.startswith(_CROSSBAR))


def unit_of(b: Binding) -> tuple[str, int]:
    """(unit, cycles of it that an instruction takes for a wave); ("", 0) of those counted by their addresses, and of
    those that need none."""
    name, family = b.instruction.name, b.instruction.family
    if name.startswith(("v_mfma", "v_smfmac")):
        return "matrix", 4 * passes_of(b)
    if name.startswith("v_"):
        return ("transcendental", 16) if _TRANSCENDENTAL.match(name) else ("vector", 4)
    if family == "SMEM" or family.startswith("SOP") and family != "SOPP":
        return "scalar", 4
    return "", 0


def lds_cycles(lanes: np.ndarray, offsets: np.ndarray, width: int, banks: int, order: np.ndarray = IN_TURN
               ) -> tuple[int, int]:
    """(cycles, cycles without conflicts) of an access of `width` bytes at `offsets` by the active `lanes`, 64 * wave +
    lane. In its turn a bank serves a word for all who want it, then the next."""
    at_once = min(64, max(1, 4 * banks // max(width, 4)))
    turns = -(-64 // at_once)
    turn = lanes // 64 * turns + order[lanes % 64] // at_once
    words = offsets[:, None] // 4 + np.arange(max(1, width // 4))
    wanted = np.unique(turn[:, None] << 32 | words)
    served = np.bincount((wanted >> 32) * banks + wanted % banks, minlength=(int(turn.max(initial=0)) + 1) * banks)
    longest = served.reshape(-1, banks).max(1)
    return int(longest.sum()), int((longest > 0).sum())


KEPT = 1024  # patterns of accesses to LDS
RING = 64  # vector memory instructions that a wave can have in flight


class Chains:
    """How many loads of global memory come one after another, in the time of a load: a load is back one level after the
    level at which it was issued, a wait takes a wave to the level of what it waits for, and a barrier takes all waves
    of a workgroup to the highest of theirs. Loads that are in flight together are on one level."""

    def __init__(self, count: int):
        self.level = np.zeros(count, np.int64)
        self.issued = np.zeros(count, np.int64)          # vector memory instructions
        self.back = np.zeros((RING, count), np.int64)    # the level at which each of the last ones is back
        self.scalar = np.zeros(count, np.int64)          # ... and at which all scalar loads are

    def start(self) -> None:
        for array in (self.level, self.issued, self.back, self.scalar):
            array.fill(0)

    def vector(self, waves: np.ndarray, loads: bool) -> None:
        """An instruction of vector memory; what it does comes back in order."""
        last = self.back[(self.issued[waves] - 1) % RING, waves]
        self.back[self.issued[waves] % RING, waves] = np.maximum(last, self.level[waves] + loads)
        self.issued[waves] += 1

    def wait(self, waves: np.ndarray, vector: int, scalar: int) -> None:
        """Until at most so many vector memory, and other instructions are in flight."""
        if vector < RING - 1:
            last = np.maximum(self.issued[waves] - vector - 1, -1)
            back = np.where(last >= 0, self.back[last % RING, waves], 0)
            self.level[waves] = np.maximum(self.level[waves], back)
        if scalar == 0:
            self.level[waves] = np.maximum(self.level[waves], self.scalar[waves])

    def meet(self, met: np.ndarray, group: np.ndarray) -> None:
        """met: of each workgroup, whether its waves have come to a barrier. group: of each wave."""
        highest = np.zeros(len(met), np.int64)
        np.maximum.at(highest, group, self.level)
        self.level = np.where(met[group], highest[group], self.level)


class Counting(Check):
    """Adds to the usage of its machine's kernel. `counting()` makes a class, and with it the usages, for one run.

    What an instruction takes by its addresses, and waits, are seen where NumPy executes them, which the core leaves to
    it (`seen`); the others are counted by the machine, whoever executes them."""

    usages: dict[str, Usage]
    _binding: Binding  # of the access that memory reports to
    variants: dict[tuple, str]  # a kernel compiled otherwise, or with other blocks, is counted apart

    def __init__(self, machine):
        super().__init__(machine)
        kernel, shape = machine.kernel, machine.shape
        same = sum(name.split(" ")[0] == kernel.name for name in self.variants.values())
        label = kernel.name if not same else f"{kernel.name} ({same + 1})"
        label = self.variants.setdefault((machine.program, kernel.name, shape.waves, shape.lds_bytes), label)
        fresh = Usage(machine.arch, shape.waves, shape.lds_bytes, kernel.vgprs, kernel.sgprs)
        self.usage = self.usages.setdefault(label, fresh)
        self._seen: list[np.ndarray] = []
        self.chains = Chains(machine.count)
        self._fixed: dict[int, tuple[str, int, int, int]] = {}  # by pc
        self._patterns: dict[tuple, tuple[int, int]] = {}       # accesses of LDS -> their cycles

    def start(self) -> None:
        self.chains.start()
        live = int((self.machine.states == READY).sum())
        self.usage.waves += live
        self.usage.blocks += live // self.machine.shape.waves

    def ended(self) -> None:
        """What instructions take whatever their addresses are, as often as they ran."""
        usage, counts = self.usage, self.machine.counts
        for pc in np.flatnonzero(counts).tolist():
            unit, cycles, crossing, barriers = self._fixed.get(pc) or self._look_up(pc)
            count = int(counts[pc])
            usage.instructions += count
            usage.barriers += barriers * count
            usage.conflict_free += crossing * count
            usage.cycles["lds"] += crossing * count
            if unit:
                usage.cycles[unit] += cycles * count

    def _look_up(self, pc: int) -> tuple[str, int, int, int]:
        """(unit, its cycles, LDS cycles of a crossbar, barriers) of an instruction."""
        machine, instruction = self.machine, self.machine.program.at(pc)
        b: Any = SimpleNamespace(instruction=instruction, fields=instruction.fields, machine=machine)
        crossing = 64 // BANKS[machine.arch][0] if instruction.name.startswith(_CROSSBAR) else 0
        self._fixed[pc] = *unit_of(b), crossing, int(instruction.name == "s_barrier")
        return self._fixed[pc]

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, family = b.instruction.name, b.instruction.family
        if name == "s_waitcnt":
            return self._wait(b.fields.simm16, b.party.numbers, execute)
        if family not in ("SMEM", "GLOBAL", "FLAT", "MUBUF"):
            return execute
        memory, waves, chains, loads = self.machine.memory, b.party.numbers, self.chains, "load" in name

        def located():
            if family == "SMEM":
                chains.scalar[waves] = np.maximum(chains.scalar[waves], chains.level[waves] + loads)
            else:
                chains.vector(waves, loads)
            self._binding = b
            memory.watch = self._located
            try:
                return execute()
            finally:
                memory.watch = None
                self._note_lines()
        return located

    def _wait(self, immediate: int, waves: np.ndarray, execute: Callable) -> Callable:
        vector, scalar = immediate & 15 | immediate >> 10 & 0x30, immediate >> 8 & 15

        def waited():
            self.chains.wait(waves, vector, scalar)
            self.usage.chain = max(self.usage.chain, int(self.chains.level[waves].max(initial=0)))
            return execute()
        return waited

    def met(self, groups: np.ndarray) -> None:
        self.chains.meet(groups, self.machine.group)

    def _located(self, addresses: np.ndarray, width: int, which: np.ndarray | None) -> None:
        b = self._binding
        if b.instruction.family == "SMEM":
            wave = np.arange(len(addresses)) if which is None else np.nonzero(which)[0]
        else:
            wave = np.nonzero(b.party.mask)[0]
            wave = wave if which is None else wave[which]
        self.usage.requested += len(addresses) * width
        addresses = addresses.astype(np.int64)
        self._seen += [wave << WAVES | addresses + further >> SHIFT for further in (0, width - 1)]

    def _note_lines(self) -> None:
        """An instruction has made its accesses."""
        if self._seen:
            lines = np.unique(np.concatenate(self._seen))
            self._seen.clear()
            self.usage.touched[LINE] += len(lines) * LINE
            self.usage.touched[2 * LINE] += len(np.unique(lines >> 1)) * 2 * LINE
            self.usage.lines.update((lines & (1 << WAVES) - 1).tolist())

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        arch, loads = self.machine.arch, access == READ
        order = WIDE_LOADS[arch] if loads and width == 16 else IN_TURN
        banks = BANKS[arch][0 if loads else 1]
        key = b.party.mask.tobytes(), offsets.tobytes(), width, loads
        found = self._patterns.get(key)
        if found is None:  # in a loop they come again
            if len(self._patterns) == KEPT:
                self._patterns.clear()
            found = self._patterns[key] = lds_cycles(np.flatnonzero(b.party.mask), offsets, width, banks, order)
        cycles, conflict_free = found
        self.usage.cycles["lds"] += cycles
        self.usage.conflict_free += conflict_free


def counting() -> type[Counting]:
    return type("Counting", (Counting,), {"usages": {}, "variants": {}})
