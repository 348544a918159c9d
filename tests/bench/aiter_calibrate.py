"""What the model that predicts times (testing/predict.py) is calibrated on, and held to: how long AITER's own assembly
took, as AITER's tuner measured it and its tables publish it (of attention: a public table for MI300X), next to what a
workgroup of each of these kernels needs, counted while the emulator executes it.

A workgroup's cost is a line in the length of its loop (K of a product, keys of attention): counted at two lengths.
Which half of the rows calibrates the model and which holds it to account is drawn by a hash of the row. Kernels of this
project are not among them.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from aiter_attention import QUERIES, _forward
from aiter_dense import _blocks, _fp4, _int8
from aiter_moe import _stage1
from aiter_objects import COMMIT, VERSION, Objects
from aiter_work import BEYOND, Launch, in_turn, prepared_by

from wave64.testing import predict
from wave64.testing.cost import waves_per_simd
from wave64.testing.emulator.cost import Usage, counting

STORED = Path(__file__).with_name("calibration.json")
#: DeepSeek-V3's experts on eight ranks, one of them shared: how many, each token's, columns of the gate
EXPERTS, CHOSEN, INTER = 33, 9, 2048
MANY = 304      # workgroups: as many as MI300X has compute units
OUTLIER = 0.3  # logarithm of a ratio
#: columns of a workgroup's counts in calibration.json, each [at length 0, for each unit of length]
COUNTS = ("matrix", "vector", "transcendental", "scalar", "lds", "lines", "chain")


@dataclass(frozen=True)
class Timing:
    """A published time. units: compute units of the GPU. m, n: rows (of fmha: heads of all sequences) and columns
    (queries; of experts: 0); length: of the loop."""

    object: str
    units: int
    m: int
    n: int
    length: int
    us: float

    @property
    def held_out(self) -> bool:
        """Whether the row is of the half that the model is held to."""
        key = f"{self.object} {self.units} {self.m} {self.n} {self.length}"
        return hashlib.sha256(key.encode()).digest()[0] % 2 == 1


def tile_of(name: str) -> tuple[int, int]:
    """Rows and columns of a workgroup's result, from the object's name."""
    rows, columns = re.findall(r"_(\d+)x(\d+)(?=[._])", name)[-1] if "fmha" not in name else (QUERIES, 0)
    return int(rows), int(columns)


def family_of(name: str) -> str:
    return name.split("/")[1]


def maker(name: str) -> tuple[Callable[[int], Launch], tuple[int, int]]:
    """(from the length of the loop a launch of which one workgroup is counted, the two lengths)."""
    rows, columns = tile_of(name)
    arch, family = name.split("/")[:2]
    if family == "fmha_v3_fwd":
        return lambda keys: _forward(keys, False), (512, 1024)
    if family == "fmoe_2stages":
        return lambda hidden: _stage1(arch, rows, hidden, columns, 1, rows), (512, 1024)
    if family == "i8gemm":
        return lambda k: _int8(rows, columns, k), (512, 1024)
    if family == "f4gemm":
        return lambda k: _fp4(rows, columns, k), (512, 1024)
    return lambda k: _blocks(arch, (rows, columns), rows, columns, k), (512, 1024)


def counts_of(name: str, code: bytes, made: tuple[Callable[[int], Launch], tuple[int, int]] | None = None) -> dict:
    """What a workgroup needs: `COUNTS`, and how it occupies a compute unit. Counts do not depend on the data. made:
    as of maker(), for an object that it does not know."""
    make, lengths = made or maker(name)
    found: list[Usage] = []
    for length in lengths:
        counter, launch = counting(), make(length)
        with prepared_by(code, launch, (1, 1, 1)) as recorded:
            in_turn(recorded, launch.arrays.buffers(BEYOND), (counter,))
        found += counter.usages.values()
    usage = found[0]
    at = [[*each.cycles.values(), each.touched[128], each.chain] for each in found]
    slopes = [(b - a) / (lengths[1] - lengths[0]) for a, b in zip(*at, strict=True)]
    return {"waves": usage.block_waves, "at_once": predict.blocks_at_once(waves_per_simd(usage), usage.block_waves),
            "counts": {unit: [round(a - slope * lengths[0], 3), round(slope, 5)]
                       for unit, a, slope in zip(COUNTS, at[0], slopes, strict=True)}}


# ---- rows

def expected_blocks(tokens: int, rows: int) -> tuple[float, float]:
    """(blocks of rows of all experts, experts that have any), where each token chooses CHOSEN of EXPERTS at random."""
    chance, blocks, none = CHOSEN / EXPERTS, 0.0, 0.0
    for n in range(tokens + 1):
        log = math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        likely = math.exp(log + n * math.log(chance) + (tokens - n) * math.log(1 - chance))
        blocks += likely * -(-n // rows)
        none += likely * (n == 0)
    return EXPERTS * blocks, EXPERTS * (1 - none)


def launch_of(row: Timing) -> tuple[float, float]:
    """(workgroups, bytes of memory that are touched at all)."""
    family, (rows, columns) = family_of(row.object), tile_of(row.object)
    m, n, k = row.m, row.n, row.length
    if family == "fmha_v3_fwd":
        return m * n / rows, m * (2 * n + 2 * k) * 128 * 2
    if family == "fmoe_2stages":
        blocks, experts = expected_blocks(m, rows)
        return blocks * INTER / columns, experts * 2 * INTER * k + m * k + m * CHOSEN * INTER
    size = {"f4gemm": 17 / 32}.get(family, 1)
    return -(-m // rows) * -(-n // columns), (m + n) * k * size + 2 * m * n


def work_of(row: Timing, counted: dict) -> predict.Work:
    return work_of_blocks(row.object.split("/")[0], row.units, counted, row.length, *launch_of(row))


def work_of_blocks(arch: str, units: int, counted: dict, length: int, blocks: float, once: float) -> predict.Work:
    """once: bytes of memory that are touched at all."""
    per = {unit: a + slope * length for unit, (a, slope) in counted["counts"].items()}
    chain, lines = per.pop("chain"), per.pop("lines")
    return predict.Work(arch, units, blocks, counted["waves"], counted["at_once"], per, once, blocks * lines, chain)


def stored() -> tuple[dict[str, dict], list[Timing]]:
    """(object -> its counts, the published times)."""
    found = json.loads(STORED.read_text())
    return found["objects"], [Timing(name, *row) for name, rows in found["rows"].items() for row in rows]


def samples(counted: dict[str, dict], rows: list[Timing], held_out: bool) -> Iterator[tuple[predict.Work, float]]:
    for row in rows:
        if row.held_out == held_out and row.object in counted:
            yield work_of(row, counted[row.object]), row.us


def count_all(objects: Objects, rows: list[Timing]) -> dict[str, dict]:
    """Executes a workgroup of each object that the rows are of, but those that are not there."""
    found = {}
    for name in sorted({row.object for row in rows}):
        if name in objects.paths:
            found[name] = counts_of(name, objects.read(name))
        elif objects.repository is not None:
            found[name] = counts_of(name, (objects.repository / name).read_bytes())
    return found


# ---- the constants, and how far off they are

def error(constants: predict.Constants, known: list[tuple[predict.Work, float]]) -> float:
    """What the constants minimize: squares of the logarithms of predicted over measured, outliers by their size."""
    found = 0.0
    for work, us in known:
        off = abs(math.log(predict.predicted_us(work, c=constants) / us))
        found += off**2 if off < OUTLIER else OUTLIER * (2 * off - OUTLIER)
    return found / len(known)


def fitted(known: list[tuple[predict.Work, float]], start: predict.Constants, steps: int = 1500) -> predict.Constants:
    """A search by random steps, which are kept where they make the error less; the same each time."""
    random, names = np.random.default_rng(0), [f.name for f in fields(start)]
    best, lowest = start, error(start, known)
    for _ in range(steps):
        factors = np.exp(random.standard_normal(len(names)) * 0.3 * random.choice([1, 0.3, 0.1, 0.03]))
        tried = predict.Constants(*(getattr(best, name) * f for name, f in zip(names, factors, strict=True)))
        if (found := error(tried, known)) < lowest:
            best, lowest = tried, found
    return best


@dataclass(frozen=True)
class Accuracy:
    rows: int
    within_25: float   # part of the rows
    within_double: float
    median: float      # of predicted over measured
    tenth: float       # a tenth of the rows is at or below, and above the next
    ninetieth: float


def accuracy(known: list[tuple[predict.Work, float]], constants: predict.Constants = predict.CONSTANTS) -> Accuracy:
    ratios = np.array([predict.predicted_us(work, c=constants) / us for work, us in known])
    tenth, median, ninetieth = np.quantile(ratios, (0.1, 0.5, 0.9))
    return Accuracy(len(ratios), float((abs(ratios - 1) <= 0.25).mean()),
                    float((np.maximum(ratios, 1 / ratios) <= 2).mean()), median, tenth, ninetieth)


def by_size(known: list[tuple[predict.Work, float]]) -> dict[str, list[tuple[predict.Work, float]]]:
    return {"more than 304 workgroups": [each for each in known if each[0].blocks > MANY],
            "at most 304": [each for each in known if each[0].blocks <= MANY]}


def report(counted: dict[str, dict], rows: list[Timing]) -> str:
    """The constants anew, next to those in use, and the errors of those in use on the rows that they never saw. A
    family's last figures are of constants that were calibrated without it."""
    drawn = list(samples(counted, rows, held_out=False))
    anew = fitted(drawn, predict.CONSTANTS)
    lines = [f"{len(rows)} timings of AITER's assembly ({VERSION}, and {COMMIT} of its repository), {len(drawn)} to "
             "calibrate on", "", "| constant | in use | calibrated anew |", "|---|---:|---:|"]
    lines += [f"| {f.name} | {getattr(predict.CONSTANTS, f.name):.3g} | {getattr(anew, f.name):.3g} |"
              for f in fields(anew)]
    lines += ["", "| held out | rows | within 25 % | within 2 x | predicted / measured: median (tenths below, above) |",
              "|---|---:|---:|---:|---|"]
    for size, known in by_size(list(samples(counted, rows, held_out=True))).items():
        lines.append(_line(size, accuracy(known)))
    families = sorted({family_of(row.object) for row in rows})
    for family in families:
        of = [row for row in rows if family_of(row.object) == family]
        lines.append(_line(family, accuracy(list(samples(counted, of, held_out=True)))))
    for family in families:
        of = [row for row in rows if family_of(row.object) == family]
        rest = [row for row in rows if family_of(row.object) != family]
        without = fitted(list(samples(counted, rest, held_out=False)), predict.CONSTANTS, 600)
        lines.append(_line(f"{family}, of which none was calibrated on",
                           accuracy(list(samples(counted, of, held_out=True)), without)))
    return "\n".join(lines)


def _line(what: str, found: Accuracy) -> str:
    return (f"| {what} | {found.rows} | {found.within_25:.0%} | {found.within_double:.0%} | {found.median:.2f} "
            f"({found.tenth:.2f} - {found.ninetieth:.2f}) |").replace("%", " %")
