"""The machine: waves of some workgroups, each with its registers and program counter, that advance together.

Waves at the same instruction are a `Party`: a slice of the register arrays, so that one NumPy operation serves them
all and costs what one wave would. The scheduler always runs the waves that are furthest behind, so that waves which
parted at a branch meet again where its arms do. Instructions are bound to a party once, operands resolved to views of
the register arrays (see binding.py), and are then called without arguments.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from wave64.testing.emulator import forms, modes
from wave64.testing.emulator.binding import BARRIER, END, Binding, lanes_of
from wave64.testing.emulator.code_object import CodeObject, Kernel
from wave64.testing.emulator.decode import EXEC, M0, Instruction, decode
from wave64.testing.emulator.memory import EmulationError, Memory, OutOfBounds, Space

ARCHS = ("gfx942", "gfx950")
#: MODE that arithmetic here computes: to nearest, fp16 and fp64 with denormals; fp32 with them, as compilers have it,
#: or without, as much assembly does
MODES = (0xF0, 0xC0)
LANES = 64
SGPRS = 128            # the whole scalar space: registers, VCC, M0, EXEC
PATIENCE = 20_000      # steps of one party after which others get their turn, for they may be what it waits for
READY, WAITING, ENDED = range(3)
FULL = np.uint64(2**64 - 1)


class Program:
    """The instructions of a code object, decoded as they are reached; a pc is a dword of its executable segment."""

    def __init__(self, code: CodeObject):
        self.code = code
        start, end = code.text
        self.text = code.image[start:end]
        self.length = (end - start) // 4
        self.instructions: list[Instruction | None] = [None] * self.length
        self.address = code.image.ctypes.data + start
        self.lowered: dict = {}  # by kernel, what the core makes of the instructions; see core.py

    def at(self, pc: int) -> Instruction:
        if not 0 <= pc < self.length:
            raise EmulationError(f"the program counter left the code, to offset 0x{pc * 4:x}")
        found = self.instructions[pc]
        if found is None:
            found = self.instructions[pc] = decode(self.text[pc * 4:pc * 4 + 16].tobytes())
        return found


@dataclass(frozen=True)
class Shape:
    """What a machine holds: workgroups, waves in each, bytes of LDS in each."""

    groups: int
    waves: int
    lds_bytes: int


class Machine:
    """Registers, LDS and scratch of `shape`, and the run of one kernel on them, batch after batch."""

    def __init__(self, program: Program, kernel: Kernel, shape: Shape, checks: tuple[type, ...] = (),
                 core: str = "auto"):
        """core: "c" executes what it can in C, "numpy" nothing; "auto": C, where there is a compiler for it and it has
        all of the checks."""
        n = shape.groups * shape.waves
        self.program, self.kernel, self.shape, self.memory, self.count = program, kernel, shape, Memory(), n
        self.arch = program.code.arch
        if self.arch not in ARCHS:
            raise NotImplementedError(f"{kernel.name}: code for {self.arch}, expected {' or '.join(ARCHS)}")
        if kernel.mode not in MODES:
            raise NotImplementedError(f"{kernel.name}: starts with MODE 0x{kernel.mode:02x}, expected "
                                      + " or ".join(f"0x{mode:02x}" for mode in MODES))
        self.vgprs = np.zeros((kernel.vgprs, n, LANES), np.uint32)
        self.sgprs = np.zeros((n, SGPRS), np.uint32)
        self.scc = np.zeros(n, bool)
        self.fp16_overflow = np.zeros(n, bool)  # of MODE, the one bit that kernels change
        self.skips, self.indexed = np.zeros(n, bool), np.zeros(n, bool)  # of MODE, too: see modes.py
        self.moded = False                                               # one of these is set for some wave
        self.pcs = np.zeros(n, np.int64)
        self.states = np.zeros(n, np.uint8)
        self.group = np.arange(n) // shape.waves
        self.lds_stride = max(16, -(-shape.lds_bytes // 16) * 16)
        self.lds = Space(np.zeros(shape.groups * self.lds_stride, np.uint8))
        self.scratch_bytes = -(-kernel.scratch_bytes // 16) * 16
        self.scratch = Space(np.zeros(max(16, n * LANES * self.scratch_bytes), np.uint8))
        self.counts = np.zeros(program.length, np.int64)  # wave instructions executed in this batch, by pc
        self.by_numpy: Counter[str] = Counter()  # mnemonic -> those of a machine with a core that NumPy executed
        self.checks = [check(self) for check in checks]
        self.core = _core(self, core)
        self._parties: dict[tuple[int, int, int], Party] = {}

    def start(self, live: int) -> None:
        """All waves of the first `live` workgroups stand at the kernel's entry, EXEC full. Registers, LDS and scratch
        hold what was never written: NaN in every format."""
        self.counts.fill(0)
        self.by_numpy.clear()
        waves = live * self.shape.waves
        self.pcs[:] = (self.kernel.entry - self.program.code.text[0]) // 4
        self.states[:waves], self.states[waves:] = READY, ENDED
        for unwritten in (self.vgprs, self.sgprs, self.lds.u32, self.scratch.u32):
            unwritten.fill(0xFFFFFFFF)
        self.scc[:] = self.skips[:] = self.indexed[:] = self.moded = False
        self.fp16_overflow[:] = self.kernel.fp16_overflow
        for check in self.checks:
            check.start()
        if self.core:
            self.core.start()

    def run(self, seconds: float) -> None:
        """Until every wave has ended. Raises EmulationError where one cannot go on, or after `seconds`."""
        until = time.monotonic() + seconds
        turn = 0  # no wave at an earlier pc runs: 0, unless a party ran out of patience
        while True:
            ready = self.states == READY
            if not ready.any():
                if (self.states == ENDED).all():
                    self.ended()
                    return
                self.meet()
                continue
            ahead = self.pcs[ready]
            if turn and not (ahead >= turn).any():
                turn = 0
                if (self.states == WAITING).any():
                    self.meet(partly=True)
                    continue
            pc = int(ahead[ahead >= turn].min())
            others = ahead[ahead > pc]
            limit = int(others.min()) if others.size else self.program.length
            patient = True
            for piece in progressions(np.flatnonzero(ready & (self.pcs == pc))):
                patient = self.party(*piece).run(pc, limit) > 0 and patient
            if not patient:
                turn = pc + 1
                if time.monotonic() > until:
                    raise EmulationError(f"{self.where(pc)}: still running after {seconds:g} s; do its waves wait "
                                         "for a workgroup that starts only when they have ended?")

    def advance(self, wave: int, steps: int) -> int:
        """Runs a wave that is ready, alone, until it ends, comes to a barrier or has executed `steps` instructions.
        Gives how many it executed."""
        pc = int(self.pcs[wave])
        return steps - self.party(wave, wave + 1, 1).run(pc, self.program.length, steps)

    def ended(self) -> None:
        """Every wave has ended. Who lets waves advance by himself calls it, where something counts."""
        for check in self.checks:
            check.ended()

    def modes_changed(self) -> None:
        self.moded = bool(self.skips.any() or self.indexed.any())

    def release(self) -> None:
        """Ends the machine's use. Its parts refer to each other, and would stay until garbage is looked for."""
        for party in self._parties.values():
            party.bound.clear()
            party.relative.clear()
        self._parties.clear()
        self.checks.clear()
        self.core = None

    def party(self, start: int, stop: int, step: int) -> "Party":
        key = (start, stop, step)
        if key not in self._parties:
            self._parties[key] = Party(self, slice(*key))
        return self._parties[key]

    def where(self, pc: int) -> str:
        """An instruction's pc as error messages show it."""
        address = pc * 4 + self.program.code.text[0]
        line = self.program.code.line(address)
        named = f"{self.kernel.name}+0x{address - self.kernel.entry:x}" + (f" ({line})" if line else "")
        return f"{named}: {self.program.at(pc).text}"

    def meet(self, partly: bool = False) -> None:
        """Lets the workgroups go on whose waves have all come to a barrier."""
        states = self.states.reshape(self.shape.groups, self.shape.waves)
        waiting = (states == WAITING).any(1)
        stuck = waiting & (states == ENDED).any(1)
        if stuck.any():
            group = int(np.flatnonzero(stuck)[0])
            first = group * self.shape.waves + int(np.flatnonzero(states[group] == WAITING)[0])
            raise EmulationError(
                f"{self.where(int(self.pcs[first]) - 1)}: {int((states[group] == WAITING).sum())} waves of a "
                f"workgroup wait at a barrier that {int((states[group] == ENDED).sum())} of its waves never come to: "
                "they have ended")
        met = waiting & (states == WAITING).all(1)
        if not (partly or met.any()):
            raise EmulationError(f"{self.kernel.name}: no wave can go on")
        states[met] = READY
        for check in self.checks:
            check.met(met)


