"""AITER's hand-written assembly next to our kernels, on the same work, both executed on the emulator: the results of
AITER's are held to fp64, and what the emulator's checks find in them is listed.

    python tests/bench/aiter.py --coverage                    # how many of its code objects decode and bind
    python tests/bench/aiter.py --arch gfx950 --family mla    # one family's kernels next to ours
    python tests/bench/aiter.py --reports                     # two public reports of wrong decodes, looked into
    python tests/bench/aiter.py --calibrate                   # the model that predicts times, from AITER's own
    python tests/bench/aiter.py --hsa amd_aiter-0.1.7.post2.dev18-py3-none-any.whl --small
    python tests/bench/aiter.py --arch gfx950 --renew         # and puts the rows into AITER.md

The objects are those of PyPI's amd-aiter, pinned by version and hash (aiter_objects.py), from the installed wheel or
from --hsa: the wheel, or its hsa folder. Cycles are counted by unit for all waves; the bound is testing/cost.py's, of
which what it leaves out is said there. Waves of AITER's kernels go on at the same rate where their results are taken,
for some leave out barriers; the checks see them run one behind another, too.
"""

import argparse
import os
import sys
from pathlib import Path

import aiter_reports
import torch
from aiter_allreduce import allreduce
from aiter_attention import fmha, mla, pa
from aiter_calibrate import count_all, report, stored
from aiter_dense import gemm, norm
from aiter_moe import moe, topk
from aiter_objects import VERSION, Objects, coverage, table
from aiter_work import COLUMNS, Work, compare, heading, in_processes

from wave64.arch import EMULATED, lookup

FAMILIES = {"mla": mla, "pa": pa, "fmha": fmha, "moe": moe, "gemm": gemm, "topk": topk, "norm": norm,
            "allreduce": allreduce}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, default="gfx942")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--hsa", type=Path, help="the wheel, or its hsa folder; default: the installed wheel's")
    parser.add_argument("--repository", type=Path, help="the hsa folder of AITER's repository, for newer objects")
    parser.add_argument("--small", action="store_true", help="the smallest shape of each family alone")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument("--renew", action="store_true", help="put the rows into AITER.md's table")
    parser.add_argument("--coverage", action="store_true", help="count what decodes and binds, and execute nothing")
    parser.add_argument("--reports", action="store_true", help="AITER's issues 4363 and 5679, executed")
    parser.add_argument("--calibrate", action="store_true",
                        help="the model of testing/predict.py on AITER's published timings, of which tests/bench/"
                             "calibration.json keeps what the objects need; with --hsa or --repository counted anew")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.calibrate and not (args.hsa or args.repository):
        print(report(*stored()))
        return 0
    try:
        objects = Objects(args.hsa, args.repository)
        objects.verify()
    except (FileNotFoundError, ValueError) as e:
        parser.error(str(e))
    print(f"amd-aiter {VERSION}\n")
    if args.calibrate:
        rows = stored()[1]
        print(report(count_all(objects, rows), rows))
        return 0
    if args.coverage:
        print(f"{args.arch}\n\n{table(coverage(objects, args.arch))}")
        return 0
    if args.reports:
        print(f"| {' | '.join(aiter_reports.COLUMNS)} |\n|{'---|' * len(aiter_reports.COLUMNS)}", flush=True)
        for cells in aiter_reports.rows(objects):
            print(f"| {' | '.join(cells)} |", flush=True)
        return 0
    return run(objects, args.arch, args.family or list(FAMILIES), args.small, args.jobs, args.renew)


def compared(task: tuple[Work, bytes, str]) -> tuple[list[list[str]], list[str], str]:
    """Of a piece of work, AITER's object for it and the architecture: rows, what the checks find in AITER's, and what
    is wrong with its result."""
    torch.set_num_threads(1)
    try:
        rows, theirs = compare(*task)
    except AssertionError as e:
        return [], [], str(e)
    return rows, theirs.findings, ""


def run(objects: Objects, arch: str, families: list[str], small: bool, jobs: int, renew: bool) -> int:
    """Prints table and findings; gives how many kernels were wrong. renew: AITER.md's rows."""
    notes, found, wrong, works, made = [], [], [], [], []
    for family in families:
        pieces = list(FAMILIES[family](arch, small))
        if not pieces:
            notes.append(f"{family}: the wheel has no object for {arch}")
        for work in pieces:
            if why := objects.lacks(work.object):
                notes.append(f"{work.what}: {why}")
            else:
                works.append(work)
    print(f"{heading(arch)}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    tasks = [(work, objects.read(work.object), arch) for work in works]
    for work, (rows, findings, why) in zip(works, in_processes(compared, tasks, jobs), strict=True):
        wrong += [why] if why else []
        made += rows
        print("".join(f"| {' | '.join(row)} |\n" for row in rows), end="", flush=True)
        notes += [f"{work.what}: {work.note}"] if work.note else []
        found += [(work.object, each) for each in findings if (work.object, each) not in found]
    said = [f"{name}: {text}" for name, text in found]
    for title, lines in (("notes", notes), ("what the checks find in AITER's", said), ("wrong", wrong)):
        if lines:
            print("\n".join([f"\n{title}:", *(f"- {line}" for line in dict.fromkeys(lines))]))
    if renew:
        shown = Path(__file__).with_name("AITER.md")
        shown.write_text(renewed(shown.read_text(), arch, made))
    return len(wrong)


#: columns of the table that AITER.md has, too
SHOWN = [COLUMNS.index(name) for name in COLUMNS if name not in ("predicted, us", "ours / AITER", "executed, s")]


def renewed(text: str, arch: str, made: list[list[str]]) -> str:
    """AITER.md with these rows instead of those of the same work there, new ones at the end of the table."""
    before, title, rest = text.partition(f"**{lookup(arch).product}**\n\n")
    lines = rest.split("\n")
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    rows = {key(line): line for line in lines[2:end]}
    for row in made:
        line = f"| {' | '.join(row[i] for i in SHOWN)} |"
        rows[key(line)] = line
    return before + title + "\n".join([*lines[:2], *rows.values(), *lines[end:]])


def key(line: str) -> tuple[str, bool]:
    """(work, whether AITER's) of a row."""
    _, work, who, *_ = line.split("|")
    return work.strip(), who.strip() == "AITER"


if __name__ == "__main__":
    sys.exit(main())
