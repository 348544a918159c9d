"""What the waves of a launch do, cycle by cycle, as a trace that Perfetto and chrome://tracing open.

    python -m wave64 trace rms_norm 5x97 --arch gfx942 --output rms_norm.json.gz
    python -m wave64 trace mla_decode --arch gfx950 --backend triton --workgroups 4

A process of the trace is a workgroup, a thread is a wave. Slices are runs of instructions of one unit (matrix, vector,
transcendental, scalar, LDS with its conflicts, memory), and the time from a wave's coming to a barrier until the last
one has come. Loads and stores are arcs from their issue to the s_waitcnt that has waited for them, with their bytes.
A microsecond of the trace is a cycle. Each wave issues alone, at the rates of `wave64.testing.cost`; memory brings
what is asked for at once. So a trace shows the order of work and who waits at barriers, and no time on a card.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wave64 import OPS, platform
from wave64.testing import contract
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.check import BACKENDS, small_case
from wave64.testing.emulator.cost import BANKS, IN_TURN, WIDE_LOADS, lds_cycles, unit_of
from wave64.testing.emulator.lanes import READ
from wave64.testing.emulator.machine import READY
from wave64.testing.emulator.watch import Check

ISSUE = 4  # cycles in which a SIMD issues an instruction of memory
VECTOR, OTHERS = "vmcnt", "lgkmcnt"  # the counters that s_waitcnt waits for


class Trace:
    """The events of some launches, which follow each other; `workgroups`: of each, the first so many."""

    def __init__(self, workgroups: int = 1):
        self.workgroups = workgroups
        self.events: list[dict[str, Any]] = []
        self.processes = self.threads = self.flights = self.end = 0
        self.checks: list[Any] = []

    def write(self, path: Path, **said: Any) -> int:
        """Writes what was traced, compressed where the name ends in .gz; how many events there are."""
        for check in self.checks:
            check.close()
        self.checks.clear()
        text = json.dumps({"displayTimeUnit": "ns", "otherData": {"unit": "1 us is 1 cycle", **said},
                           "traceEvents": self.events})
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return len(self.events)


class Wave:
    """Where one traced wave stands: its clock, the slice that it is in, and what it has in flight."""

    def __init__(self, trace: Trace, pid: int):
        trace.threads += 1  # from 1 on, none twice: viewers take a thread 0 for the operating system's idle one
        self.trace, self.pid, self.tid = trace, pid, trace.threads
        self.began = self.clock = trace.end
        self.event("X", "", self.began)  # the kernel's slice, which finish() completes: the outer one is the first
        self.whole = trace.events[-1]
        self.unit, self.since, self.count, self.first, self.bytes = "", self.clock, 0, "", 0
        self.flying: dict[str, list[tuple[int, str]]] = {VECTOR: [], OTHERS: []}

    def event(self, ph: str, name: str, ts: int, **fields: Any) -> None:
        self.trace.events.append({"ph": ph, "pid": self.pid, "tid": self.tid, "name": name, "ts": ts, **fields})

    def add(self, unit: str, cycles: int, text: str, moved: int = 0) -> None:
        """An instruction of this unit."""
        if unit != self.unit:
            self.close()
            self.unit, self.first = unit, text
        self.count += 1
        self.bytes += moved
        self.clock += cycles

    def close(self) -> None:
        """The slice ends."""
        if self.unit and self.clock > self.since:
            args = {"instructions": self.count, "first": self.first} | ({"bytes": self.bytes} if self.bytes else {})
            self.event("X", self.unit, self.since, dur=self.clock - self.since, args=args)
        self.unit, self.since, self.count, self.bytes = "", self.clock, 0, 0

    def launch(self, counter: str, name: str, moved: int) -> None:
        """A load or store is on its way."""
        self.trace.flights += 1
        self.flying[counter].append((self.trace.flights, name))
        self.event("b", name, self.clock, cat="memory", id2={"local": hex(self.trace.flights)}, args={"bytes": moved})

    def wait(self, counter: str, left: int) -> None:
        """Until at most so many are on their way."""
        flying = self.flying[counter]
        while len(flying) > left:
            number, name = flying.pop(0)
            self.event("e", name, self.clock, cat="memory", id2={"local": hex(number)})

    def meet(self, at: int) -> None:
        """The last wave of the workgroup has come to the barrier."""
        self.close()
        if at > self.clock:
            self.event("X", "barrier", self.clock, dur=at - self.clock)
        self.clock = self.since = at

    def finish(self, kernel: str) -> None:
        self.close()
        for counter in self.flying:
            self.wait(counter, 0)
        self.whole |= {"name": kernel, "dur": max(self.clock - self.began, 1)}


def tracing(trace: Trace) -> type[Check]:
    """A check, as emulate() and emulate_triton() take them, that adds to the trace."""

    class Tracing(Check):
        def __init__(self, machine):
            super().__init__(machine)
            self.waves: dict[int, Wave] = {}
            self.moved: dict[int, int] = {}  # by wave, of the instruction that is executed
            self.conflicted: dict[int, int] = {}
            self.is_first = True
            trace.checks.append(self)

        def start(self) -> None:
            self.close()
            if not self.is_first:  # batches behind the first have other workgroups
                return
            self.is_first = False
            shape, kernel = self.machine.shape, self.machine.kernel.name
            live = int((self.machine.states == READY).sum()) // shape.waves
            for group in range(min(live, trace.workgroups)):
                pid = trace.processes = trace.processes + 1
                trace.events.append({"ph": "M", "pid": pid, "name": "process_name",
                                     "args": {"name": f"{kernel}, workgroup {group}"}})
                for i in range(shape.waves):
                    self.waves[group * shape.waves + i] = wave = Wave(trace, pid)
                    trace.events.append({"ph": "M", "pid": pid, "tid": wave.tid, "name": "thread_name",
                                         "args": {"name": f"wave {i}"}})

        def close(self) -> None:
            """The traced waves have ended."""
            for wave in self.waves.values():
                wave.finish(self.machine.kernel.name)
            trace.end = max([trace.end, *(wave.clock for wave in self.waves.values())])
            self.waves.clear()

        def wrap(self, b: Binding, execute: Callable) -> Callable:
            name, family = b.instruction.name, b.instruction.family
            numbers, machine = b.party.numbers.tolist(), self.machine
            unit, cycles = unit_of(b)
            in_memory = family in ("SMEM", "GLOBAL", "FLAT", "MUBUF", "SCRATCH")
            text = machine.where(b.pc)

            def traced():
                mine = [self.waves[number] for number in numbers if number in self.waves]
                if not mine:
                    return execute()
                if name == "s_waitcnt":
                    bits = b.fields.simm16
                    for wave in mine:
                        wave.wait(VECTOR, bits & 15 | bits >> 10 & 0x30)
                        wave.wait(OTHERS, bits >> 8 & 15)
                self.moved.clear()
                self.conflicted.clear()
                machine.memory.watch = (lambda *located: self._located(b, *located)) if in_memory else None
                try:
                    outcome = execute()
                finally:
                    machine.memory.watch = None
                for number in numbers:
                    if (wave := self.waves.get(number)) is not None:
                        self._add(wave, number, b, unit, cycles, text)
                return outcome
            return traced

        def _add(self, wave: Wave, number: int, b: Binding, unit: str, cycles: int, text: str) -> None:
            name, family = b.instruction.name, b.instruction.family
            moved = self.moved.get(number, 0)
            if family == "DS":
                wave.add("LDS", self.conflicted.get(number, ISSUE), text)
                wave.launch(OTHERS, name, moved)
            elif family in ("SMEM", "GLOBAL", "FLAT", "MUBUF", "SCRATCH"):
                wave.add("memory", ISSUE, text, moved)
                if moved or family == "SCRATCH":
                    wave.launch(OTHERS if family == "SMEM" else VECTOR, name, moved)
            elif unit:
                wave.add(unit, cycles, text)

        def _located(self, b: Binding, addresses: np.ndarray, width: int, which: np.ndarray | None) -> None:
            if b.instruction.family == "SMEM":
                of = np.arange(len(addresses)) if which is None else np.nonzero(which)[0]
            else:
                of = np.nonzero(b.party.mask)[0]
                of = of if which is None else of[which]
            for number in b.party.numbers[of].tolist():
                self.moved[number] = self.moved.get(number, 0) + width

        def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
            loads, arch = access == READ, self.machine.arch
            order = WIDE_LOADS[arch] if loads and width == 16 else IN_TURN
            lanes = np.flatnonzero(b.party.mask)
            for i, number in enumerate(b.party.numbers.tolist()):
                if number in self.waves and (own := lanes // 64 == i).any():
                    taken, _ = lds_cycles(lanes[own] % 64, offsets[own], width, BANKS[arch][0 if loads else 1], order)
                    self.conflicted[number] = max(ISSUE, taken)
                    self.moved[number] = int(own.sum()) * width

        def met(self, groups: np.ndarray) -> None:
            for group in np.flatnonzero(groups).tolist():
                members = range(group * self.machine.shape.waves, (group + 1) * self.machine.shape.waves)
                waves = [self.waves[number] for number in members if number in self.waves]
                last = max((wave.clock for wave in waves), default=0)
                for wave in waves:
                    wave.meet(last)

    return Tracing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64 trace", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS, metavar="OP")
    parser.add_argument("case", nargs="?", default="", metavar="CASE", help="the first with this in its name")
    parser.add_argument("--arch", choices=("gfx942", "gfx950"), default="gfx942")
    parser.add_argument("--backend", choices=BACKENDS, help="default: hip where the operator has it")
    parser.add_argument("--workgroups", type=int, default=1, help="of each launch (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: OP.json.gz")
    args = parser.parse_args()
    backend, case = small_case(parser, args.op, args.case, args.backend)
    if args.workgroups < 1:
        parser.error(f"--workgroups: expected at least 1, got {args.workgroups}")
    trace, output = Trace(args.workgroups), args.output or Path(f"{args.op}.json.gz")
    with platform.target(args.arch), BACKENDS[backend](args.arch, (tracing(trace),)):
        OPS[args.op].backends[backend].run(**contract.draw(case, "cpu", seed=0))
    count = trace.write(output, op=args.op, case=case.id, arch=args.arch, backend=backend)
    print(f"{output}: {count} events of {trace.processes} workgroups, {trace.end} cycles; open it in ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    sys.exit(main())
