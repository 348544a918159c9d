"""Finds the configurations that kernels are launched with, and writes them to tuned tables (wave64/tuning.py).

    python -m wave64.testing.tune OP [OP ...] [--arch ARCH] [--backend NAME] [--case TEXT ...] [--write [FOLDER]]

On a GPU (ARCH its own, or not given): the large cases of each bucket are run with every candidate. A result must be
near the reference's, within what the contract lets two right results differ, and is then timed, as a graph's replay.
The candidate with the smallest geometric mean over the cases, of its time over the case's best, is chosen.
For an AMD ARCH that is not here: the first case of each bucket is compiled with every candidate. One that spills or
wants more LDS than there is is refused. Where the emulator executes ARCH, a few workgroups of each launch of that case
are executed with each of the others (sampled.py), and the candidate that is predicted to take the least time
(predict.py, whose hash the table keeps) is chosen; the present one, if the model cannot tell the two apart. Elsewhere
one that leaves fewer than two waves on a SIMD (unless all do) is refused, too, and chosen is the one with the fewest
instructions in its loops, of all waves, per unit of work, of those within 5% the one with most waves; `programs`, if a
field, is set to the blocks that a compute unit holds.

`--write` puts the choices into the table of ARCH, made from its fallback arch's where it has none. Rows that a person
chose stay as they are, after the measured ones. It needs a process without TRITON_INTERPRET.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import triton

from wave64 import OPS, platform
from wave64.arch import Arch, lookup
from wave64.backends import import_hopper_kernels
from wave64.op import Case, Op
from wave64.testing import compile as compiling
from wave64.testing import contract, predict, sampled, timing
from wave64.testing.predict import CLOCK_GHZ
from wave64.testing.sparse import undrawn
from wave64.tuning import FOLDER, Row, Table, Tuning, table_file

#: Times the contract's floor of a dtype that a result may be from the reference's, which was rounded itself.
SLACK = 4
#: A candidate that takes so many times the best of a case is not tried on others.
HOPELESS = 2.0
#: Times the fewest instructions that another candidate may have, if more of its waves fit.
ALIKE = 1.05
EXECUTED = 2  # workgroups of a launch
#: What a time is the median over: shorter than a benchmark's, for there are many of them.
WARM_UP_MS, REPEAT_MS = 10, 40


@dataclasses.dataclass
class Candidate:
    config: Any
    reason: str = ""                                                    # why it cannot be chosen
    us: dict[str, float] = dataclasses.field(default_factory=dict)      # case -> time
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)   # of its machine code
    score: float = math.inf                                             # the smallest is chosen


@dataclasses.dataclass
class Bucket:
    """Calls whose tuning keys count as the same, and what is tried for them: the present choice first."""

    op: Op
    backend: str
    when: dict[str, Any]
    key: dict[str, Any]
    cases: list[Case]
    candidates: list[Candidate]

    def __str__(self) -> str:
        return f"{self.op.name} {json.dumps(self.when)}"

    def describe(self, config: Any) -> str:
        """The fields in which the candidates differ."""
        values = [written(c.config) for c in self.candidates]
        names = {name for v in values for name in v if any(w.get(name) != v.get(name) for w in values)}
        return " ".join(f"{k}={_short(v)}" for k, v in written(config, defaults=True).items() if k in names)


def _short(value: Any) -> str:
    return "".join(json.dumps(value).split()).replace('"', "") if isinstance(value, dict) else str(value)


def tuning_of(op: Op, backend: str = "triton") -> Tuning:
    """How the backend's configuration is chosen. Raises LookupError where it has no choice."""
    if backend in op.backends and (found := op.backends[backend].tuning) is not None:
        return found
    raise LookupError(f"{op.name}: backend {backend} chooses no configuration")


def tunable(backend: str = "triton") -> list[str]:
    """Operators whose backend chooses a configuration."""
    return [op.name for op in OPS.values() if backend in op.backends and op.backends[backend].tuning]


def ranges(bounds: tuple[int, ...]) -> list[list[int | None]]:
    """(16, 64) -> [[None, 16], [17, 64], [65, None]]"""
    return [[low, high] for low, high in zip([None, *(b + 1 for b in bounds)], [*bounds, None], strict=True)]


def bucket(tuning: Tuning, key: Mapping[str, Any]) -> dict[str, Any]:
    """The `when` of the row that this tuning key is measured for."""
    def one(name: str, value: Any) -> Any:
        if name not in tuning.buckets:
            return value
        return next(r for r in ranges(tuning.buckets[name])
                    if (r[0] is None or r[0] <= value) and (r[1] is None or value <= r[1]))

    return {name: one(name, value) for name, value in key.items()}


