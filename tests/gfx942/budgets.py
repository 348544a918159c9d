"""What the kernels may cost on the machines they are for: compiles them all, and compares with golden.json.

golden.json holds the compilers' versions and, by kind (triton, hip), architecture and operator, a row of figures for
every kernel; what a figure means is said in wave64/testing/isa.py.

    python tests/gfx942/budgets.py rms_norm [--asm FOLDER]    the figures of an operator, golden -> now
    python -m pytest tests/gfx942 --renew-golden              writes golden.json; commit it with what caused the change
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wave64.arch import lookup
from wave64.testing import built, isa

ARCHS = ("gfx942", "gfx950")
KINDS = ("triton", "hip")
GOLDEN = Path(__file__).with_name("golden.json")
HIP = Path(__file__).parents[2] / "hip"
RENEW = "python -m pytest tests/gfx942 --renew-golden"

#: By kind and operator, scalars that kernels spill, once and outside their loops, to lanes of a vector register:
#: sample's second launch keeps a row's options and four pointers over four searches; kernels for any number of ranks
#: keep which of seven peers there are, and where the slots of each begin; decodes of many heads keep what new tokens
#: are made of over the rotation of the queries.
SCALAR_SPILLS = {("hip", "sample"): 5, ("hip", "mla_decode_rope"): 11, ("hip", "all_reduce"): 56,
                 ("hip", "reduce_scatter"): 8, ("hip", "fused_all_reduce_rms_norm"): 56,
                 ("hip", "fused_all_reduce_rms_norm_quant_fp8"): 60}

Rows = dict[str, dict[str, Any]]


def run_each(commands: dict[str, list[str]]) -> dict[str, Any]:
    """What Python commands print, read as JSON, by the same keys. They run at the same time, without the interpreter
    that other tests run Triton kernels in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {key: subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True) for key, command in commands.items()}
    printed = {}
    for key, process in running.items():
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(commands[key])}: exit status {process.returncode}\n{err}")
        printed[key] = json.loads(out)
    return printed


def compile_all(*arguments: str) -> dict[str, dict[str, Any]]:
    """arch -> what `python -m wave64.testing.compile <arch> <arguments>` reports, with what is seen in the assembly of
    HIP kernels. Quick once Triton's cache holds the kernels."""
    reports = compile_each(dict.fromkeys(ARCHS, arguments))
    if importlib.util.find_spec("ziglang"):
        for arch, report in reports.items():
            report["hip"] = {op: with_instructions(rows, op, arch) for op, rows in report["hip"].items()}
    return reports


