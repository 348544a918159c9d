"""`python -m wave64`: what serves here, and why the rest does not. `python -m wave64 check [OP ...]`: is it right?
`python -m wave64 --hashes`: the code objects that are installed, to compare with another build's."""

import argparse
import sys

import wave64
from wave64 import OPS, platform
from wave64.backends import hip, probe
from wave64.op import BACKENDS
from wave64.testing import contract


def table() -> int:
    arch = platform.arch()
    print(f"wave64 on {platform.device_type()}{f' ({arch.name})' if arch else ''}")
    print(wave64.table())
    return 0


def check(names: list[str], large: bool) -> int:
    """Holds every backend that can serve here to the contract, a line per (operator, backend)."""
    device = platform.device_type()
    serving = [b for b in BACKENDS if probe(b, device) is None]
    failures = 0
    for op in (OPS[name] for name in names or OPS):
        for backend in (b for b in serving if b in op.backends):
            passed, declined, broken = 0, 0, []
            for case in op.cases():
                if case.large and not large:
                    continue
                supports = op.backends[backend].supports
                if supports is not None and supports(**contract.draw(case, device, 0)):
                    declined += 1
                    continue
                try:
                    contract.verify(op, backend, case, device)
                    passed += 1
                except Exception as e:  # whatever a kernel raises is a finding; the other cases still run
                    broken.append(f"    {case.id}: {type(e).__name__}: {e}")
            failures += len(broken)
            notes = f", {declined} not supported" if declined else ""
            print(f"{op.name:24} {backend:10} {passed:3} cases kept the contract{notes}"
                  + (f", {len(broken)} BROKE it" if broken else ""), flush=True)
            print("\n".join(broken), end="\n" if broken else "")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--hashes", action="store_true", help="print the SHA-256 of every code object, and no more")
    checking = commands.add_parser("check", help="hold every backend that serves here to the contract")
    checking.add_argument("ops", nargs="*", metavar="OP")
    checking.add_argument("--large", action="store_true", help="the large cases, too (they want a GPU)")
    args = parser.parse_args(argv)
    if args.hashes:
        print("\n".join(f"{digest}  {name}" for name, digest in hip.hashes().items()))
        return 0
    if args.command is None:
        return table()
    if unknown := [name for name in args.ops if name not in OPS]:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(OPS)}")
    return check(args.ops, args.large)


if __name__ == "__main__":
    sys.exit(main())