def buckets(op: Op, arch: Arch, texts: list[str], backend: str = "triton") -> list[Bucket]:
    """The large cases with one of `texts` in their names that the operator's backend serves on `arch`."""
    tuning, found, served = tuning_of(op, backend), {}, op.backends[backend]
    with platform.target(arch.name):
        for case in op.cases():
            if not case.large or not any(text in case.id for text in texts):
                continue
            args = compiling.arguments(case)
            if served.supports is not None and served.supports(**args):
                continue
            key = dict(tuning.key(**args))
            when = bucket(tuning, key)
            found.setdefault(json.dumps(when), Bucket(op, backend, when, key, [], [])).cases.append(case)
        for b in found.values():
            tried = [tuning.choose(**b.key)]
            for config in tuning.candidates(arch, **b.key):
                if config not in tried:
                    tried.append(config)
            b.candidates = [Candidate(config) for config in tried]
    return list(found.values())


def written(config: Any, defaults: bool = False) -> dict[str, Any]:
    """A configuration's fields as a table has them: those that differ from what they are by default."""
    made = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if defaults or value != usual:
            made[field.name] = dict(value) if isinstance(value, Mapping) else value
    return made


# ---- compiling

def compile_with(op: str, backend: str, cases: list[str], config: dict[str, Any], arch: str
                 ) -> list[dict[str, Any]] | str:
    """Compiles what the cases launch with a configuration: figures of the main kernel by case (none of NVIDIA's), or
    why it does not compile. Runs in a process of its own, which a compiler may take down."""
    found, declared = [], OPS[op]
    tuning = tuning_of(declared, backend)
    made = tuning.config(**config)
    try:
        for case in (c for c in declared.cases() if c.id in cases):
            with compiling.capture(arch) as launches, tuning.forced(made):
                args = compiling.arguments(case)
                declared.backends[backend].run(**args)
            if lookup(arch).vendor == "amd":
                figures = [launch.figures() for launch in launches]
                main = max(figures, key=lambda f: sum(f["matrix"].values()))
                found.append(main | {name: max(f[name] for f in figures)
                                     for name in ("spills", "scratch_bytes", "lds_bytes")})
                if arch in CLOCK_GHZ and not unusable(found[-1], lookup(arch)):
                    found[-1] |= ranking(execute_with(op, case, made, arch))
    except Exception as e:  # whatever a compiler raises is a finding about this candidate
        return f"{type(e).__name__}: {first_line(e)}"
    return found


def execute_with(op: str, case: Case, config: Any, arch: str) -> list[sampled.Sample]:
    """What the launches of a call take with a configuration, from a few of their workgroups. Needs a process without
    TRITON_INTERPRET."""
    with platform.target(arch):
        args = undrawn(case)
    with tuning_of(OPS[op]).forced(config):
        return sampled.works(OPS[op], "triton", args, arch, EXECUTED)


def ranking(launches: list[sampled.Sample]) -> dict[str, Any]:
    """Of launches that run one after another, with data that no cache has: `predicted_us`; `by`, what they need
    longest; `conflicts`, LDS cycles over those without bank conflicts."""
    works = [each.work for each in launches]
    free = sum(each.conflict_free * each.work.blocks for each in launches)
    return {"predicted_us": sum(predict.predicted_us(work, True) for work in works), "by": sampled.longest(works),
            "conflicts": sum(work.cycles["lds"] * work.blocks for work in works) / free if free else 1.0}


def show(begin: float, words: str) -> None:
    print(f"[{time.perf_counter() - begin:4.0f} s] {words}", flush=True)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]


def processes(jobs: int) -> Executor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def compile_all(work: list[Bucket], arch: str, jobs: int, cases_each: int | None) -> Iterator[tuple]:
    """Yields (bucket, candidate, figures or reason) as candidates are compiled, for so many cases of each bucket."""
    tasks = {(i, k): (b.op.name, b.backend, [case.id for case in b.cases[:cases_each]], written(c.config), arch)
             for i, b in enumerate(work) for k, c in enumerate(b.candidates)}
    begin = time.perf_counter()

    def report(key: tuple[int, int], result: Any, done: int) -> tuple:
        b, c = work[key[0]], work[key[0]].candidates[key[1]]
        words = result if isinstance(result, str) else "compiled"
        show(begin, f"{done}/{len(tasks)} {b.op.name}: {b.describe(c.config)}: {words}")
        return b, c, result

    if jobs == 0:
        for done, (key, task) in enumerate(tasks.items(), 1):
            yield report(key, compile_with(*task), done)
        return
    crashed, done = [], 0
    with processes(min(jobs, len(tasks) or 1)) as pool:
        running = {pool.submit(compile_with, *task): key for key, task in tasks.items()}
        for future in as_completed(running):
            try:
                result = future.result()
            except BrokenProcessPool:
                crashed.append(running[future])
                continue
            done += 1
            yield report(running[future], result, done)
    for key in crashed:  # one of them took the others' processes with it: each by itself tells which
        with processes(1) as alone:
            try:
                result = alone.submit(compile_with, *tasks[key]).result()
            except BrokenProcessPool:
                result = "the compiler's process ended"
        done += 1
        yield report(key, result, done)


