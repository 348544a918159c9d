"""The checks that all operators share: each argument has its parameter's type, tensors are plain and on one device,
integers have 32 bits, no tensor requires a gradient, and written tensors have no overlapping elements.

`compiled` generates, for one operator's signature, the function behind an eager call: one line of comparisons, which
takes less than a microsecond where a loop over parameters takes several. Calls that this line does not accept go to
`Examiner`: it converts arguments (a numpy integer, a tuple), passes calls to the registered torch operator that only
torch's dispatcher can serve (subclasses, fake and meta tensors, proxies of a tracer), or raises BadArgument.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.autograd.profiler
from torch import Tensor

#: torch.autograd.graph.increment_version without what that does of its own, which takes longer than this.
increment_version = torch._C._increment_version
#: Types of tensors that are nothing but memory.
PLAIN = {Tensor, torch.nn.Parameter}
#: Kernels take sizes and counts as int32.
INT32 = range(-(2**31), 2**31)
NO_BACKWARD = "there is no backward: call it under torch.inference_mode() or torch.no_grad(), or pass .detach()"
#: What stands for a number while a graph is traced.
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class BadArgument(ValueError):
    """A refused argument: operator, argument, expected, got, hint."""

    def __init__(self, argument: str, expected: str, got: Any, hint: str = ""):
        self.op, self.argument, self.expected, self.hint = "", argument, expected, hint
        self.got = describe(got) if isinstance(got, Tensor) else str(got)
        super().__init__(argument, expected, self.got, hint)

    def __str__(self) -> str:
        text = f"{self.op or 'wave64'}: {self.argument}: expected {self.expected}, got {self.got}"
        return f"{text}; {self.hint}" if self.hint else text


def describe(tensor: Tensor) -> str:
    """A tensor, for a message: dtype, shape, device and, if it is not contiguous, strides."""
    shape = "nested" if tensor.is_nested else list(tensor.shape)
    text = f"{str(tensor.dtype).removeprefix('torch.')} {shape} on {tensor.device}"
    if tensor.layout != torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')} {text}"
    return text if tensor.is_contiguous() else f"{text} with strides {list(tensor.stride())}"


def describe_value(value: Any) -> str:
    """A value of the wrong type, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor, {describe(value)}"
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return f"{value!r}" if value is None else f"{type(value).__name__} {value!r}"
    return f"a {type(value).__name__}"


def is_disjoint(tensor: Tensor) -> bool:
    """True if the strides show that no two elements share memory."""
    return are_disjoint(tensor.shape, tensor.stride())


