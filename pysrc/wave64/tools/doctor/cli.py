"""What this machine needs before a server runs well on it: `python -m wave64 doctor`.

    python -m wave64 doctor [--json] [--multi] [--fix] [--all]

A row for each thing that was looked at: OK, WARN (it will be slow or odd) or FAIL (it will not work), what was found,
why it matters and the command that mends it. --multi adds links between GPUs and an all-reduce over them. --fix asks
about each command that works without a reboot, and runs those that are answered with y. --all adds what compiled, and
the table of operators. The exit status is 1 where a row says FAIL.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable

from wave64.tools.doctor.gpus import gpu_rows, link_rows
from wave64.tools.doctor.host import host_rows
from wave64.tools.doctor.machine import FAIL, OK, WARN, Row, this_machine

COLORS = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[1;31m"}
WIDTH, INDENT = 110, 31


def all_rows(multi: bool) -> list[Row]:
    from wave64.tools.doctor.software import software_rows, this_software

    machine = this_machine()
    rows = [*gpu_rows(machine), *software_rows(machine, this_software()), *host_rows(machine)]
    if multi:
        import torch

        from wave64.tools.doctor.exchange import exchange_rows

        rows += [*link_rows(machine), *exchange_rows(torch.cuda.device_count())]
    return rows


def shown(rows: Iterable[Row], color: bool) -> list[str]:
    """The table: what was found on a line, why and what to do below it where something is to be done."""
    lines = []
    for row in rows:
        status = f"{COLORS[row.status]}{row.status:4}\033[0m" if color else f"{row.status:4}"
        lines += _wrapped(f"{status} {row.name:25} ", row.found)
        if row.status != OK:
            lines += _wrapped(" " * INDENT, row.why) if row.why else []
            lines += [" " * INDENT + f"-> {row.command}"] if row.command else []
    counts = {status: sum(row.status == status for row in rows) for status in (OK, WARN, FAIL)}
    return [*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())]


def _wrapped(first: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - INDENT) or [""]
    return [first + lines[0], *(" " * INDENT + line for line in lines[1:])]


def fix(rows: Iterable[Row], ask: Callable[[str], str] = input,
        run: Callable[[str], int] = lambda command: subprocess.call(command, shell=True)) -> int:
    """Asks about each command that works at once and runs those answered with y; the number that failed."""
    failed, asked = 0, 0
    for row in rows:
        if row.status == OK or not row.now:
            continue
        asked += 1
        try:
            answer = ask(f"{row.name}: {row.found}. Run `{row.command}`? [y/N] ")
        except EOFError:
            print("\nno answer: nothing more is run")
            break
        if answer.strip().lower() in ("y", "yes"):
            status = run(row.command)
            print(f"{row.name}: {'done' if not status else f'the command ended with status {status}'}")
            failed += bool(status)
    if not asked:
        print("nothing that can be mended without a reboot or a new container")
    return failed


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m wave64 doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("json", "multi", "fix", "all"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args(argv)
    if options.json and options.fix:
        parser.error("--json and --fix: expected one of them: --fix asks")
    rows = all_rows(options.multi)
    status = int(any(row.status == FAIL for row in rows))
    if options.json:
        print(json.dumps({"ok": not status, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return status
    print("\n".join(shown(rows, sys.stdout.isatty())))
    if options.all:
        from wave64.tools.doctor.software import backend_table, build_notes

        print("\n".join(["", *build_notes(), backend_table()]))
    if options.fix:
        return int(bool(fix(rows))) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
