"""What the emulator's tests launch of what the package ships and of what its launchers launch, found by recording
launches, without executing or compiling them."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import recorded
from shrunken import KINDS, SHRINKING, VAST_BYTES, Problem
from torch import Tensor

from wave64 import OPS, platform, tuning
from wave64.arch import lookup
from wave64.backends import hip
from wave64.op import Case, Op
from wave64.testing import contract, tune
from wave64.testing.emulator import code_object
from wave64.testing.emulator.check import Result, check, check_case

ARCHS = ("gfx942", "gfx950")
#: A large case whose arguments take no more bytes is executed as it is.
SMALL_BYTES = 2 * 1024 * 1024


def small_cases(backend: str) -> list[tuple[Op, Case]]:
    """Those that the emulator's tests hold to the contract: of every operator that has the backend, but collectives,
    which ranks run side by side (test_collectives.py)."""
    return [(op, case) for op in OPS.values() if backend in op.backends and "group" not in op.signature.parameters
            for case in op.cases() if not case.large]


# ---- HIP

def hip_symbols(arch: str) -> set[tuple[str, str]]:
    """(operator, kernel) of every kernel in the code objects that the package has for `arch`."""
    return {(op, kernel) for op in hip.code_objects().get(arch, ())
            for kernel in code_object.load(hip.code_object(arch, op)).kernels}


def hip_launched(arch: str, cases: list[tuple[Op, Case]]) -> set[tuple[str, str]]:
    """(operator, kernel) of every kernel that the cases launch, as far as the backend does not decline them."""
    found = set()
    for op, case in cases:
        own = op.backends["hip"]
        with platform.target(arch):
            args = contract.draw(case, "cpu", seed=0)
            if own.supports is None or own.supports(**args) is None:
                with hip.record(arch) as launches:
                    own.run(**args)
                found |= {(launch.op, launch.kernel) for launch in launches}
    return found


# ---- tuned rows

Row = tuple[str, int]  # operator, place in its table for the architecture


def tables(arch: str) -> dict[str, tuning.Table]:
    """Operator -> the table that it reads, where that is the architecture's own; two operators may share one."""
    found = {op: tune.tuning_of(OPS[op]).table(lookup(arch)) for op in tune.tunable()}
    return {op: table for op, table in found.items() if table.arch == arch}


def row_of(table: tuning.Table, key: dict[str, Any]) -> int:
    return next(i for i, row in enumerate(table.rows) if row.fits(key, table.file))


def config_of(op: Op, arch: str, row: int | None) -> Any:
    """What launchers take; None: what the table says."""
    if row is None:
        return None
    table = tables(arch)[op.name]
    return tuning.build(tune.tuning_of(op).config, table.rows[row], table.file)


@contextlib.contextmanager
def configured(op: Op, config: Any) -> Iterator[None]:
    with tune.tuning_of(op).forced(config) if config is not None else contextlib.nullcontext():
        yield


def kind_of(op: str, tuning_key: dict[str, Any]) -> dict[str, Any]:
    return next((kind for kind in KINDS.get(op, ()) if kind.items() <= tuning_key.items()), {})