# ---- what is not here

def unusable(figures: dict[str, Any], arch: Arch) -> str:
    """Why machine code of these figures is not launched, or ""."""
    if figures["spills"] or figures["scratch_bytes"]:
        return f"spills {figures['spills']} registers, {figures['scratch_bytes']} bytes of scratch per lane"
    if figures["lds_bytes"] > arch.lds_bytes:
        return f"LDS {figures['lds_bytes']} bytes, {arch.name} has {arch.lds_bytes}"
    return ""


def judge_figures(b: Bucket, arch: Arch) -> None:
    """Scores the compiled candidates of a bucket by what their machine code took, or by its instructions."""
    work = tuning_of(b.op, b.backend).work
    for c in filter(lambda c: c.figures, b.candidates):
        f = c.figures
        c.reason = unusable(f, arch)
        f["per_work"] = sum(f["loop"].values()) * f["block_waves"] / work(c.config, **b.key)
    left = [c for c in b.candidates if not c.reason]
    executed = any("predicted_us" in c.figures for c in left)  # the model knows what few waves cost
    if not executed and any(c.figures["waves_per_simd"] >= 2 for c in left):
        for c in filter(lambda c: c.figures["waves_per_simd"] < 2, left):
            c.reason = f"{c.figures['waves_per_simd']:g} waves per SIMD"
    for c in filter(lambda c: not c.reason, b.candidates):
        c.score = c.figures.get("predicted_us", c.figures["per_work"])
        if hasattr(c.config, "programs") and "predicted_us" not in c.figures:
            held = int(c.figures["waves_per_simd"] * 4) // c.figures["block_waves"]
            c.config = dataclasses.replace(c.config, programs=max(1, held))


def tune_by_figures(work: list[Bucket], arch: Arch, jobs: int) -> None:
    for _, candidate, result in compile_all(work, arch.name, jobs, cases_each=1):
        if isinstance(result, str):
            candidate.reason = result
        else:
            candidate.figures, = result
    for b in work:
        judge_figures(b, arch)


# ---- what is

def right(op: Op, result: Any, args: dict[str, Any], expected: list[torch.Tensor]) -> str:
    """"", or in what the result is too far from the reference's."""
    for i, (got, wanted) in enumerate(zip(contract.outputs(op, result, args), expected, strict=True)):
        off, allowed = contract.distance(got, wanted), SLACK * contract.floor(wanted.dtype)
        if not off <= allowed:
            return f"wrong: result {i} is {off:.2g} from the reference's, allowed {allowed:.2g}"
    return ""


def time_with(op: Op, backend: str, args: dict[str, Any], originals: dict[str, Any],
              expected: list[torch.Tensor]) -> float | str:
    """Microseconds of a call, or why it has none."""
    run = op.backends[backend].run
    for name, original in originals.items():  # so that what an earlier candidate wrote does not help this one
        args[name].copy_(original)
    try:
        with contract.poisoned():
            result = run(**args)
        if wrong := right(op, result, args, expected):
            return wrong
        del result
        device = platform.device_type()
        replay = timing.captured(functools.partial(run, **args), device)
        return timing.median_ms(replay, device, WARM_UP_MS, REPEAT_MS) * 1e3
    except Exception as e:  # out of registers or of LDS, most often
        return f"{type(e).__name__}: {first_line(e)}"


