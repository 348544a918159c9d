"""LDS bank conflicts of every row of the tuned tables, executed with real tiles, few of them: none takes more than 1.5
times its cycles without conflicts, but for those that conflicts.json lists with their figures. That list only shrinks:
`--renew-golden` lowers its figures and drops what is no longer needed; it adds and raises none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import mark

from wave64 import OPS, tuning
from wave64.arch import lookup
from wave64.testing import problems, tune
from wave64.testing.problems import ROWS, problem, typical

ARCHS = ("gfx942", "gfx950")
EXCEPTIONS = Path(__file__).with_name("conflicts.json")
#: Times the LDS cycles without conflicts that a kernel may take.
ALLOWED = 1.5
#: What a harmless change of a kernel moves, of a figure.
HARMLESS = 1.03


def rows(arch: str) -> Iterator[tuple[str, int]]:
    """Operators, and the places of rows in their tables, from 1 on."""
    for file in sorted((tuning.FOLDER / arch).glob("*.json")):
        for number in range(1, len(tuning.read(file).rows) + 1):
            yield file.stem, number


def mark_row(op: str, key: dict[str, Any], config: dict[str, Any], arch: str, rows: int) -> str:
    """Of what executing a row comes of: see recorded.py."""
    return mark(op, [problem(op, key, rows)], arch, tune.tuning_of(OPS[op]).config(**config))


def judge(key: str, now: dict[str, float], listed: dict[str, float]) -> list[str]:
    """What is wrong with the ratios of a row's kernels, besides what is listed for it."""
    found = [f"{key} {kernel}: {ratio:.2f} times its LDS cycles without conflicts, allowed {ALLOWED}"
             for kernel, ratio in now.items() if ratio > ALLOWED and kernel not in listed]
    for kernel, figure in listed.items():
        if kernel not in now:
            found.append(f"{key} {kernel}: listed, but no longer there")
        elif now[kernel] <= ALLOWED:
            found.append(f"{key} {kernel}: {now[kernel]:.2f}, no longer needed")
        elif now[kernel] > HARMLESS * figure:
            found.append(f"{key} {kernel}: {now[kernel]:.2f}, worse than the {figure} that are listed")
    return found


def renewed(now: dict[str, float], listed: dict[str, float]) -> dict[str, float]:
    return {kernel: min(figure, round(now[kernel], 2)) for kernel, figure in listed.items()
            if now.get(kernel, 0) > ALLOWED}


@pytest.mark.parametrize(("arch", "op", "number"), [
    pytest.param(arch, *found, id=f"{arch}-{found[0]}-{found[1]}") for arch in ARCHS for found in rows(arch)])
def test_rows_have_no_more_bank_conflicts_than_are_listed(arch, op, number, compiling, request, record,
                                                          record_property):
    table = tuning.table(op, lookup(arch))
    row = table.rows[number - 1]
    what = typical(table, row), dict(row.config)
    rows = row.config.get("block_m", ROWS)
    with record.result(f"conflicts {arch} {op} {number}", compiling.submit(mark_row, op, *what, arch, rows).result(),
                       record_property) as entry:
        if entry.told is None:
            entry.told = compiling.submit(problems.execute_with, op, *what, arch, rows).result()
    took: dict[str, Any] = entry.told
    now = {kernel: used["LDS"] / used["free"] for kernel, used in took.items() if used["free"]}
    key, exceptions = f"{arch} {op} {number}", json.loads(EXCEPTIONS.read_text())
    if request.config.getoption("renew_golden", default=False):
        exceptions = {k: kept for k, v in exceptions.items() if (kept := renewed(now, v) if k == key else v)}
        EXCEPTIONS.write_text(json.dumps(exceptions, indent=1) + "\n")
    assert judge(key, now, exceptions.get(key, {})) == []


def test_products_and_experts_are_not_listed():
    listed = [key for key in json.loads(EXCEPTIONS.read_text())
              if key.split()[1] in ("fused_moe", "fp8_block_scaled_mm", "fp8_scaled_mm")]
    assert listed == ["gfx950 fused_moe 1"]  # fp32, of which gfx950 reads a word at a time


def test_every_exception_is_of_a_row():
    assert set(json.loads(EXCEPTIONS.read_text())) <= {f"{arch} {op} {n}" for arch in ARCHS for op, n in rows(arch)}


@pytest.mark.parametrize(("now", "listed", "words"), [
    ({"k": 1.5}, {}, ""), ({"k": 1.51}, {}, "k: 1.51 times"), ({"k": 2.0}, {"k": 2.0}, ""),
    ({"k": 2.1}, {"k": 2.0}, "k: 2.10, worse than the 2.0"), ({"k": 1.5}, {"k": 2.0}, "k: 1.50, no longer needed"),
    ({"k": 1.0}, {"l": 2.0}, "l: listed, but no longer there"), ({"k": 1.9}, {"k": 2.0}, ""),
])
def test_exceptions_only_shrink(now, listed, words):
    found = judge("row", now, listed)
    assert len(found) == bool(words)
    assert words in "".join(found)
    assert all(figure <= listed[kernel] for kernel, figure in renewed(now, listed).items())


def test_renewing_lowers_and_drops():
    assert renewed({"a": 1.9, "b": 1.4, "c": 3.0}, {"a": 2.0, "b": 2.0, "d": 2.0}) == {"a": 1.9}
