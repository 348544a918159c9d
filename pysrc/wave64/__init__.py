"""wave64: ROCm operators for LLM inference. `wave64.ops.<name>(...)` or `torch.ops.wave64.<name>(...)`.
`wave64.Engine(model_path=...)` generates without a server.

`import wave64` imports torch and registers the operators, in every process but the server's own two and that of
`bench_serving`: the api process and the client never need torch, and the engine process sets its handlers first. There,
the first use of an attribute does the same.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if importlib.util.find_spec("torch") is None:
    raise ImportError("wave64 needs torch, and does not install it, so that a ROCm build is never replaced: install "
                      "AMD's or PyTorch's wheel for your ROCm first; without a GPU a CPU build of torch, or "
                      "wave64[cpu], which takes whatever build your package index gives")

if TYPE_CHECKING:
    from wave64 import ops, platform
    from wave64.backends import emulate, report, table, use
    from wave64.op import OPS, BadArgument, Case, Cost, NotSupported, op
    from wave64.serve.http.offline import Engine as Engine
    from wave64.tools.profile import profile

__all__ = ["OPS", "BadArgument", "Case", "Cost", "NotSupported", "emulate", "op", "ops", "platform", "profile",
           "report", "table", "use"]

WITHOUT_TORCH = ("wave64.launch_server", "wave64.serve.engine.process", "wave64.bench_serving")
VERBS = ("serve", "bench_serving")
_is_loaded = False


def _needs_no_torch() -> bool:
    """Whether Python was started to run one of WITHOUT_TORCH: `python -m` with it, or `wave64` with its verb."""
    command, verb = os.path.basename(sys.argv[0]) if sys.argv else "", "".join(sys.argv[1:2])
    if command == "-m":  # which it is while Python looks for the module to run, and imports this package to do so
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        return module in WITHOUT_TORCH or module == "wave64" and verb in VERBS
    return command == "wave64" and verb in VERBS


def _load() -> None:
    """Import the operators, which registers them with torch. Raises NotSupported for what WAVE64_BACKEND demands in
    vain."""
    global OPS, BadArgument, Case, Cost, NotSupported, op, ops, platform, emulate, profile, report, table, use
    global _is_loaded
    _is_loaded = True
    from wave64 import backends, flops, ops, platform
    from wave64.backends import emulate, report, table, use
    from wave64.op import OPS, BadArgument, Case, Cost, NotSupported, op
    from wave64.tools.profile import profile

    backends.load()
    flops.register_at_import()


if not TYPE_CHECKING:  # a type checker would take any attribute for one that exists

    def __getattr__(name: str) -> object:
        if name == "Engine":  # whose packages not everyone has installed
            from wave64.serve.http.offline import Engine

            return Engine
        if name.startswith("__") or _is_loaded:
            raise AttributeError(f"module 'wave64' has no attribute {name!r}")
        _load()
        return getattr(sys.modules[__name__], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not _needs_no_torch():
    try:
        _load()
    except ValueError as error:  # NotSupported
        words = " ".join(str(error).split())
        if sys.argv[:1] == ["-m"]:  # `python -m wave64...` imports the package before the command could catch anything
            sys.exit(f"wave64: error: {words}")
        raise type(error)(words) from None
