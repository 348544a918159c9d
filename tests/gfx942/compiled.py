"""What the compilers make of every kernel, for all tests of a run: figures (budgets.py) and the forms of instructions
(census.py). What recorded.json has of an operator's Triton kernels, or of the bytes of a HIP code object, is not
compiled anew: its figures are golden.json's, to which they were compared when they were recorded."""

import contextlib
import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import budgets
import census
import launched
import recorded
from budgets import ARCHS

from wave64.backends import hip


def key(op: str, arch: str, kind: str = "triton") -> str:
    """Of the record, for an operator's kernels."""
    return f"compiled {op} {arch}" if kind == "triton" else f"compiled {kind} {op} {arch}"


def shipped(arch: str) -> dict[str, Any]:
    """What needs no compiler: `marks`, from operators to the mark of what is compiled for their cases (recorded.py);
    `report`, of the HIP kernels in the package; `forms` of their instructions. Needs a process without
    TRITON_INTERPRET, and is made in one that has imported everything for other tests."""
    from wave64.testing import compile

    given, sys.argv = sys.argv, ["compile", arch, "--backend", "hip"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            compile.main()
    finally:
        sys.argv = given
    return {"marks": launched.mark_compiled(arch), "report": json.loads(printed.getvalue()),
            "forms": census.forms(dict(census.code_objects(arch, "hip")))}


def obtain(record: recorded.Record, ships: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """arch -> compilers, kernels, and by kind and operator rows of figures, or why there are none; `forms`, from "hip"
    and from operators with Triton kernels to {form: an instruction of it}; and, for the record, by kind and operator
    `marks` and `told`. ships: arch -> what is `shipped`."""
    golden = budgets.read_golden()
    of = {arch: {op: f"{mark} {_hash_of(golden, arch, op)}" for op, mark in ships[arch]["marks"].items()}
          for arch in ARCHS}
    entries = {arch: {op: record.entry(key(op, arch), mark) for op, mark in of[arch].items()} for arch in ARCHS}
    anew = {arch: [op for op, entry in entries[arch].items() if entry.told is None] for arch in ARCHS}
    reports = {arch: ships[arch]["report"] for arch in ARCHS}
    hip_marks, hip_told = _hip_figures(record, golden, reports)
    compiling = {arch: ops for arch, ops in anew.items() if ops}
    for arch, report in budgets.compile_each({arch: [*ops, "--backend", "triton"] for arch, ops in compiling.items()}
                                             ).items():
        reports[arch]["triton"] = report["triton"]
    seen = budgets.run_each({arch: [str(Path(census.__file__)), arch, *(
        op for op in ops if not isinstance(reports[arch]["triton"][op], str))] for arch, ops in compiling.items()})
    for arch, report in reports.items():
        told = {op: dict(binaries=len(rows), forms=seen[arch][op])
                for op, rows in report["triton"].items() if not isinstance(rows, str)}
        kept = {op: entry.told for op, entry in entries[arch].items() if entry.told is not None}
        report["triton"] |= {op: {name: row | {"large": True} for name, row in golden["triton"][arch][op].items()}
                             for op in kept}
        report["told"] = {"triton": told | kept, "hip": hip_told[arch]}
        report["marks"] = {"triton": of[arch], "hip": hip_marks[arch]}
        report["forms"] = {"hip": ships[arch]["forms"], **{op: each["forms"] for op, each in (told | kept).items()}}
    return reports


def _hip_figures(record: recorded.Record, golden: dict[str, Any], reports: dict[str, dict[str, Any]]
                 ) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, Any]]]:  # fmt: skip
    """Adds to the reports what is seen in the assembly of HIP kernels, where their compiler is at hand; returns, by
    arch and operator, marks and results for the record: none where another compiler made code objects than golden.json
    is of."""
    marks: dict[str, dict[str, str]] = {arch: {} for arch in reports}
    told: dict[str, dict[str, Any]] = {arch: {} for arch in reports}
    if not importlib.util.find_spec("ziglang"):
        return marks, told
    for arch, report in reports.items():
        known = golden.get("hip", {}).get(arch, {}) if report["compilers"]["hip"] == golden["compilers"]["hip"] else {}
        for op, rows in report["hip"].items():
            if op not in known or isinstance(rows, str):
                report["hip"][op] = budgets.with_instructions(rows, op, arch)
                continue
            code = hashlib.sha256(hip.code_object(arch, op)).hexdigest()
            marks[arch][op] = f"{code[:16]} {_hash_of(golden, arch, op, 'hip')}"
            entry = record.entry(key(op, arch, "hip"), marks[arch][op])
            report["hip"][op] = (budgets.with_instructions(rows, op, arch) if entry.told is None
                                 else {name: row | known[op].get(name, {}) for name, row in rows.items()})
            told[arch][op] = dict(kernels=len(rows))
    return marks, told


def _hash_of(golden: dict[str, Any], arch: str, op: str, kind: str = "triton") -> str:
    """So that what is recorded was compared with the golden figures as they are."""
    return recorded.hash_of([json.dumps(golden.get(kind, {}).get(arch, {}).get(op))])