def progressions(waves: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Increasing numbers cut into runs with equal steps: (start, stop, step) of each."""
    at = 0
    while at < len(waves):
        if at + 1 == len(waves):
            yield int(waves[at]), int(waves[at]) + 1, 1
            return
        step = int(waves[at + 1] - waves[at])
        breaks = np.flatnonzero(np.diff(waves[at:]) != step)
        end = at + (int(breaks[0]) + 1 if breaks.size else len(waves) - at)
        if end - at == 2 and step > 1:  # two strangers: the second may start a longer run
            end = at + 1
            step = 1
        yield int(waves[at]), int(waves[end - 1]) + 1, step
        at = end


def _core(machine: Machine, wanted: str):
    """What executes the machine's instructions in C; None: NumPy executes all."""
    from wave64.testing.emulator import core  # which knows the checks, and these the machine

    if wanted not in ("auto", "c", "numpy"):
        raise ValueError(f"core: expected auto, c or numpy, got {wanted!r}")
    fits = all(type(check) in core.CHECKS or isinstance(check, core.Counting) for check in machine.checks)
    if wanted == "numpy" or wanted == "auto" and not (fits and core.available()):
        return None
    if not (fits and core.available()):
        raise RuntimeError(f"core: expected numpy, got c: {core.library() if fits else 'it has not all of the checks'}")
    return core.Core(machine)


class Party:
    """Waves that run in step: views of their registers, and the instructions bound to those."""

    def __init__(self, machine: Machine, waves: slice):
        self.machine, self.waves = machine, waves
        self.V, self.A = machine.vgprs[:, waves], machine.vgprs[machine.kernel.agpr_offset:, waves]
        self.S = machine.sgprs[waves]
        self.S64 = machine.sgprs.view(np.uint64)[waves]
        self.scc = machine.scc[waves]
        self.count = len(self.scc)
        self.group = machine.group[waves]
        self.numbers = np.arange(machine.count)[waves]
        self.exec = self.S64[:, EXEC // 2]
        self.bound: dict[int, Callable] = {}
        self.following: dict[int, int] = {}
        self.skips, self.indexed = machine.skips[waves], machine.indexed[waves]
        self.relative: dict[tuple[int, int], Callable] = {}  # bound with registers relative to M0: by pc and key
        self.mask = np.ones((self.count, LANES), bool)
        self.full = True

    def exec_changed(self) -> None:
        """After a write to EXEC: `mask` and `full` follow."""
        self.full = bool((self.exec == FULL).all())
        self.mask = lanes_of(self.exec)

    def run(self, pc: int, limit: int, patience: int = PATIENCE) -> int:
        """From `pc` until the waves part, end, meet a barrier or come to `limit`, where others stand (or, jumping
        back, come behind them no more). Gives how many steps of `patience` are left: 0 where it ended first."""
        machine, core = self.machine, self.machine.core
        self.exec_changed()
        left, at = patience, pc
        try:
            while left > 0:
                if core is not None and not (machine.moded and (self.skips.any() or self.indexed.any())):
                    outcome, at, left = core.run(self, pc, limit, left)
                    if outcome == core.END:
                        machine.states[self.waves] = ENDED
                        return left
                    if outcome == core.PART:
                        return left
                    if outcome == core.OK:
                        machine.pcs[self.waves] = at
                        return left
                    self.exec_changed()
                if core is not None:
                    machine.by_numpy[machine.program.at(at).name] += self.count
                left -= 1
                on = self._execute(at)
                if on is None:
                    return left
                pc = at = on
                if pc >= limit:
                    machine.pcs[self.waves] = pc
                    return left
        except OutOfBounds as e:
            raise EmulationError(f"{machine.where(at)}: {self._lane(at, e.access)} {e}") from None
        except (EmulationError, NotImplementedError) as e:
            at = at if core is None else core.at(at)
            raise type(e)(f"{self._where(at)}: {e}") from None
        machine.pcs[self.waves] = pc
        return 0

    def _execute(self, pc: int) -> int | None:
        """One instruction, by NumPy. Gives the next one's pc; None where the waves end, wait or part."""
        machine = self.machine
        if machine.moded and modes.is_vector(machine.program.at(pc)):
            return self._by_modes(pc)
        outcome = (self.bound.get(pc) or self._bind(pc))()
        machine.counts[pc] += self.count
        if machine.core is not None:
            machine.core.branched(pc, outcome)
        if outcome is None:
            return self.following[pc]
        if outcome.__class__ is int:
            return outcome
        if outcome is END:
            machine.states[self.waves] = ENDED
            return None
        if outcome is BARRIER:
            machine.states[self.waves] = WAITING
            outcome = self.following[pc]
        machine.pcs[self.waves] = outcome
        return None

    def _by_modes(self, pc: int) -> int:
        """A vector instruction that some waves skip, or take with other registers."""
        machine, instruction = self.machine, self.machine.program.at(pc)
        if not self.indexed.any() and pc not in self.bound:
            self._bind(pc)  # the checks see it, whoever skips it
        awake = self.numbers[~self.skips]
        keys = modes.keys(machine.sgprs[awake, M0], machine.indexed[awake])
        for key in np.unique(keys).tolist():
            for piece in progressions(awake[keys == key]):
                party = machine.party(*piece)
                party.exec_changed()
                execute = party.relative.get((pc, key)) if key else party.bound.get(pc)
                (execute or party._bind(pc, key))()
        machine.counts[pc] += len(awake)
        self.exec_changed()
        return pc + instruction.words

    def _bind(self, pc: int, key: int = 0) -> Callable:
        instruction = self.machine.program.at(pc)
        if key:
            instruction = modes.relative(instruction, key)
        binding = Binding(self, instruction, pc)
        execute = forms.lookup(instruction)(binding)
        for check in self.machine.checks:
            execute = check.wrap(binding, execute)
        if key:
            self.relative[pc, key] = execute
            return execute
        self.following[pc] = pc + instruction.words
        self.bound[pc] = execute
        return execute

    def _where(self, pc: int) -> str:
        try:
            return self.machine.where(pc)
        except NotImplementedError:
            return f"{self.machine.kernel.name}, offset 0x{pc * 4:x} of the code"

    def _lane(self, pc: int, access: int) -> str:
        """Which wave and lane made an access, of those that an instruction made together."""
        lanes = np.argwhere(self.mask)
        if self.machine.program.at(pc).family == "SMEM" or access >= len(lanes):
            return "a wave"
        wave, lane = lanes[access]
        return f"wave {self.numbers[wave] % self.machine.shape.waves}, lane {lane}"
