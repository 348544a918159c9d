"""Tells torch's FlopCounterMode what each operator computes.

The module that holds its registry imports Triton, tens of megabytes that only those should pay for who count. So the
operators are registered when it is imported: at once where it is already, else by a finder that waits for its name.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

from wave64.op import OPS, Op

COUNTER = "torch.utils.flop_counter"


def _formula(op: Op):
    def flops(*args, out_val=None, **kwargs) -> int:
        return op.cost(*args, **kwargs).flops

    return flops


def register() -> None:
    """Registers every operator's floating-point operations, as `Op.cost` has them, with torch's counter."""
    counter = sys.modules[COUNTER]
    for op in OPS.values():
        if op.torch_op not in counter.flop_registry:
            counter.register_flop_formula(op.torch_op, get_raw=True)(_formula(op))


class _AtImport(MetaPathFinder):
    """Stands aside once torch's counter is asked for, and registers when it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module):
            execute(module)
            register()

        loader.exec_module = exec_module
        return spec


def register_at_import() -> None:
    """Called once, when `wave64` is imported."""
    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AtImport())
