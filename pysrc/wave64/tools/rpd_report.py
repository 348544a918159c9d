"""Where the time of a profile went: `python -m wave64 rpd top IN.rpd`; what changed: `python -m wave64 rpd diff A B`.

    python -m wave64 rpd top IN.rpd [--limit N] [--start 10%] [--end 90%]
    python -m wave64 rpd diff A.rpd B.rpd [--limit N]

`top`: kernels and copies by their time, and how busy each GPU was. `diff`: the same operations in two profiles, the
largest change first; those of one profile alone, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wave64.tools.rpd import NotAProfile, Profile, open_profile
from wave64.tools.rpd2trace import window_of

NAME = 90  # characters of a kernel's name


def short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= NAME else name[: NAME - 3] + "..."


def busy(profile: Profile, window: tuple[int, int] | None) -> dict[int, float]:
    """Of each GPU, which part of the window at least one operation ran."""
    begin, end = window or (profile.start, profile.end)
    spent: dict[int, int] = {}
    gpu, running, since = -1, 0, 0
    for of, ns, run, _ in profile.edges(window):
        if of != gpu:
            gpu, running = of, 0
        at = min(max(ns, begin), end)
        if running > 0:
            spent[gpu] = spent.get(gpu, 0) + at - since
        running, since = running + run, at
        spent.setdefault(gpu, 0)
    return {gpu: ns / max(end - begin, 1) for gpu, ns in spent.items()}


def top(profile: Profile, window: tuple[int, int] | None, limit: int) -> list[str]:
    rows = list(profile.by_name(window))
    whole = sum(row[2] for row in rows) or 1
    lines = [f"{'calls':>9} {'total us':>13} {'mean us':>11} {'min us':>10} {'max us':>11} {'%':>6}  name"]
    lines += [f"{count:>9,} {ns / 1e3:>13,.1f} {ns / count / 1e3:>11,.2f} {low / 1e3:>10,.2f} {high / 1e3:>11,.2f} "
              f"{100 * ns / whole:>6.2f}  {short(name)}" for name, count, ns, low, high in rows[:limit]]
    if len(rows) > limit:
        count, ns = sum(row[1] for row in rows[limit:]), sum(row[2] for row in rows[limit:])
        lines.append(f"{count:>9,} {ns / 1e3:>13,.1f} {'':>34} {100 * ns / whole:>6.2f}  {len(rows) - limit} others")
    lines += [f"GPU {gpu}: busy {100 * part:.1f} % of the time" for gpu, part in sorted(busy(profile, window).items())]
    return lines if rows else ["no operation of a GPU in this window"]


def diff(before: Profile, after: Profile, limit: int) -> list[str]:
    a, b = ({row[0]: row for row in profile.by_name()} for profile in (before, after))
    names = sorted({*a, *b})
    changes = [(b[name][2] if name in b else 0) - (a[name][2] if name in a else 0) for name in names]
    order = sorted(range(len(names)), key=lambda i: (-abs(changes[i]), names[i]))
    lines = [f"{'calls':>19} {'before us':>13} {'after us':>13} {'change us':>13} {'change':>8}  name"]

    def line(calls: str, old: int, new: int, name: str) -> str:
        percent = f"{100 * (new - old) / old:+.1f} %" if old else "new"
        return f"{calls:>19} {old / 1e3:>13,.1f} {new / 1e3:>13,.1f} {(new - old) / 1e3:>+13,.1f} {percent:>8}  {name}"

    for i in order[:limit]:
        old, new = a.get(names[i], ("", 0, 0)), b.get(names[i], ("", 0, 0))
        lines.append(line(f"{old[1]:,} -> {new[1]:,}", old[2], new[2], short(names[i])))
    calls = f"{sum(row[1] for row in a.values()):,} -> {sum(row[1] for row in b.values()):,}"
    return [*lines, line(calls, sum(row[2] for row in a.values()), sum(row[2] for row in b.values()),
                         f"all {len(names)} operations")]


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m wave64 rpd", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one, two = verbs.add_parser("top"), verbs.add_parser("diff")
    one.add_argument("input", type=Path, metavar="IN.rpd")
    one.add_argument("--start", metavar="T", help="microseconds behind the first call, or a percentage: 10%%")
    one.add_argument("--end", metavar="T", help="the same")
    two.add_argument("before", type=Path, metavar="A.rpd")
    two.add_argument("after", type=Path, metavar="B.rpd")
    for each in (one, two):
        each.add_argument("--limit", type=int, default=30, help="rows that are shown")
    options = parser.parse_args(argv)
    try:
        if options.verb == "top":
            with open_profile(options.input) as profile:
                lines = top(profile, window_of(profile, options.start, options.end), options.limit)
        else:
            with open_profile(options.before) as before, open_profile(options.after) as after:
                lines = diff(before, after, options.limit)
    except (NotAProfile, FileNotFoundError, ValueError) as e:
        print(f"wave64 rpd: {e}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
