"""What an operator is: one Python function whose body is the reference, docstring the contract, signature the schema.

`@op` registers it as `torch.ops.wave64.<name>`, lets backends register with it, and keeps the cases that the contract
test, `python -m wave64 check`, the benchmark and the tuner all read.

An eager call goes straight to the bound backend; under torch.compile, in fake tensor mode and from C++ the registered
torch operator serves the same call. Which backend is bound is decided by `wave64.backends`, once, at the first call.
"""

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch
from wave64.arguments import NO_BACKWARD, BadArgument, Examiner, compiled, describe

if TYPE_CHECKING:
    from wave64.tuning import Tuning

__all__ = ["BACKENDS", "OPS", "Backend", "BadArgument", "Case", "Cost", "NotSupported", "Op", "describe", "named", "op"]

log = logging.getLogger("wave64")

#: Every operator by name, in order of declaration.
OPS: dict[str, "Op"] = {}

#: In order of preference; `cpu` serves CPU tensors only, `aiter` only where it is asked for. `hopper` comes before
#: `triton`: it declines the calls for which triton was measured faster (tests/bench/RESULTS.md).
BACKENDS = ("hip", "hopper", "triton", "cpu", "reference", "aiter")


P = ParamSpec("P")
R = TypeVar("R")

#: The current GPU's index; a build of torch for CPUs has none.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def named(name: str) -> "Op":
    """The operator of that name; pickle loads operators through it."""
    return OPS[name]


class NotSupported(ValueError):
    """A backend asked for by name cannot serve; the message is its reason."""


@dataclass(frozen=True)
class Cost:
    """The minimum work of a call: bytes of device memory traffic, each input read once and each output written once,
    and floating-point operations. The roofline is the longer of the two at peak rates."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One set of arguments that matters. `make()` draws them anew, with plain torch calls, on the default device and
    from the default generator: the caller sets both (`torch.device(...)` as a context, `torch.manual_seed`).

    large: too big for the interpreter and for a CPU test; run on a GPU, in benchmarks and by the tuner.
    sparse: names of the arguments that are pools in which only `pools.rows_in_use` are in use. Neither kernels nor code
    that copies, compares or poisons arguments may touch other rows: most of their memory is never allocated.
    """

    id: str
    make: Callable[[], dict[str, Any]]
    large: bool = False
    sparse: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator. `supports(*args)` gives None, or why it cannot serve these arguments;
    `tuning` says how its launch configuration is chosen, where it has one; `absent(arch)` gives None, or why it serves
    no call on that architecture: there the operator is bound without it, and `supports` gives the same reason. tiles:
    whether it reads weights in the tiles of wave64/layouts.py, and lays others out at their first call."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None] | None = None
    tuning: "Tuning | None" = None
    absent: Callable[[Arch], str | None] | None = None
    tiles: bool = False


