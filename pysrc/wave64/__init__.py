"""wave64: ROCm operators for LLM inference. `wave64.ops.<name>(...)` or `torch.ops.wave64.<name>(...)`."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    raise ImportError("wave64 needs torch, and installs none, lest it replace a ROCm build: install AMD's or PyTorch's "
                      "wheel for your ROCm first; without a GPU a CPU build of torch, or wave64[cpu], which takes "
                      "whatever build your package index gives")

from wave64 import backends, flops, ops, platform
from wave64.backends import report, table, use
from wave64.op import OPS, BadArgument, Case, Cost, NotSupported, op

try:
    backends.load()
except NotSupported as error:
    words = f"wave64: error: {' '.join(str(error).split())}"
    if sys.argv[:1] == ["-m"]:  # `python -m wave64...` imports the package before the command could catch anything
        sys.exit(words)
    raise NotSupported(words.removeprefix("wave64: error: ")) from None
flops.register_at_import()

__all__ = ["OPS", "BadArgument", "Case", "Cost", "NotSupported", "op", "ops", "platform", "report", "table", "use"]