def time_bucket(b: Bucket, begin: float) -> None:
    """Scores the bucket's candidates by their times on its cases."""
    for case in b.cases:
        args = contract.draw(case, platform.device_type(), seed=0)
        own = contract.copy(args)
        expected = contract.outputs(b.op, b.op.reference(**own), own)
        originals = {name: args[name].clone() for name in b.op.mutates if args.get(name) is not None}
        for c in filter(lambda c: not c.reason, b.candidates):
            with tuning_of(b.op, b.backend).forced(c.config):
                took = time_with(b.op, b.backend, args, originals, expected)
            if isinstance(took, str):
                c.reason = f"{case.id}: {took}"
            else:
                c.us[case.id] = took
            words = took if isinstance(took, str) else f"{took:.1f} us"
            show(begin, f"{b.op.name} {case.id}: {b.describe(c.config)}: {words}")
        best = min((c.us[case.id] for c in b.candidates if case.id in c.us), default=math.inf)
        for c in filter(lambda c: not c.reason, b.candidates):
            if c.us[case.id] > HOPELESS * best:
                c.reason = f"{c.us[case.id] / best:.1f} times the best of {case.id}"
        del args, own, expected, originals
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    best = {case.id: min((c.us[case.id] for c in b.candidates if case.id in c.us), default=math.inf)
            for case in b.cases}
    for c in filter(lambda c: not c.reason, b.candidates):
        c.score = math.exp(sum(math.log(us / best[case]) for case, us in c.us.items()) / len(c.us))


def tune_by_timings(work: list[Bucket], arch: Arch, jobs: int) -> None:
    begin = time.perf_counter()
    for _, candidate, result in compile_all(work, arch.name, jobs, cases_each=None):
        if isinstance(result, str):
            candidate.reason = result
    for b in work:
        time_bucket(b, begin)


# ---- what comes of it

def report(b: Bucket) -> str:
    """The bucket's table, best first, and what was refused."""
    ranked = sorted((c for c in b.candidates if not c.reason), key=lambda c: c.score)
    if any(c.us for c in b.candidates):
        columns = [case.id for case in b.cases]
        heading = "us: " + "  ".join(columns)
        cells = {id(c): [f"{c.score:5.3f}", *(f"{c.us[i]:{max(8, len(i))}.1f}" for i in columns)] for c in ranked}
    else:
        executed = any("predicted_us" in c.figures for c in ranked)
        heading = f"{'predicted us, by, LDS conflicts' if executed else 'per work'}, VGPRs, LDS, waves per SIMD"
        cells = {id(c): [*([f"{c.score:9.2f}", f"{c.figures['by']:18}", f"{c.figures['conflicts']:5.2f}"] if executed
                           else [f"{c.score:7.4f}"]), f"{c.figures['vgpr']:4}", f"{c.figures['lds_bytes']:6}",
                         f"{c.figures['waves_per_simd']:4g}"] for c in ranked}
    lines = ["", f"{b}   {heading}"]
    for c in ranked:
        mark = "*" if c is b.candidates[0] else " "
        lines.append("  ".join([f" {mark}", *cells[id(c)], b.describe(c.config)]))
    lines += [f"    refused: {b.describe(c.config)}: {c.reason}" for c in b.candidates if c.reason]
    return "\n".join([*lines, "  * as it was before" if ranked else "  nothing can be chosen"])


def chosen(b: Bucket) -> Candidate | None:
    """The best candidate: by time; by predicted time, but the present one where the model cannot tell; or, of those
    with nearly the fewest instructions, that of most waves."""
    left = [c for c in b.candidates if not c.reason]
    best = min((c.score for c in left), default=0)
    if any("predicted_us" in c.figures for c in left):
        return min(left, key=lambda c: 0 if c is b.candidates[0] and c.score <= predict.TIE * best else c.score)
    near = ALIKE * best
    waves = {id(c): -c.figures["waves_per_simd"] if c.figures and c.score <= near else 0 for c in left}
    return min(left, key=lambda c: (waves[id(c)], c.score), default=None)


def row_of(b: Bucket, best: Candidate) -> Row:
    """The bucket's row, with the first of its sources, which are not known yet."""
    if best.us:
        measured = {"us": {case: round(us, 1) for case, us in best.us.items()}, "over_best": round(best.score, 3)}
    else:
        ranking = ("predicted_us", "by", "conflicts") if "predicted_us" in best.figures else ("per_work",)
        kept = {name: best.figures[name] for name in (*ranking, "vgpr", "lds_bytes", "waves_per_simd")}
        measured = {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}
    return Row(b.when, written(best.config), 0, measured)


def source(command: str, timed: bool, executed: bool = False) -> dict[str, Any]:
    made = {"from": "timings" if timed else "predicted times" if executed else "static figures",
            "torch": torch.__version__, "triton": triton.__version__, "command": command}
    if not timed and executed:
        made["model"] = predict.fingerprint()
    if timed:
        made["device"] = torch.cuda.get_device_name()
        made["driver"] = f"HIP {torch.version.hip}" if platform.is_hip() else f"CUDA {torch.version.cuda}"
    return made


