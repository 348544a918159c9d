"""`python -m wave64 VERB ...`, also as the command `wave64`: every tool of the package by one name.

Without a verb: what serves each operator here, and why the rest does not.
"""

import argparse
import runpy
import sys

# Nothing is imported above main() that a verb may not need: the server's api process has no torch.

#: Verbs that are modules of their own: what is run, and what it does. `python -m MODULE` is the same.
MODULES = {
    "serve": ("wave64.launch_server", "serve a model over HTTP: serve --model-path MODEL --port 30000"),
    "bench_serving": ("wave64.bench_serving", "measure a server under load, by SGLang's flags: bench_serving "
                                              "--dataset-name random-ids"),
    "bench_one_batch": ("wave64.bench_one_batch", "time a batch on the engine alone: bench_one_batch --model-path M"),
    "emulate": ("wave64.serve.engine.emulate",
                "generate on an emulated MI300X, and say what a step costs: emulate --model-path MODEL --prompt TEXT"),
    "accuracy": ("wave64.serve.http.accuracy",
                 "perplexity and recitation of a checkpoint, exit 1 if it is read wrongly: accuracy --model-path M"),
    "doctor": ("wave64.tools.doctor.cli", "what this machine needs before a server runs well on it, with the commands"),
    "prebuild": ("wave64.serve.engine.prebuild",
                 "compile ahead what a server will launch: prebuild --arch gfx942 --model-path MODEL --tp 8"),
    "rpd2trace": ("wave64.tools.rpd2trace", "a profile of ROCm (RPD, rocpd) as a trace for Perfetto: rpd2trace IN.rpd"),
    "rpd": ("wave64.tools.rpd_report", "where the time of a profile went, what changed: rpd top IN.rpd, rpd diff A B"),
    "check-emulated": ("wave64.testing.emulator.check",
                       "hold machine code for gfx942 or gfx950 to the contract on the emulator"),
    "step": ("wave64.testing.emulator.step", "step through a kernel's machine code, an instruction at a time"),
    "trace": ("wave64.testing.emulator.trace", "what the waves of a launch do, by cycle, for Perfetto: trace rms_norm"),
    "cost": ("wave64.testing.cost", "what limits a kernel on MI300X or MI355X, by its execution on the emulator"),
    "compile": ("wave64.testing.compile", "compile Triton kernels for an architecture; figures as JSON"),
    "tune": ("wave64.testing.tune", "find launch configurations: timed on a GPU, else by machine code"),
}


def report(hashes: bool, device: str | None) -> int:
    import contextlib

    import wave64
    from wave64 import platform
    from wave64.backends import hip

    if hashes:
        print("\n".join(f"{digest}  {name}" for name, digest in hip.hashes().items()))
        return 0
    with wave64.emulate(device) if device else contextlib.nullcontext():
        arch = platform.arch()
        print(f"wave64 on {platform.device_name() if device else platform.device_type()}"
              + (f" ({arch.name})" if arch and not device else ""))
        print(wave64.table())
    return 0


def check(names: list[str], large: bool) -> int:
    """Hold every backend that can serve here to the contract, a line per (operator, backend)."""
    from wave64 import OPS, platform
    from wave64.backends import probe
    from wave64.op import BACKENDS
    from wave64.testing import contract

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
                if contract.too_large(case, device) or supports and supports(**contract.draw(case, device, 0)):
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
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MODULES:
        sys.argv = [f"wave64 {argv[0]}", *argv[1:]]
        runpy.run_module(MODULES[argv[0]][0], run_name="__main__")
        return 0
    from wave64.arch import EMULATED

    parser = argparse.ArgumentParser(prog="python -m wave64", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    reporting = verbs.add_parser("report", help="what serves each operator, and why the rest does not (the default)")
    for one, default in ((parser, False), (reporting, argparse.SUPPRESS)):
        one.add_argument("--hashes", action="store_true", default=default,
                         help="print the SHA-256 of every code object, and no more")
        one.add_argument("--device", choices=EMULATED, default=default or None,
                         help="of an emulated MI300X or MI355X instead of this machine")
    checking = verbs.add_parser("check", help="hold every backend that serves here to the contract")
    checking.add_argument("ops", nargs="*", metavar="OP")
    checking.add_argument("--large", action="store_true", help="the large cases, too (they want a GPU)")
    for verb, (_, words) in MODULES.items():
        verbs.add_parser(verb, help=words)
    args = parser.parse_args(argv)
    from wave64 import OPS, NotSupported

    if args.verb != "check":
        try:
            return report(args.hashes, args.device)
        except NotSupported as e:
            parser.error(str(e))

    if unknown := [name for name in args.ops if name not in OPS]:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(OPS)}")
    return check(args.ops, args.large)


if __name__ == "__main__":
    sys.exit(main())
