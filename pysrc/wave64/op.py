"""What an operator is: one Python function whose body is the reference, docstring the contract, signature the schema.

`@op` makes of it `torch.ops.wave64.<name>`, a place where backends register, and the cases that
the contract test, `python -m wave64 check`, the benchmark and the tuner all read.

An eager call goes straight to the bound backend; under torch.compile, in fake tensor mode and from C++ the registered
torch operator serves the same call. Which backend is bound is decided by `wave64.backends`, once, at import.
"""

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("wave64")

#: Every operator by name, in order of declaration.
OPS: dict[str, "Op"] = {}

#: Preference on a GPU; `aiter` joins only where it is asked for. On CPU tensors the reference serves.
BACKENDS = ("hip", "triton", "reference", "aiter")


class BadArgument(ValueError):
    """A refused argument: which operator, which argument, what was expected, what came, what to do."""

    def __init__(self, argument: str, expected: str, got: Any, hint: str = ""):
        self.op, self.argument, self.expected, self.hint = "", argument, expected, hint
        self.got = describe(got) if isinstance(got, Tensor) else str(got)
        super().__init__(argument, expected, self.got, hint)

    def __str__(self) -> str:
        text = f"{self.op or 'wave64'}: {self.argument}: expected {self.expected}, got {self.got}"
        return f"{text}; {self.hint}" if self.hint else text


class NotSupported(ValueError):
    """A backend asked for by name cannot serve; the message is its reason."""


def describe(tensor: Tensor) -> str:
    """dtype, shape, device and, where it is not contiguous, strides: what a message says of a tensor."""
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    return text if tensor.is_contiguous() else f"{text} with strides {list(tensor.stride())}"


@dataclass(frozen=True)
class Cost:
    """The least a call must do: bytes through device memory, each input read once and each output written once, and
    floating-point operations. Either over its peak rate is the roofline."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One set of arguments that matters. `make()` draws them anew, with plain torch calls, on the default device and
    from the default generator: the caller sets both (`torch.device(...)` as a context, `torch.manual_seed`).

    large: too big for the interpreter and for a CPU test; run on a GPU, in benchmarks and by the tuner.
    """

    id: str
    make: Callable[[], dict[str, Any]]
    large: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator. `supports(*args)` gives None, or why it cannot serve these arguments."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None] | None = None


class Op:
    """A declared operator; call it like the function it was declared as."""

    def __init__(self, reference: Callable, cases: Callable[[], Iterable[Case]], cost: Callable[..., Cost],
                 mutates: tuple[str, ...], check: Callable | None, fake: Callable | None, agree: Callable | None,
                 place: Callable | None = None):
        self.name: str = reference.__name__
        self.reference, self.cases, self.cost = reference, cases, cost
        self.mutates, self.check, self.agree = mutates, check, agree
        self.signature = inspect.signature(reference)
        self.__doc__, self.__wrapped__ = reference.__doc__, reference
        self.backends = {"reference": Backend("reference", reference)}
        #: device type -> backends to try in turn, filled by wave64.backends.bind
        self.bound: dict[str, tuple[Backend, ...]] = {}
        first = next(iter(self.signature.parameters))
        self.place = place or (lambda *args, **kwargs: args[0] if args else kwargs[first])
        self._declined: set[tuple[str, str]] = set()
        registered = torch.library.custom_op(f"wave64::{self.name}", self._run, mutates_args=mutates,
                                             schema=torch.library.infer_schema(reference, mutates_args=mutates))
        registered.register_fake(fake or reference)
        self.torch_op = getattr(torch.ops.wave64, self.name)

    def __repr__(self) -> str:
        return f"<op wave64.{self.name}{self.signature}>"

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.torch_op(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args, **kwargs):
        if self.check is not None:
            try:
                self.check(*args, **kwargs)
            except BadArgument as e:
                e.op = self.name
                raise
        candidates = self.bound.get(self.place(*args, **kwargs).device.type) or (self.backends["reference"],)
        for backend in candidates:
            reason = backend.supports(*args, **kwargs) if backend.supports else None
            if reason is None:
                return backend.run(*args, **kwargs)
            if len(candidates) > 1:
                self._decline(backend.name, reason)
        raise NotSupported(f"{self.name}: backend {backend.name}: {reason}")

    def _decline(self, backend: str, reason: str) -> None:
        """Nothing falls back in silence; nothing says the same thing at every call."""
        if (backend, reason) not in self._declined:
            self._declined.add((backend, reason))
            log.warning("%s: backend %s declines: %s; the next one serves", self.name, backend, reason)

    def backend(self, name: str, supports: Callable[..., str | None] | None = None):
        """Registers the decorated function, of the same signature, as backend `name` of this operator."""
        if name not in BACKENDS:
            raise ValueError(f"{self.name}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")

        def register(run: Callable) -> Callable:
            self.backends[name] = Backend(name, run, supports)
            return run

        return register


def op(*, cases: Callable[[], Iterable[Case]], cost: Callable[..., Cost], mutates: tuple[str, ...] = (),
       check: Callable | None = None, fake: Callable | None = None, agree: Callable | None = None,
       place: Callable | None = None):
    """Declares the decorated function as an operator.

    cases    yields the `Case`s that matter: decode of the served models, one token, odd sizes, empty, longest
    cost     (same arguments) -> `Cost`
    mutates  names of the arguments written in place
    check    (same arguments) -> None, or raises `BadArgument`; runs before any backend, so it must not sync
    fake     shapes and dtypes of the result, only where the reference cannot run on fake tensors (it looks at data)
    agree    (args, result, exact) -> None or AssertionError: replaces closeness where an answer is not a rounded
             number; `args` and `exact` are the arguments and the result of the evaluation in fp64
    place    (same arguments) -> the tensor on whose device the call runs, where that need not be the first argument
    """

    def declare(reference: Callable) -> Op:
        OPS[reference.__name__] = declared = Op(reference, cases, cost, mutates, check, fake, agree, place)
        return declared

    return declare