def merged(before: Table, arch: str, rows: list[Row], made: dict[str, Any], tuning: Tuning) -> Table:
    """`before` with the rows of these buckets replaced, whoever chose them: behind a measured row, one for the same
    arguments would never be reached. Measured rows that belong to no bucket any more are dropped."""
    def current(row: Row) -> bool:
        return all(row.when[name] in ranges(bounds) for name, bounds in tuning.buckets.items() if name in row.when)

    renewed = [row.when for row in rows]
    kept = [row for row in before.rows if row.when not in renewed and (current(row) or not row.measured)]
    sources: list[Mapping[str, Any]] = []

    def numbered(row: Row, of: Mapping[str, Any]) -> Row:
        if of not in sources:
            sources.append(of)
        return dataclasses.replace(row, source=sources.index(of))

    plain = [numbered(row, before.sources[row.source]) for row in kept if not row.measured]
    measured = [numbered(row, before.sources[row.source]) for row in kept if row.measured]
    measured = sorted(measured + [numbered(row, made) for row in rows], key=lambda row: json.dumps(row.when))
    return Table(before.file, before.op, arch, tuple(sources), (*measured, *plain), before.backend)


def dump(table: Table) -> str:
    """The table as a file, one source and one row a line."""
    def line(row: Row) -> dict[str, Any]:
        made = {"when": dict(row.when), "config": dict(row.config), "source": row.source}
        return made | ({"measured": row.measured} if row.measured else {}) | ({"why": row.why} if row.why else {})

    def block(items: list) -> str:
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in items) + "\n  ]"

    backend = "" if table.backend == "triton" else f'  "backend": {json.dumps(table.backend)},\n'
    return (f'{{\n  "op": {json.dumps(table.op)},\n{backend}  "arch": {json.dumps(table.arch)},\n'
            f'  "sources": {block([dict(s) for s in table.sources])},\n'
            f'  "rows": {block([line(row) for row in table.rows])}\n}}\n')


def write(work: list[Bucket], arch: Arch, folder: Path, made: dict[str, Any]) -> None:
    for op in {b.op.name: b.op for b in work}.values():
        found = [(b, c) for b in work if b.op is op and (c := chosen(b)) is not None]
        tuning = tuning_of(op, work[0].backend)
        table = merged(tuning.table(arch), arch.name, [row_of(b, c) for b, c in found], made, tuning)
        file = table_file(tuning.op, tuning.backend, arch.name, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(table))
        print(f"wrote {file}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64.testing.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+", metavar="OP", help=f"of {', '.join(tunable())}")
    parser.add_argument("--arch", help="default: this GPU's")
    parser.add_argument("--backend", default="triton", choices=("triton", "hopper"), help="default: %(default)s")
    parser.add_argument("--case", nargs="+", default=[""], metavar="TEXT", help="cases with one of these in their name")
    parser.add_argument("--write", nargs="?", const=str(FOLDER), metavar="FOLDER",
                        help="write the choices there, by default where launches read them")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes that compile (default: %(default)s; 0: this one)")
    args = parser.parse_args(argv)
    if args.backend == "hopper":
        import_hopper_kernels()
    if unknown := sorted(set(args.ops) - set(tunable(args.backend))):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(tunable(args.backend))}")
    here = platform.arch()
    arch = lookup(args.arch) if args.arch else here
    if arch is None or arch != here and arch.vendor != "amd":
        parser.error(f"--arch {args.arch or '(none)'}: timings need that GPU, here is {here.name if here else 'none'}; "
                     "of AMD's code there are figures without one: --arch gfx942")
    begin, timed = time.perf_counter(), arch == here
    work = [b for name in args.ops for b in buckets(OPS[name], arch, args.case, args.backend)]
    if not work:
        parser.error(f"no large case of {', '.join(args.ops)} named {' or '.join(args.case)} is served on {arch.name}")
    (tune_by_timings if timed else tune_by_figures)(work, arch, args.jobs)
    for b in work:
        print(report(b))
    command = shlex.join(["python", "-m", "wave64.testing.tune", *args.ops, "--arch", arch.name,
                          *(["--backend", args.backend] if args.backend != "triton" else []),
                          *(["--case", *args.case] if any(args.case) else []), "--write"])
    if args.write:
        write(work, arch, Path(args.write), source(command, timed, arch.name in CLOCK_GHZ))
    print(f"{arch.name}: {len(work)} buckets in {time.perf_counter() - begin:.0f} s")
    return 0 if all(chosen(b) for b in work) else 1


if __name__ == "__main__":
    sys.exit(main())
