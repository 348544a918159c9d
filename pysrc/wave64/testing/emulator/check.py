"""Holds operators' machine code to the contract, executed on the emulator: what a kernel developer without a GPU runs.

    python -m wave64.testing.emulator.check gfx942 rms_norm              both backends, a line each
    python -m wave64.testing.emulator.check gfx942 rms_norm --case 5x97  cases with this in their name
    python -m wave64.testing.emulator.check gfx950 --backend triton --json

Without names: every operator. Cases marked large are left out. What is not executing is compiling, by Triton where its
cache lacks a kernel, and the reference. The exit status is 1 where a case broke the contract or could not be executed.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from wave64 import OPS, platform
from wave64.op import Case, Op
from wave64.testing import contract
from wave64.testing.emulator.jit import emulate_triton
from wave64.testing.emulator.run import Counts, emulate

BACKENDS = {"hip": emulate, "triton": emulate_triton}


def small_case(parser: argparse.ArgumentParser, name: str, text: str, backend: str | None) -> tuple[str, Case]:
    """What a command runs of this operator: the backend (without one, hip where the operator has it), and the first
    case that is not large with this text in its name. The command ends with a line where the operator has none."""
    op = OPS[name]
    backend = backend or ("hip" if "hip" in op.backends else "triton")
    case = next((case for case in op.cases() if text in case.id and not case.large), None)
    if case is None:
        parser.error(f"{name} has no small case with {text!r} in its name")
    if backend not in op.backends:
        parser.error(f"{name} has no {backend} kernel")
    return backend, case


@dataclass
class Result:
    """Of one operator's backend: cases that kept the contract, that it declined, that broke it and why; what ran."""

    op: str
    backend: str
    arch: str
    passed: int = 0
    declined: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    kernels: list[tuple[str, str]] = field(default_factory=list)  # (code object, kernel)
    keys: list[str] = field(default_factory=list)  # of Triton's binaries, see compile.Launch
    launches: int = 0
    waves: int = 0
    instructions: int = 0
    seconds: float = 0.0
    executing: float = 0.0  # of the seconds

    def line(self) -> str:
        text = (f"{self.op:40} {self.backend:7} {self.arch}  {self.passed:3} cases kept the contract, "
                f"{self.instructions:10,} instructions of {self.waves:7,} waves in {self.seconds:5.1f} s, "
                f"{self.executing:5.1f} s of it executing")
        text += f", {self.declined} declined" if self.declined else ""
        return "\n".join([text, *(f"    {case}: {why}" for case, why in self.failures.items())])


def check(op: Op, backend: str, arch: str, cases: list[Case]) -> Result:
    """Runs the cases one after another; a failure is kept, and the next case runs."""
    result, own = Result(op.name, backend, arch), op.backends[backend]
    began, kernels, keys = time.monotonic(), set(), set()

    def run(**args: Any) -> Any:
        with BACKENDS[backend](arch) as counts:
            returned = own.run(**args)
        add(counts)
        return returned

    def add(counts: Counts) -> None:
        kernels.update(counts.kernels)
        keys.update(counts.keys)
        result.launches += counts.launches
        result.waves += counts.waves
        result.instructions += counts.instructions
        result.executing += counts.seconds

    with platform.target(arch):
        for case in cases:
            try:
                if own.supports is not None and own.supports(**contract.draw(case, "cpu", 0)):
                    result.declined += 1
                    continue
                contract.verify(op, backend, case, "cpu", run=run)
                result.passed += 1
            except Exception as e:  # whatever a kernel does wrong is a finding; the other cases still run
                result.failures[case.id] = f"{type(e).__name__}: {e}"
    result.kernels, result.keys, result.seconds = sorted(kernels), sorted(keys), time.monotonic() - began
    return result


def check_case(op: str, backend: str, arch: str, case: str) -> Result:
    """One case, all by name: what a process can be asked for."""
    return check(OPS[op], backend, arch, [one for one in OPS[op].cases() if one.id == case])


def results(arch: str, backends: list[str], ops: list[Op], part: str = "",
            first: int | None = None) -> Iterator[Result]:
    """One after another, of operators that have the backend and a case to run."""
    for op in ops:
        for backend in backends:
            if backend in op.backends:
                cases = [case for case in op.cases() if not case.large and part in case.id]
                if cases:
                    yield check(op, backend, arch, cases[:first])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64.testing.emulator.check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=("gfx942", "gfx950"))
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: both")
    parser.add_argument("--case", default="", help="cases with this in their name only")
    parser.add_argument("--first", type=int, metavar="N", help="only the first so many cases of each operator")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of text")
    args = parser.parse_args()
    if unknown := [name for name in args.ops if name not in OPS]:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(OPS)}")
    gc.disable()  # it would look through the instructions that machines hold, which `release` lets go, over and over
    failed = False
    ops = [OPS[name] for name in args.ops or OPS]
    for result in results(args.arch, args.backend, ops, args.case, args.first):
        failed |= bool(result.failures)
        print(json.dumps(asdict(result)) if args.json else result.line(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