@functools.lru_cache(maxsize=4096)  # a server's shapes repeat, and computing takes half a microsecond more
def are_disjoint(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if each dimension's stride exceeds the span of the dimensions with smaller strides."""
    reach = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True


class Parameter:
    """One parameter of an operator: its type, whether it may be None, whether it is written."""

    def __init__(self, parameter: inspect.Parameter, mutates: tuple[str, ...]):
        self.name, self.default = parameter.name, parameter.default
        kinds = get_args(parameter.annotation) if type(None) in get_args(parameter.annotation) else ()
        self.optional = bool(kinds)
        self.kind = next((k for k in kinds if k is not type(None)), parameter.annotation)
        self.mutated = self.name in mutates

    @property
    def is_tensor(self) -> bool:
        return self.kind is Tensor

    def either(self, condition: str) -> str:
        """The condition on a value, as source; None passes where it stands for one."""
        return f"({self.name} is None or {condition})" if self.optional else condition

    def accepts(self) -> str:
        """The condition that the value is of the parameter's kind and needs no second look, as source."""
        name = self.name
        if self.is_tensor:
            return self.either(f"type({name}) in PLAIN")
        if self.kind is int:
            return self.either(f"type({name}) is int and -2147483648 <= {name} < 2147483648")
        if self.kind == list[int]:
            return self.either(f"type({name}) is list and all([type(each) is int for each in {name}])")
        return self.either(f"type({name}) is {self.kind.__name__}")

    def convert(self, value: Any) -> Any:
        """The value as the parameter's kind; raises BadArgument where it is none."""
        if value is None and self.optional:
            return None
        try:
            return self._convert(value)
        except (TypeError, ValueError, OverflowError):
            raise BadArgument(self.name, self.expected(), describe_value(value), self._hint(value)) from None

    def _convert(self, value: Any) -> Any:
        if self.is_tensor:
            if isinstance(value, Tensor):
                return value
        elif self.kind is int:
            number = self._integer(value)
            if number in INT32:
                return number
        elif self.kind == list[int]:
            if isinstance(value, list | tuple):
                return [self._integer(each) for each in value]
        elif self.kind is float:
            if not isinstance(value, Tensor | str | bytes):
                return float(value)
        elif self.kind is bool:
            if not isinstance(value, Tensor) and value in (False, True):
                return bool(value)
        elif isinstance(value, self.kind):
            return value
        raise TypeError

    @staticmethod
    def _integer(value: Any) -> int:
        if isinstance(value, Tensor):  # operator.index would wait for a GPU
            raise TypeError
        return operator.index(value)

    def expected(self) -> str:
        kinds = {Tensor: "a tensor", int: "an integer of 32 bits", float: "a number", bool: "True or False",
                 str: "a string", torch.dtype: "a torch.dtype", list[int]: "a list of integers"}
        return kinds[self.kind] + (" or None" if self.optional else "")

    def _hint(self, value: Any) -> str:
        if isinstance(value, Tensor) and self.kind in (int, float, bool):
            return "a number on the host; reading it from a GPU would stall it"
        return ""


def is_symbolic(value: Any) -> bool:
    """True for values that only torch's dispatcher can serve, and for symbols of a traced graph."""
    if isinstance(value, Tensor):
        return type(value) not in PLAIN
    return isinstance(value, SYMBOLS) or hasattr(type(value), "__torch_function__")


class Examiner:
    """Checks a call's arguments one by one. `scattered`: the operator checks the devices of its tensors itself."""

    def __init__(self, name: str, signature: inspect.Signature, mutates: tuple[str, ...], scattered: bool):
        self.name, self.signature, self.scattered = name, signature, scattered
        self.parameters = [Parameter(p, mutates) for p in signature.parameters.values()]

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises BadArgument, naming it, where an argument is missing, unknown or given twice."""
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError:
            names = list(self.signature.parameters)
            taken = f"{self.name}{self.signature}"
            for name in kwargs:
                if name not in names:
                    raise self._bad(name, "one of the arguments " + ", ".join(names), "an unknown one") from None
                if name in names[:len(args)]:
                    raise self._bad(name, "one value", "two, by position and by name") from None
            if len(args) > len(names):
                expected = f"at most {len(names)} arguments, {taken}"
                raise self._bad(names[-1], expected, f"{len(args)} arguments") from None
            missing = next(p for p in self.parameters[len(args):]
                           if p.default is inspect.Parameter.empty and p.name not in kwargs)
            raise self._bad(missing.name, missing.expected(), "nothing", f"the call is {taken}") from None

    def _bad(self, *args) -> BadArgument:
        error = BadArgument(*args)
        error.op = self.name
        return error

    def examine(self, args: tuple, eager: bool) -> tuple | None:
        """The arguments, converted to their parameters' kinds; None where the torch operator is to serve them; raises
        BadArgument where nothing can. eager: not called by the torch operator itself."""
        try:
            metas = [value.is_meta for value in args if isinstance(value, Tensor)]
            if eager and (any(map(is_symbolic, args)) or any(metas) and (all(metas) or not self.scattered)):
                for p, value in zip(self.parameters, args, strict=True):
                    if not is_symbolic(value):
                        p.convert(value)
                self._one_device(args)
                return None
            args = tuple(p.convert(value) for p, value in zip(self.parameters, args, strict=True))
            self._one_device(args)
            self._plain(args, eager)
        except BadArgument as e:
            e.op = self.name
            raise
        return args

    def _tensors(self, args: tuple) -> list[tuple[Parameter, Tensor]]:
        return [(p, value) for p, value in zip(self.parameters, args, strict=True) if isinstance(value, Tensor)]

    def _one_device(self, args: tuple) -> None:
        tensors = self._tensors(args)
        for p, value in tensors[1:] if not self.scattered else ():
            first, name = tensors[0][1], tensors[0][0].name
            if value.device != first.device:
                raise BadArgument(p.name, f"on {first.device}, where {name} is", value)

    def _plain(self, args: tuple, eager: bool) -> None:
        tensors = self._tensors(args)
        for p, value in tensors:
            if value.layout != torch.strided or value.is_quantized or value.is_nested:
                raise BadArgument(p.name, "a dense tensor", describe_value(value))
            if eager and value.requires_grad and torch.is_grad_enabled():
                raise BadArgument(p.name, "a tensor that does not require a gradient", f"{describe(value)}, which does",
                                  NO_BACKWARD)
        written = [(p, value) for p, value in tensors if p.mutated and value.numel()]
        for i, (p, value) in enumerate(written):
            if not is_disjoint(value):
                strides = f"{list(value.shape)} with strides {list(value.stride())}"
                raise BadArgument(p.name, "no overlapping elements, because it is written", strides,
                                  "pass .contiguous(), not an expanded view")
            for other, earlier in written[:i]:
                if earlier.data_ptr() == value.data_ptr():
                    raise BadArgument(p.name, f"memory of its own, because {other.name} is written, too",
                                      f"the address of {other.name}")


def compiled(examiner: Examiner, serve: Callable, torch_op: Callable) -> tuple[Callable, Callable]:
    """(what an eager call goes through, what the torch operator calls), both of the operator's signature.
    serve(where, *args): checks and runs on the device of the tensor `where`."""
    parameters = examiner.parameters
    tensors = [p for p in parameters if p.is_tensor]
    first, names = tensors[0].name, ", ".join(p.name for p in parameters)
    accepted = [p.accepts() for p in parameters]
    if not examiner.scattered:
        on_cpu = " and ".join(p.either(f"{p.name}.is_cpu") for p in tensors)
        on_gpu = " and ".join([f"{first}.is_cuda"] + [p.either(f"{p.name}.get_device() == {first}.get_device()")
                                                      for p in tensors[1:]])
        accepted.append(f"({on_cpu} or {on_gpu})")
    else:
        accepted += [p.either(f"({p.name}.is_cpu or {p.name}.is_cuda)") for p in tensors]
    written = [p for p in parameters if p.mutated]
    accepted += [p.either(f"({p.name}.is_contiguous() or are_disjoint({p.name}.shape, {p.name}.stride()))")
                 for p in written]
    accepted += [f"({' or '.join([f'{q.name} is None' for q in (a, b) if q.optional] + [''])}"
                 f"{a.name}.data_ptr() != {b.name}.data_ptr())"
                 for i, a in enumerate(written) for b in written[:i]]
    wants = " or ".join(p.either(f"{p.name}.requires_grad").replace("is None or", "is not None and") for p in tensors)
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    takes = ", ".join(f"{p.name}=DEFAULTS[{p.name!r}]" if p.name in defaults else p.name for p in parameters)
    bumps = f"bump(({', '.join(p.name for p in written)},))" if written else "pass"
    source = f"""
def {examiner.name}({takes}):
    if profiler._is_profiler_enabled or functorch_level() is not None or is_tracing() is not None:
        return torch_op({names})
    if {' and '.join(accepted)}:
        if not (grad_enabled() and ({wants})):
            result = serve({names})
            {bumps}
            return result
    args = examine(({names},), True)
    return torch_op({names}) if args is None else again(*args)

def kernel({takes}):
    if {' and '.join(accepted)}:
        return serve({names})
    return serve(*examine(({names},), False))

def again({names}):
    result = serve({names})
    {bumps}
    return result
"""
    scope: dict[str, Any] = dict(
        PLAIN=PLAIN, DEFAULTS=defaults, are_disjoint=are_disjoint, serve=serve, torch_op=torch_op, bump=bump,
        examine=examiner.examine, profiler=torch.autograd.profiler, grad_enabled=torch.is_grad_enabled,
        # torch's stubs lack this module of the extension
        functorch_level=torch._C._functorch.peek_interpreter_stack,  # pyright: ignore[reportAttributeAccessIssue]
        is_tracing=torch._C._get_tracing_state, dtype=torch.dtype)
    exec(compile(source, f"<wave64.ops.{examiner.name}>", "exec"), scope)  # noqa: S102
    return scope[examiner.name], scope["kernel"]


def bump(written: tuple[Tensor | None, ...]) -> None:
    """Increment the versions of written tensors, as torch's in-place operators do: a backward pass that saved an old
    value then raises. Tensors of inference mode have no version."""
    try:
        increment_version(written)  # pyright: ignore[reportArgumentType]  # seldom None: to sort it out comes after
    except (TypeError, RuntimeError):  # of None, and of inference tensors outside their mode
        increment_version(tuple(each for each in written if each is not None and not each.is_inference()))
