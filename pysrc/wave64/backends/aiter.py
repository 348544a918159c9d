"""AMD's AITER as a backend, where its package is installed and where it is asked for: `aiter`.

AITER's functions change from one version to the next. An adapter names the function that it calls and the parameters
that it gives, all of them by name; before it may serve, they are compared with the installed version's signature, and
what differs is the reason why it does not, in the table of operators.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wave64 import platform
from wave64.op import Op

HALVES = (torch.bfloat16, torch.float16)


def missing(device_type: str) -> str | None:
    """None, or why no kernel of AITER's can serve tensors of this type."""
    if platform.emulated() is not None or device_type == "cpu":
        return "AITER's kernels want a GPU"
    if not platform.is_hip():
        return "AITER's kernels want a ROCm build of torch"
    return None if isinstance(found := package(), ModuleType) else found


@functools.cache
def package() -> ModuleType | str:
    """AITER, or why it cannot be imported."""
    if importlib.util.find_spec("aiter") is None:
        return "aiter is not installed (pip install amd-aiter)"
    try:
        return importlib.import_module("aiter")
    except Exception as error:  # it compiles, asks the driver and reads tables as it is imported
        return f"aiter cannot be imported ({type(error).__name__}: {error})"


def differs(module: Any, function: str, given: Sequence[str]) -> str | None:
    """None if `module` has the function, with parameters of these names and no other that must be given."""
    found = getattr(module, function, None)
    if found is None:
        return f"this aiter has no {function}"
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # a compiled function without a signature
        return f"this aiter's {function} has no signature to compare"
    unknown = [name for name in given if name not in parameters]
    wanted = [name for name, p in parameters.items() if name not in given and p.default is p.empty
              and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if unknown or wanted:
        words = [f"no {', '.join(unknown)}"] if unknown else []
        words += [f"{', '.join(wanted)} besides"] if wanted else []
        return f"this aiter's {function} takes {' and '.join(words)}"
    return None


def bind(op: Op, supports: Callable[..., str | None], **functions: Sequence[str]) -> Callable[[Callable], Callable]:
    """Registers the decorated function as backend aiter of `op`. functions: those of AITER that it calls -> the
    parameters that it gives."""
    def absent(arch: Any) -> str | None:
        module = package()
        if isinstance(module, str):
            return module
        return next(filter(None, (differs(module, name, given) for name, given in functions.items())), None)

    return op.backend("aiter", supports=supports, absent=absent)


def call(function: str, **given: Any) -> Any:
    """Call AITER's function."""
    return getattr(package(), function)(**given)


def halves_in_rows(x: Tensor, *others: Tensor) -> str | None:
    """None for contiguous rows of bf16 or fp16, at least one; else why AITER's kernels are not given these."""
    if x.dtype not in HALVES:
        return f"takes bf16 and fp16, not {x.dtype}"
    if x.ndim != 2 or not all(each.is_contiguous() for each in (x, *others)):
        return "takes contiguous rows, [num_tokens, hidden]"
    return "takes no empty tensors" if x.numel() == 0 else None