class Op(Generic[P, R]):
    """A declared operator; call it like the function it was declared as. It pickles and copies as itself."""

    def __init__(self, reference: Callable[P, R], cases: Callable[[], Iterable[Case]], cost: Callable[..., Cost],
                 mutates: tuple[str, ...], check: Callable | None, fake: Callable | None, agree: Callable | None,
                 device_of: Callable | None = None):
        self.name: str = reference.__name__
        self.reference, self.cases, self.cost = reference, cases, cost
        self.mutates, self.check, self.agree, self.device_of = mutates, check, agree, device_of
        self.signature = inspect.signature(reference)
        self.__doc__, self.__wrapped__ = reference.__doc__, reference
        self.backends = {"reference": Backend("reference", reference)}
        self._bound: dict[str, tuple[Backend, ...]] | None = None
        self._declined: set[tuple[str, str]] = set()
        self._fake = fake or reference
        self._examiner = Examiner(self.name, self.signature, mutates, scattered=device_of is not None)
        registered = torch.library.custom_op(f"wave64::{self.name}", lambda *args: self._kernel(*args),
                                             mutates_args=mutates,
                                             schema=torch.library.infer_schema(reference, mutates_args=mutates))
        registered.register_fake(self._promise)
        # What register_autograd would set; it takes no operator that writes its arguments.
        registered._setup_context_fn = self._refuse_gradient
        self.torch_op = getattr(torch.ops.wave64, self.name)
        self._eager, self._kernel = compiled(self._examiner, self._serve, self.torch_op.default)

    @property
    def bound(self) -> dict[str, tuple[Backend, ...]]:
        """Device type -> backends to try in turn; wave64.backends decides when the first operator is asked."""
        if self._bound is None:
            from wave64 import backends

            backends.bind_first(self)
            assert self._bound is not None
        return self._bound

    @bound.setter
    def bound(self, chosen: dict[str, tuple[Backend, ...]]) -> None:
        self._bound = chosen

    def __repr__(self) -> str:
        return f"<op wave64.{self.name}{self.signature}>"

    def __reduce__(self):
        return named, (self.name,)

    def __copy__(self) -> "Op[P, R]":
        return self

    def __deepcopy__(self, memo: dict) -> "Op[P, R]":
        return self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.torch_op(*args, **kwargs)
        try:
            return self._eager(*args, **kwargs)
        except TypeError:
            self._examiner.bind(args, kwargs)  # raises BadArgument if the call does not fit the signature
            raise

    def _serve(self, *args):
        """Run the call on the device of its tensors, whichever is current, and in the dtypes of its contract, with
        autocast too."""
        if torch._C._is_any_autocast_enabled():
            with torch._C._DisableAutocast():
                return self._serve(*args)
        where = args[0] if self.device_of is None else self.device_of(*args)
        if where.is_cuda and where.get_device() != current_device():
            with torch.cuda.device(where.get_device()):
                return self._run(where, args)
        return self._run(where, args)

    def _run(self, where: Tensor, args: tuple):
        try:
            if self.check is not None:
                self.check(*args)
            bound = self._bound or self.bound
            candidates = bound.get("cpu" if where.is_cpu else where.device.type) or (self.backends["reference"],)
            for backend in candidates:
                reason = backend.supports(*args) if backend.supports else None
                if reason is None:
                    return backend.run(*args)
                if len(candidates) > 1:
                    self._decline(backend.name, reason)
            raise NotSupported(f"{self.name}: backend {backend.name}: {reason}")
        except BadArgument as e:
            e.op = self.name
            raise
        except NotSupported:
            raise
        except Exception:  # torch's, of a sparse tensor for one: which argument it is comes first
            self._examiner.examine(args, eager=False)
            raise

    def _promise(self, *args, **kwargs):
        """The result's shapes and dtypes on fake tensors, also under autocast."""
        with torch._C._DisableAutocast():
            return self._fake(*args, **kwargs)

    def _refuse_gradient(self, ctx, inputs: tuple, output: Any) -> None:
        """The torch operator's, as eager calls refuse it: one of its inputs requires a gradient."""
        error = BadArgument("its tensors", "none that requires a gradient", "one that does", NO_BACKWARD)
        error.op = self.name
        raise error

    def _decline(self, backend: str, reason: str) -> None:
        """Log a fallback once per backend and reason: none is silent, and none is repeated at every call."""
        if (backend, reason) not in self._declined:
            self._declined.add((backend, reason))
            log.warning("%s: backend %s declines: %s; the next one serves", self.name, backend, reason)

    def backend(self, name: str, supports: Callable[..., str | None] | None = None, tuning: "Tuning | None" = None,
                absent: Callable[[Arch], str | None] | None = None, tiles: bool = False):
        """Registers the decorated function, of the same signature, as backend `name` of this operator; see Backend."""
        if name not in BACKENDS:
            raise ValueError(f"{self.name}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")

        def supports_here(*args, **kwargs) -> str | None:
            arch = platform.arch()
            why = absent(arch) if absent and arch else None
            return why or (supports(*args, **kwargs) if supports else None)

        def register(run: Callable) -> Callable:
            self.backends[name] = Backend(name, run, supports_here if absent else supports, tuning, absent,
                                          tiles)
            return run

        return register


def op(*, cases: Callable[[], Iterable[Case]], cost: Callable[..., Cost], mutates: tuple[str, ...] = (),
       check: Callable | None = None, fake: Callable | None = None, agree: Callable | None = None,
       device_of: Callable | None = None) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declares the decorated function as an operator.

    cases    yields the `Case`s that matter: decode of the served models, one token, odd sizes, empty, longest
    cost     (same arguments) -> `Cost`
    mutates  names of the arguments written in place
    check    (same arguments) -> None, or raises `BadArgument`; runs before any backend, so it must not sync
    fake     shapes and dtypes of the result, only where the reference cannot run on fake tensors (it looks at data)
    agree    (args, result, exact) -> None or AssertionError: replaces closeness where an answer is not a rounded
             number; `args` and `exact` are the arguments and the result of the evaluation in fp64
    device_of  (same arguments) -> the tensor on whose device the call runs, if tensors may be on several devices; then
             check has to compare them

    For every operator, wave64/arguments.py refuses arguments of another type than the signature's, tensors on two
    devices, tensors that require a gradient while gradients are on, and written tensors whose elements overlap.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        OPS[reference.__name__] = declared = Op(reference, cases, cost, mutates, check, fake, agree, device_of)
        return declared

    return declare
