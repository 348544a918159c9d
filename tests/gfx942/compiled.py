"""What the compilers make of every kernel, for all tests of a run: figures (budgets.py) and the forms of instructions
(census.py). What recorded.json has of an operator's Triton kernels is not compiled anew: its figures are golden.json's,
to which they were compared when they were recorded."""

import json
from pathlib import Path
from typing import Any

import budgets
import census
import recorded
from budgets import ARCHS


def key(op: str, arch: str) -> str:
    """Of the record, for an operator's Triton kernels."""
    return f"compiled {op} {arch}"


def obtain(record: recorded.Record, marks: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    """arch -> compilers, kernels, and by kind and operator rows of figures, or why there are none; `forms`, from "hip"
    and from operators with Triton kernels to {form: an instruction of it}; and of the latter `marks` and `told`, for
    the record. marks: arch -> operator -> mark of what is compiled for its cases (recorded.py)."""
    golden = budgets.read_golden()
    of = {arch: {op: f"{mark} {_hash_of(golden, arch, op)}" for op, mark in marks[arch].items()} for arch in ARCHS}
    entries = {arch: {op: record.entry(key(op, arch), mark) for op, mark in of[arch].items()} for arch in ARCHS}
    anew = {arch: [op for op, entry in entries[arch].items() if entry.told is None] for arch in ARCHS}
    reports = budgets.compile_all("--backend", "hip")
    compiling = {arch: ops for arch, ops in anew.items() if ops}
    for arch, report in budgets.compile_each({arch: [*ops, "--backend", "triton"] for arch, ops in compiling.items()}
                                             ).items():
        reports[arch]["triton"] = report["triton"]
    seen = budgets.run_each({arch: [str(Path(census.__file__)), arch, "hip", *(
        op for op in anew[arch] if not isinstance(reports[arch]["triton"][op], str))] for arch in ARCHS})
    for arch, report in reports.items():
        told = {op: dict(binaries=len(rows), forms=seen[arch][op])
                for op, rows in report["triton"].items() if not isinstance(rows, str)}
        kept = {op: entry.told for op, entry in entries[arch].items() if entry.told is not None}
        report["triton"] |= {op: {name: row | {"large": True} for name, row in golden["triton"][arch][op].items()}
                             for op in kept}
        report["told"] = told | kept
        report["marks"] = of[arch]
        report["forms"] = {"hip": seen[arch]["hip"], **{op: each["forms"] for op, each in report["told"].items()}}
    return reports


def _hash_of(golden: dict[str, Any], arch: str, op: str) -> str:
    """So that what is recorded was compared with the golden figures as they are."""
    return recorded.hash_of([json.dumps(golden.get("triton", {}).get(arch, {}).get(op))])