def reachable(op: str, table: tuning.Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, a tuning key for which it is chosen) of every kind of key for which there is one."""
    bounds = {name: {1, *ends, max(ends) + 1} for name, ends in tune.tuning_of(OPS[op]).buckets.items()}
    exact: dict[str, set] = {}
    for row in table.rows:
        for name, wanted in row.when.items():
            if isinstance(wanted, list):
                bounds.setdefault(name, set()).update(n for n in wanted if n is not None)
            else:
                exact.setdefault(name, {True, False} if isinstance(wanted, bool) else set()).add(wanted)
    found = {}
    for kind in KINDS.get(op, [{}]):
        open_ = {name: sorted(values) for name, values in bounds.items()}
        open_ |= {name: sorted(values) for name, values in exact.items() if name not in kind}
        for values in itertools.product(*open_.values()):
            tuning_key = dict(zip(open_, values, strict=True)) | kind
            found.setdefault((row_of(table, tuning_key), *kind.values()), tuning_key)
    return ((row, tuning_key) for (row, *_), tuning_key in sorted(found.items(), key=lambda item: item[0][0]))


# ---- Triton's binaries

@dataclass(frozen=True)
class Shrunken:
    """A problem that is executed for the binaries `keys`, which nothing before it launches, or for a row."""

    op: str
    name: str
    make: Problem | None             # None: the operator's own large case of this name
    row: int | None                  # whose configuration launchers take, whatever the table says of so small a problem
    keys: frozenset[str]
    sparse: tuple[str, ...] = ()     # arguments in storages of so many bytes that only rows in use may be touched


@dataclass
class Plan:
    """What is executed on `arch` in order that every binary of a large case and every tuned row is."""

    arch: str
    binaries: dict[str, str] = field(default_factory=dict)            # of large cases: key -> case and kernel
    rows: dict[Row, list[str]] = field(default_factory=dict)          # every row -> what it is executed by
    problems: list[Shrunken] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)                 # binaries and rows that nothing launches


def short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def plan(arch: str) -> Plan:
    """Needs a process without TRITON_INTERPRET."""
    from wave64.testing.compile import arguments, capture

    found, seen, kinds = Plan(arch), set(), set()
    of_arch = tables(arch)
    found.rows = {(op, i): [] for op, table in of_arch.items() for i in range(len(table.rows))}

    def launched(op: Op, case: Case, config: Any = None) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        """({key: kernel} that the case launches; nothing where the kernel declines it), arguments, tuning key."""
        own = op.backends["triton"]
        with capture(arch, compiled=False) as launches, configured(op, config):
            args = arguments(case)
            if own.supports is not None and own.supports(**args):
                return {}, args, {}
            own.run(**args)
            tuning_key = dict(tune.tuning_of(op).key(**args)) if op.name in of_arch else {}
        return {short(launch.key): launch.key.split()[0] for launch in launches}, args, tuning_key

    def note_row(op: str, row: int, tuning_key: dict[str, Any], by: str) -> None:
        found.rows[op, row].append(by)
        kinds.add((op, row, *kind_of(op, tuning_key).values()))

    for op, case in small_cases("triton"):
        keys, _, tuning_key = launched(op, case)
        seen |= keys.keys()
        if tuning_key and keys:
            note_row(op.name, row_of(of_arch[op.name], tuning_key), tuning_key, case.id)

    def shrink(op: Op, name: str, shape: dict[str, Any], row: int | None, tuning_key: dict[str, Any],
               wanted: set[str] | None) -> None:
        """Adds problems that launch what is wanted (None: whatever the row's configuration makes of the shape)."""
        config = config_of(op, arch, row)
        for i, make in enumerate(SHRINKING[op.name][2](shape, config)):
            keys, args, _ = launched(op, Case(name, make), config)
            new = keys.keys() if wanted is None else keys.keys() & wanted - seen
            if new:
                if row is not None:
                    note_row(op.name, row, tuning_key, f"{name}, shrunken")
                sparse = tuple(each for each, value in args.items()
                               if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= VAST_BYTES)
                found.problems.append(Shrunken(op.name, f"{name}#{i}", make, row, frozenset(new), sparse))
                seen.update(keys)
            if wanted is None or wanted <= seen:
                return

    for op in (op for op in OPS.values() if "triton" in op.backends):
        for case in (case for case in op.cases() if case.large):
            keys, args, tuning_key = launched(op, case)
            wanted = keys.keys() - seen
            found.binaries |= {key: f"{op.name} {case.id} {kernel}" for key, kernel in keys.items()
                               if key not in found.binaries}
            sizes = [x.untyped_storage().nbytes() for x in args.values() if isinstance(x, Tensor)]
            small = sum(sizes) <= SMALL_BYTES
            if wanted and small and op.name not in of_arch:
                found.problems.append(Shrunken(op.name, case.id, None, None, frozenset(wanted)))
                seen |= wanted
            elif wanted and op.name in SHRINKING:
                row = row_of(of_arch[op.name], tuning_key) if op.name in of_arch else None
                shrink(op, case.id, SHRINKING[op.name][0](args), row, tuning_key, wanted)
    for name, table in of_arch.items():
        for row, tuning_key in reachable(name, table):
            if (name, row, *kind_of(name, tuning_key).values()) not in kinds:
                words = " ".join(f"{which}={value}" for which, value in tuning_key.items())
                shrink(OPS[name], f"row {row + 1}: {words}", SHRINKING[name][1](tuning_key), row, tuning_key, None)
    found.left_out = [text for key, text in found.binaries.items() if key not in seen]
    found.left_out += [f"{op}: row {row + 1} of its table" for (op, row), by in found.rows.items() if not by]
    return found


# ---- executing

def executed(result: Result, row: int | None) -> dict[str, Any]:
    """What a test tells of it to the summary at the end."""
    return {"arch": result.arch, "instructions": result.instructions,
            "binaries": sorted(short(key) for key in result.keys), "rows": [] if row is None else [[result.op, row]]}


def execute_small(op: str, case: str, arch: str) -> tuple[Result, dict[str, Any]]:
    """Holds a case of the operator to the contract on the emulator. Needs a process without TRITON_INTERPRET."""
    result, declared, row = check_case(op, "triton", arch, case), OPS[op], None
    if result.passed and op in tables(arch):
        chosen = next(c for c in declared.cases() if c.id == case)  # of the list that the test was made of
        with platform.target(arch):
            args = contract.draw(chosen, "cpu", seed=0)
            row = row_of(tables(arch)[op], tune.tuning_of(declared).key(**args))
    return result, executed(result, row)


def mark_small(op: str, case: str, arch: str) -> str:
    """Of what executing the case comes of: see recorded.py. As all marks it needs a process without TRITON_INTERPRET.
    """
    return recorded.mark(op, [case], arch)


def mark_problem(arch: str, problem: Shrunken) -> str:
    config = config_of(OPS[problem.op], arch, problem.row)
    return recorded.mark(problem.op, [_case_of(problem)], arch, config)


def mark_compiled(arch: str) -> dict[str, str]:
    """Operator -> the mark of all that is compiled for its cases."""
    return {op.name: recorded.mark(op.name, list(op.cases()), arch) for op in OPS.values() if "triton" in op.backends}


def _case_of(problem: Shrunken) -> Case:
    if problem.make:
        return Case(problem.name, problem.make, sparse=problem.sparse)
    return next(case for case in OPS[problem.op].cases() if case.id == problem.name)


def execute(arch: str, problem: Shrunken) -> tuple[Result, dict[str, Any]]:
    """The same of a problem; it fails, too, where it no longer launches what it is there for."""
    op = OPS[problem.op]
    case = _case_of(problem)
    with configured(op, config_of(op, arch, problem.row)):
        result = check(op, "triton", arch, [case])
    told = executed(result, problem.row)
    if result.passed and not problem.keys <= set(told["binaries"]):
        result.failures[case.id] = f"does not launch what it is there for, but {result.keys}"
    return result, told