def compile_each(arguments: dict[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The same without assembly, with arguments of each architecture."""
    return run_each({arch: ["-m", "wave64.testing.compile", arch, *words] for arch, words in arguments.items()})


def with_instructions(rows: Rows | str, op: str, arch: str) -> Rows | str:
    """Adds to the figures of a code object those of its assembly text, which the package does not hold: from hip/ops.
    Where that source does not compile, or no longer gives the code object's registers, it gives the reason instead."""
    if isinstance(rows, str):
        return rows
    try:
        assembly = built.assembly(HIP, op, arch)
    except built.CompileError as e:
        return str(e)
    measured = {}
    for key, row in rows.items():
        name = key.split()[-1]
        found = re.search(rf"\n{name}:.*?; TotalNumVgprs: (\d+)", assembly, re.S)
        if found is None or int(found[1]) != row["vgpr"]:
            return (f"{name}: expected a code object made of hip/ops/{op}.hip as it is, got one with {row['vgpr']} "
                    f"VGPRs where the source gives {found[1] if found else 'no such kernel'}; build the package again")
        measured[key] = row | isa.read_asm(assembly, name).figures()
    return measured


def watched(rows: Rows) -> Rows:
    """The rows that belong in golden.json: of the large cases, and of every kernel in a code object."""
    return {name: {figure: value for figure, value in row.items() if figure != "large"}
            for name, row in rows.items() if row.get("large", True)}


def over_limits(row: dict[str, Any], arch: str, kind: str = "", op: str = "") -> list[str]:
    """What no kernel may do, whichever compiler made it. Only variants for odd shapes may spill scalars, which go to
    vector registers, and what SCALAR_SPILLS names."""
    found = []
    if row["spills"] or row["scratch_bytes"]:
        found.append(f"spills {row['spills']} vector registers, {row['scratch_bytes']} bytes of scratch per lane")
    if row["sgpr_spills"] > SCALAR_SPILLS.get((kind, op), 0) and row.get("large", True):
        found.append(f"spills {row['sgpr_spills']} scalar registers")
    if row["lds_bytes"] > lookup(arch).lds_bytes:
        found.append(f"LDS {row['lds_bytes']} bytes, {arch} has {lookup(arch).lds_bytes}")
    return found


def worse(row: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    """In which figures a kernel is worse than its golden row, beyond what a harmless change moves."""
    found = []
    if row["waves_per_simd"] < golden["waves_per_simd"]:
        found.append(f"waves per SIMD {row['waves_per_simd']}, golden {golden['waves_per_simd']}")
    if row["vgpr"] > golden["vgpr"] + 8:
        found.append(f"VGPRs {row['vgpr']}, golden {golden['vgpr']}")
    if "loop" in row and "loop" in golden:
        now, then = sum(row["loop"].values()), sum(golden["loop"].values())
        if now > 1.05 * then:
            found.append(f"loop instructions {now}, golden {then}")
        now, then = sum(row["matrix"].values()), sum(golden["matrix"].values())
        if bool(now) < bool(then):
            found.append(f"matrix instructions none, golden {golden['matrix']}")
        if (row["loads"].get("16", 0) < golden["loads"].get("16", 0)
                and sum(row["loads"].values()) >= sum(golden["loads"].values())):
            found.append(f"loads by width in bytes {row['loads']}, golden {golden['loads']}")
    return found


def dropped(row: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    """What a kernel has clearly less of than its golden row: it may be better, and it may leave work out."""
    if "loop" not in row or "loop" not in golden:
        return []

    def counts(side: dict[str, Any]) -> dict[str, int]:
        return {"loop instructions": sum(side["loop"].values()), "matrix instructions": sum(side["matrix"].values()),
                **{f"bytes that a lane {verb}": sum(int(size) * n for size, n in side[kind].items())
                   for kind, verb in (("loads", "loads"), ("stores", "stores"))}}

    now, then = counts(row), counts(golden)
    return [f"{what} {now[what]}, golden {then[what]}: figures dropped: if meant, renew with {RENEW}"
            for what in then if now[what] < 0.95 * then[what]]


def compare(rows: Rows, golden: Rows) -> list[str]:
    """What changed for the worse, or dropped; a row that only one side has counts, for then it is not watched: that
    kernel."""
    found = [f"{name}: not in golden.json" for name in rows.keys() - golden.keys()]
    found += [f"{name}: in golden.json, but no longer there" for name in golden.keys() - rows.keys()]
    found += [f"{name}: {text}" for name in rows.keys() & golden.keys()
              for text in worse(rows[name], golden[name]) + dropped(rows[name], golden[name])]
    return sorted(found)


COLUMNS = ("VGPR", "AGPR", "SGPR", "spill", "LDS", "waves/SIMD", "instr", "loop", "matrix", "loads", "stores")


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["-"] * len(COLUMNS)
    code = ["", "", "", "", ""]
    if "loop" in row:
        widths = [" ".join(f"{n}x{size}B" for size, n in row[key].items()) for key in ("loads", "stores")]
        in_loop = sum(row["loop"].values()) if row["loops"] else "-"
        code = [row["instructions"], in_loop, sum(row["matrix"].values()), *widths]
    return [str(cell) for cell in (row["vgpr"], row["agpr"], row["sgpr"], f"{row['spills']}+{row['sgpr_spills']}",
                                   row["lds_bytes"], f"{row['waves_per_simd']:g}", *code)]


def table(now: dict[str, Any], before: dict[str, Any]) -> str:
    """A line per kernel of the operators in `now`; where a figure changed, old -> new."""
    lines = [["kind", "arch", "op", "case and kernel", *COLUMNS]]
    for kind in KINDS:
        for arch in ARCHS:
            for op, rows in now[kind][arch].items():
                old_rows = before.get(kind, {}).get(arch, {}).get(op, {})
                for key in {**rows, **old_rows}:
                    new, old = _cells(rows.get(key)), _cells(old_rows.get(key))
                    changed = [n if n == o or not old_rows else f"{o} -> {n}" for n, o in zip(new, old, strict=True)]
                    lines.append([kind, arch, op, key, *changed])
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines)


def as_golden(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What golden.json would hold after these reports. Raises RuntimeError with what cannot be recorded, and why."""
    failed = [f"{kind} {op} on {arch}: {rows}" for kind in KINDS for arch in ARCHS
              for op, rows in reports[arch][kind].items() if isinstance(rows, str)]
    failed += [f"no code objects for {arch}: build the package first" for arch in ARCHS
               if not reports[arch]["compilers"]["hip"]]
    if failed:
        raise RuntimeError("\n".join(["golden.json cannot be made:", *failed]))
    return {"compilers": reports[ARCHS[0]]["compilers"],
            **{kind: {arch: {op: watched(rows) for op, rows in reports[arch][kind].items()} for arch in ARCHS}
               for kind in KINDS}}


def read_golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def dump(golden: dict[str, Any]) -> str:
    """JSON with one kernel a line, so that a change reads as one."""
    def write(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict) or not value:
            return json.dumps(value)
        pad = "  " * (5 - depth)
        body = ",\n".join(f"{pad}{json.dumps(k)}: {write(v, depth - 1)}" for k, v in value.items())
        return f"{{\n{body}\n{pad[2:]}}}"

    return write(golden, 4) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the figures of operators' kernels: golden -> now.")
    parser.add_argument("ops", nargs="*", metavar="op", help="default: every operator")
    parser.add_argument("--asm", metavar="FOLDER", help="write the assembly of the Triton kernels there")
    options = parser.parse_args()
    reports = compile_all(*options.ops, *(["--asm", options.asm] if options.asm else []))
    print(table(as_golden(reports), read_golden()))


if __name__ == "__main__":
    main()
