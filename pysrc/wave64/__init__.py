"""wave64: ROCm operators for LLM inference. `wave64.ops.<name>(...)` or `torch.ops.wave64.<name>(...)`."""

from wave64 import backends, ops, platform
from wave64.backends import report, table, use
from wave64.op import OPS, BadArgument, Case, Cost, NotSupported, op

backends.load()

__all__ = ["OPS", "BadArgument", "Case", "Cost", "NotSupported", "op", "ops", "platform", "report", "table", "use"]
