"""AITER's hand-written assembly next to our kernels, on the same work, both executed on the emulator: the results of
AITER's are held to fp64, and what the emulator's checks find in them is listed.

    python tests/bench/aiter.py --coverage                    # how many of its code objects decode and bind
    python tests/bench/aiter.py --arch gfx950 --family mla    # one family's kernels next to ours
    python tests/bench/aiter.py --reports                     # two public reports of wrong decodes, looked into
    python tests/bench/aiter.py --calibrate                   # the model that predicts times, from AITER's own
    python tests/bench/aiter.py --hsa amd_aiter-0.1.7.post2.dev18-py3-none-any.whl --small

The objects are those of PyPI's amd-aiter, pinned by version and hash (aiter_objects.py), from the installed wheel or
from --hsa: the wheel, or its hsa folder. Cycles are counted by unit for all waves; the bound is testing/cost.py's, of
which what it leaves out is said there. Waves of AITER's kernels go on at the same rate where their results are taken,
for some leave out barriers; the checks see them run one behind another, too.
"""

import argparse
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
from aiter_work import COLUMNS, compare, heading

from wave64.arch import EMULATED

FAMILIES = {"mla": mla, "pa": pa, "fmha": fmha, "moe": moe, "gemm": gemm, "topk": topk, "norm": norm,
            "allreduce": allreduce}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, default="gfx942")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--hsa", type=Path, help="the wheel, or its hsa folder; default: the installed wheel's")
    parser.add_argument("--repository", type=Path, help="the hsa folder of AITER's repository, for newer objects")
    parser.add_argument("--small", action="store_true", help="the smallest shape of each family alone")
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
    return run(objects, args.arch, args.family or list(FAMILIES), args.small)


def run(objects: Objects, arch: str, families: list[str], small: bool) -> int:
    """Prints table and findings; gives how many kernels were wrong."""
    notes, found, wrong = [], [], []
    print(f"{heading(arch)}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for family in families:
        pieces = list(FAMILIES[family](arch, small))
        if not pieces:
            notes.append(f"{family}: the wheel has no object for {arch}")
        for work in pieces:
            if why := objects.lacks(work.object):
                notes.append(f"{work.what}: {why}")
                continue
            try:
                rows, theirs = compare(work, objects.read(work.object), arch)
            except AssertionError as e:
                wrong.append(str(e))
                continue
            print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
            notes += [f"{work.what}: {work.note}"] if work.note else []
            found += [(work.object, each) for each in theirs.findings if (work.object, each) not in found]
    said = [f"{name}: {text}" for name, text in found]
    for title, lines in (("notes", notes), ("what the checks find in AITER's", said), ("wrong", wrong)):
        if lines:
            print("\n".join([f"\n{title}:", *(f"- {line}" for line in dict.fromkeys(lines))]))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
