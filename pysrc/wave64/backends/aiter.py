"""AMD's AITER as a backend, where its package is installed and where it is asked for: `aiter`.

AITER's functions change from one version to the next. An adapter names the functions that it calls, in the module that
has them ("fused_moe.fused_moe"), and the parameters that it gives, all of them by name; one that ends in "?" is given
where the installed version has it. Before an adapter may serve, they are compared with the installed version's
signatures, and what differs is the reason why it does not, in the table of operators.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
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


def find(module: Any, function: str) -> Callable | str:
    """AITER's function, of itself or of a module of its, "module.function"; or why it is not there."""
    inner, _, name = function.rpartition(".")
    if inner:
        try:
            there = getattr(module, inner, None)
            module = there if isinstance(there, ModuleType) else importlib.import_module(f"{module.__name__}.{inner}")
        except Exception as error:
            return f"this aiter's {inner} cannot be imported ({type(error).__name__}: {error})"
    return getattr(module, name, None) or f"this aiter has no {function}"


@functools.cache
def parameters_of(found: Callable, function: str) -> dict[str, bool] | str:
    """Name of each parameter -> whether it must be given; or why that is not known. Most of AITER's functions are
    wrapped in one that takes anything and calls the torch operator of their name, whose schema has the parameters."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # a compiled function without a signature
        return f"this aiter's {function} has no signature to compare"
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name: p.default is p.empty for p in parameters if p.kind not in anything}
    if named or not any(p.kind in anything for p in parameters):
        return named
    operator = getattr(torch.ops.aiter, function.rpartition(".")[2], None)
    if operator is None:
        return f"this aiter's {function} has no signature to compare"
    arguments = operator.default._schema.arguments
    return {a.name: not a.has_default_value() for a in arguments if a.name != "dummy"}


def differs(module: Any, function: str, given: Sequence[str]) -> str | None:
    """None if `module` has the function, with parameters of these names and no other that must be given."""
    found = find(module, function)
    if isinstance(found, str):
        return found
    parameters = parameters_of(found, function)
    if isinstance(parameters, str):
        return parameters
    names = [name.rstrip("?") for name in given]
    unknown = [name for name in given if not name.endswith("?") and name not in parameters]
    wanted = [name for name, must in parameters.items() if must and name not in names]
    if unknown or wanted:
        words = [f"no {', '.join(unknown)}"] if unknown else []
        words += [f"{', '.join(wanted)} besides"] if wanted else []
        return f"this aiter's {function} takes {' and '.join(words)}"
    return None


def bind(op: Op, calls: Mapping[str, Sequence[str]], supports: Callable[..., str | None],
         tiles: bool = False) -> Callable[[Callable], Callable]:
    """Registers the decorated function as backend aiter of `op`. calls: AITER's function, as `find` takes it -> the
    parameters that it is given. tiles: see Backend. A batch of no tokens, for which AITER's launches fail, launches
    nothing: the reference gives the empty result."""
    def absent(arch: Any) -> str | None:
        module = package()
        if isinstance(module, str):
            return module
        return next(filter(None, (differs(module, name, given) for name, given in calls.items())), None)

    first = next(iter(inspect.signature(op.reference).parameters))

    def is_empty(args: tuple, given: dict[str, Any]) -> bool:
        return (args[0] if args else given[first]).numel() == 0

    def supports_here(*args: Any, **given: Any) -> str | None:
        return None if is_empty(args, given) else supports(*args, **given)

    def register(run: Callable) -> Callable:
        @functools.wraps(run)
        def run_here(*args: Any, **given: Any) -> Any:
            return (op.reference if is_empty(args, given) else run)(*args, **given)

        return op.backend("aiter", supports=supports_here, absent=absent, tiles=tiles)(run_here)

    return register


def call(function: str, **given: Any) -> Any:
    """Call AITER's function with what it takes of `given`; that this is enough, `bind` has seen."""
    module = package()
    found = find(module, function)
    assert callable(found), found
    parameters = parameters_of(found, function)
    return found(**{name: value for name, value in given.items() if name in parameters})


def member(name: str) -> Any:
    """A member of an enumeration of AITER's, "Enumeration.member"."""
    return functools.reduce(getattr, name.split("."), package())


def halves_in_rows(x: Tensor, *others: Tensor) -> str | None:
    """None for contiguous rows of bf16 or fp16; else why AITER's kernels are not given these."""
    if x.dtype not in HALVES:
        return f"takes bf16 and fp16, not {x.dtype}"
    if x.ndim != 2 or not all(each.is_contiguous() for each in (x, *others)):
        return "takes contiguous rows, [num_tokens, hidden]"
    return None
