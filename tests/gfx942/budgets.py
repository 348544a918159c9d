"""What the kernels may cost on the machines they are for: compiles them all, and compares with golden.json.

golden.json holds the compilers' versions and, by kind (triton, hip), architecture and operator, a row of figures for
every kernel; what a figure means is said in wave64/testing/isa.py. `python tests/gfx942/budgets.py` rewrites it and
prints what changed; commit it with the change that caused it.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wave64
from wave64.arch import lookup
from wave64.testing import isa

ARCHS = ("gfx942", "gfx950")
GOLDEN = Path(__file__).with_name("golden.json")
RENEW = f"python {Path(__file__).relative_to(Path(__file__).parents[2])}"
CODE_OBJECTS = Path(wave64.__file__).parent / "code_objects"

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Compiled:
    """What the large cases made of every Triton kernel, by architecture."""

    version: str                                 # Triton's
    kernels: dict[str, dict[str, Rows | str]]    # arch -> op -> rows, or why it does not compile
    unreached: dict[str, list[str]]              # arch -> kernels of wave64.triton_ops that no case launched


def compile_triton() -> Compiled:
    """A process per architecture, without the interpreter; quick once Triton's cache holds the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {arch: subprocess.Popen([sys.executable, "-m", "wave64.testing.compile", arch], env=environment,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for arch in ARCHS}
    reports = {}
    for arch, process in running.items():
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"wave64.testing.compile {arch}: exit status {process.returncode}\n{err}")
        reports[arch] = json.loads(out)
    return Compiled(reports[ARCHS[0]]["triton"], {arch: r["ops"] for arch, r in reports.items()},
                    {arch: r["unreached"] for arch, r in reports.items()})


def read_code_objects(arch: str, op: str) -> Rows:
    """The kernels of wave64/code_objects/<arch>/<op>.co; none where the build had no device compiler."""
    file = CODE_OBJECTS / arch / f"{op}.co"
    if not file.exists():
        return {}
    wave = lookup(arch).wave_size
    return {k.name: isa.figures(k, k.lds_bytes, k.max_block // wave) for k in isa.read_elf(file.read_bytes())}


def over_limits(row: dict[str, Any], arch: str) -> list[str]:
    """What no kernel may do, whichever compiler made it."""
    found = []
    if row["spills"] or row["scratch_bytes"]:
        found.append(f"spills {row['spills']} registers, {row['scratch_bytes']} bytes of scratch per lane")
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
    if "loop" in golden:
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


COLUMNS = ("VGPR", "AGPR", "SGPR", "spill", "LDS", "waves/SIMD", "instr", "loop", "matrix", "loads", "stores")


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["-"] * len(COLUMNS)
    code = ["", "", "", "", ""]
    if "loop" in row:
        widths = [" ".join(f"{n}x{size}B" for size, n in row[key].items()) for key in ("loads", "stores")]
        in_loop = sum(row["loop"].values()) if row["loops"] else "-"
        code = [row["instructions"], in_loop, sum(row["matrix"].values()), *widths]
    return [str(cell) for cell in (row["vgpr"], row["agpr"], row["sgpr"], row["spills"], row["lds_bytes"],
                                   f"{row['waves_per_simd']:g}", *code)]


def table(golden: dict[str, Any], before: dict[str, Any]) -> str:
    """A line per kernel; where a figure changed, old -> new."""
    lines = [["kind", "arch", "op", "case and kernel", *COLUMNS]]
    for kind in ("triton", "hip"):
        for arch in ARCHS:
            for op, rows in golden[kind][arch].items():
                old_rows = before.get(kind, {}).get(arch, {}).get(op, {})
                for key in {**rows, **old_rows}:
                    new, old = _cells(rows.get(key)), _cells(old_rows.get(key))
                    changed = [n if n == o or not old_rows else f"{o} -> {n}" for n, o in zip(new, old, strict=True)]
                    lines.append([kind, arch, op, key, *changed])
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines)


def dump(golden: dict[str, Any]) -> str:
    """JSON with one kernel a line, so that a change reads as one."""
    def write(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict) or not value:
            return json.dumps(value)
        pad = "  " * (5 - depth)
        body = ",\n".join(f"{pad}{json.dumps(k)}: {write(v, depth - 1)}" for k, v in value.items())
        return f"{{\n{body}\n{pad[2:]}}}"

    return write(golden, 4) + "\n"


def main() -> int:
    argparse.ArgumentParser(description="Rewrites golden.json and prints what changed.").parse_args()
    triton = compile_triton()
    failed = [f"{op} on {arch}: {rows}" for arch in ARCHS for op, rows in triton.kernels[arch].items()
              if isinstance(rows, str)]
    if failed:
        print("\n".join(["golden.json is left as it is; these kernels do not compile:", *failed]), file=sys.stderr)
        return 1
    hip = {arch: {name: rows for name in wave64.OPS if (rows := read_code_objects(arch, name))} for arch in ARCHS}
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden = {"compilers": {"triton": triton.version}, "triton": triton.kernels, "hip": hip}
    GOLDEN.write_text(dump(golden))
    print(table(golden, before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
