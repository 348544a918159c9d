"""Which backend serves which operator: decided once, and reported in words.

The first call of an operator, or the first report, decides; until then no GPU runtime is opened, so that a process may
import wave64 and fork. `WAVE64_BACKEND` is checked at import all the same.

`WAVE64_BACKEND` overrides the default order: `triton` or `*=triton` prefers a backend wherever it has a kernel,
`rms_norm=hip` demands one for one operator; entries are separated by commas. `use(...)` does the same for a block of
code. A demanded backend that cannot serve raises `NotSupported` with the reason.
`WAVE64_STRICT=1` also makes every fallback for unsupported arguments an error.

`emulate(...)` makes the CPU's tensors those of an emulated card, and binds every operator as that card would have it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wave64 import platform, tuning
from wave64.arch import EMULATED
from wave64.op import BACKENDS, OPS, Backend, NotSupported, Op

if TYPE_CHECKING:
    from wave64.testing.emulator.device import Device, Meter

log = logging.getLogger("wave64")

_overrides: dict[str, str] = {}
_around: Callable[[str, Callable], Callable] | None = None
_first = threading.RLock()


def device_types() -> tuple[str, ...]:
    """The device types that operators are bound for."""
    return ("cpu", "cuda") if platform.device_type() == "cuda" else ("cpu",)


def strict() -> bool:
    return os.environ.get("WAVE64_STRICT") == "1"


def import_modules(package) -> None:
    """Import every module of a package of backends; each module registers its operators."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


@functools.cache
def import_triton_kernels() -> str | None:
    """None, or why triton_ops cannot be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f"triton cannot be imported ({e})"
    import wave64.triton_ops as kernels

    import_modules(kernels)
    return None


@functools.cache
def import_hopper_kernels() -> str | None:
    """None, or why the kernels of triton_ops/hopper, which are written in Gluon, cannot be imported."""
    if why := import_triton_kernels():
        return why
    try:
        import wave64.triton_ops.hopper as kernels

        import_modules(kernels)
    except (ImportError, AttributeError) as e:  # Gluon changes from one release of Triton to the next
        return f"this Triton's Gluon does not have what it is written in ({e})"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for. The variable is read here, as Triton reads it, because importing
    Triton takes 75 MB, too much where it cannot serve."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def probe(backend: str, device_type: str) -> str | None:
    """None if `backend` can serve tensors of `device_type` on this machine, else the reason in words."""
    if backend == "reference":
        return None
    emulated = platform.emulated()
    if backend == "cpu" and emulated is not None:
        return f"serves a CPU, not {emulated.name}"
    if backend == "cpu":
        return None if device_type == "cpu" else "serves CPU tensors only"
    if device_type == "cuda" and platform.device_type() == "cpu":
        return "no GPU is visible"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cpu" and not interpreted() and emulated is None:
            return "needs a GPU (the interpreter runs it on CPU: TRITON_INTERPRET=1 before the start)"
        return import_triton_kernels()
    if backend == "hopper":
        arch = platform.arch()
        if device_type == "cpu" or arch is None or arch.matrix != "wgmma":
            return f"needs an NVIDIA GPU of sm_90, this is {arch.name if arch else 'a CPU'}"
        return probe("triton", device_type) or import_hopper_kernels()
    if backend == "hip":
        from wave64.backends import hip

        return hip.reason(device_type) if emulated is None else hip.emulated_reason(emulated.arch.name)
    from wave64.backends import aiter

    return aiter.missing(device_type)


def reason(op: Op, backend: str, device_type: str) -> str | None:
    """None if `backend` can serve `op`, else why not."""
    if why := probe(backend, device_type):
        return why
    if backend not in op.backends:
        return f"no {backend} kernel of this operator"
    absent, arch = op.backends[backend].absent, platform.arch()
    return absent(arch) if absent and arch else None


@functools.cache
def evidence() -> dict[str, dict[str, dict[str, str]]]:
    """{architecture: {operator: what was measured there}} of tuned/first.json: `first`, the backend that comes before
    the others; `why`, in words; `command`, whose figures these are; `device`, with versions."""
    return json.loads(tuning.FOLDER.joinpath("first.json").read_text())


def measured(op: Op) -> dict[str, str] | None:
    """What decides which backend of `op` comes first on this architecture, where it is not the general order."""
    arch = platform.arch()
    return evidence().get(arch.name, {}).get(op.name) if arch else None


def demand(name: str, backend: str, device_type: str) -> None:
    """Raises NotSupported where `backend`, asked for by name for operator `name` or for all ("*"), cannot serve."""
    why = probe(backend, device_type) if name == "*" else reason(OPS[name], backend, device_type)
    if why:
        raise NotSupported(f"{'' if name == '*' else f'{name}: '}backend {backend} was asked for: {why}")


def order(op: Op, device_type: str, overrides: dict[str, str]) -> tuple[Backend, ...]:
    """The backends that serve `op`, first choice first."""
    if demanded := overrides.get(op.name):
        demand(op.name, demanded, device_type)
        return (op.backends[demanded],)
    emulated = platform.emulated()
    is_gpu = device_type == "cuda" or emulated is not None
    names = ["hip", "hopper", "triton", "reference"] if is_gpu else ["cpu", "reference"]
    if is_gpu and (row := measured(op)):
        names.sort(key=lambda name: name != row["first"])
    if preferred := overrides.get("*"):
        demand("*", preferred, device_type)
        names = [preferred, *(n for n in names if n != preferred)]
    chain = tuple(op.backends[n] for n in names if reason(op, n, device_type) is None)
    return chain[:1] if strict() else chain


def _served(op: Op, chain: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """The backends that serve `op`; on an emulated device their launches count as the operator's, and what `around`
    was given is around them."""
    emulated = platform.emulated()
    if emulated is not None:
        chain = tuple(emulated.serving(op.name, backend) for backend in chain)
    if _around is not None:
        chain = tuple(dataclasses.replace(backend, run=_around(op.name, backend.run)) for backend in chain)
    return chain


def parse(text: str) -> dict[str, str]:
    """`"triton"`, `"*=hip,rms_norm=triton"` -> {operator or "*": backend}."""
    chosen = {}
    for entry in filter(None, (e.strip() for e in text.split(","))):
        name, _, backend = entry.rpartition("=")
        name = name.strip() or "*"
        if name != "*" and name not in OPS:
            raise NotSupported(f"backend choice {entry!r}: no operator {name!r}; there are {', '.join(sorted(OPS))}")
        if backend not in BACKENDS:
            raise NotSupported(f"backend choice {entry!r}: no backend {backend!r}; there are {', '.join(BACKENDS)}")
        chosen[name] = backend
    return chosen


def bind(overrides: dict[str, str]) -> None:
    """Binds every operator for every device type. Raises before anything is changed.

    Overrides are for the device that this machine computes on; a demand must be servable there.
    """
    main = platform.device_type()
    chosen = {op: {d: _served(op, order(op, d, overrides if d == main else {})) for d in device_types()}
              for op in OPS.values()}
    for op, bound in chosen.items():
        op.bound = bound
    _overrides.clear()
    _overrides.update(overrides)


def bind_first(op: Op) -> None:
    """Binds every operator, by the environment's overrides, because `op` is asked and was not bound."""
    with _first:
        if op._bound is None:
            bind(dict(_overrides))
        if op._bound is None:
            op.bound = {}  # not among OPS: its reference serves


def load() -> None:
    """Registers what kernels there are and takes the environment's overrides; called once, when `wave64` is imported.
    Raises NotSupported where what they ask for cannot serve; nothing else is probed yet."""
    from wave64.backends import aiter_ops, cpu_ops, hip_ops

    import_modules(aiter_ops)
    import_modules(cpu_ops)
    import_modules(hip_ops)
    if interpreted() or platform.may_have_gpu():
        import_triton_kernels()
    overrides = parse(os.environ.get("WAVE64_BACKEND", ""))
    for name, backend in overrides.items():
        demand(name, backend, platform.device_type())
    _overrides.update(overrides)


@contextlib.contextmanager
def use(backend: str | None = None, /, **ops: str) -> Iterator[None]:
    """`with use("triton"):` prefers a backend, `with use(rms_norm="hip"):` demands one, for the whole process, until
    the block ends. Graphs captured inside keep what they captured."""
    before = dict(_overrides)
    chosen = parse(",".join([*([backend] if backend else []), *(f"{name}={b}" for name, b in ops.items())]))
    bind({**before, **chosen})
    try:
        yield
    finally:
        bind(before)


@contextlib.contextmanager
def around(wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Inside, wrap(operator, run) is called in place of the `run` that serves an operator."""
    global _around
    before, _around = _around, wrap
    try:
        bind(dict(_overrides))
        yield
    finally:
        _around = before
        bind(dict(_overrides))


@contextlib.contextmanager
def emulate(arch: str, meter: "Meter | None" = None, collect: "Callable[[Any], None] | None" = None
            ) -> "Iterator[Device]":
    """`with emulate("gfx942") as device:` the CPU's tensors are those of an emulated MI300X (gfx950: MI355X), for the
    whole process, until the block ends. Every call of an operator inside goes through the dispatch of that card,
    backends, tuned tables, FP8 flavor and layouts, and its real launchers, and executes its machine code; torch's own
    operations run on the CPU. `device.counts` has what was executed. Not for one device inside another.

    meter    watches every launch; see wave64.testing.emulator.device
    collect  is given Triton's launches, which are then neither compiled nor executed
    Raises NotSupported where the architecture is not emulated, Triton is interpreted (TRITON_INTERPRET=1), this process
    has opened a GPU's runtime, or the package that decodes machine code is not installed.
    """
    if arch not in EMULATED:
        raise NotSupported(f"emulate: arch: expected one of {', '.join(EMULATED)}, got {arch!r}")
    if interpreted():
        raise NotSupported("emulate: TRITON_INTERPRET: expected unset, because the interpreter replaces the kernels, "
                           f"got {os.environ['TRITON_INTERPRET']}; unset it and start a new process")
    if (other := platform.emulated()) is not None:
        raise NotSupported(f"emulate: {other.name} is in use; leave its block first")
    from wave64.testing.emulator.decode import missing
    from wave64.testing.emulator.device import Device

    if collect is None and (why := missing()):
        raise NotSupported(f"emulate: {why}")
    device, before = Device(arch, meter=meter, collect=collect), dict(_overrides)
    with contextlib.ExitStack() as stack:
        stack.callback(bind, before)  # last, for the machine itself
        stack.enter_context(device.in_use())
        bind(before)
        if collect is None:
            log.info("%s: machine code is executed on this CPU, instruction by instruction; "
                     "what torch itself would compute there, matrix products above all, torch computes here",
                     device.name)
        yield device


def report(device_type: str | None = None) -> list[dict[str, str]]:
    """One row per (operator, backend): op, backend, status ("bound", "available" or "off") and reason."""
    device_type = device_type or platform.device_type()
    if device_type not in device_types():
        raise NotSupported(f"device {device_type}: {probe('hip', device_type)}")
    rows, main = [], platform.device_type()
    for op in OPS.values():
        first = op.bound[device_type][0].name
        for backend in BACKENDS:
            why = reason(op, backend, device_type)
            status = "bound" if backend == first else "off" if why else "available"
            if status == "available" and device_type == main and (row := measured(op)):
                why = row["why"]
            rows.append({"op": op.name, "backend": backend, "status": status, "reason": why or ""})
    return rows


def table(rows: list[dict[str, str]] | None = None) -> str:
    """The report as text: a line per operator, then each reason once."""
    rows = report() if rows is None else rows
    names = list(dict.fromkeys(row["op"] for row in rows))
    width = max(map(len, names), default=2)
    mark = {"bound": "*", "available": "+", "off": "-"}
    notes: dict[str, int] = {}
    lines = [f"{'op':{width}}  {'in use':9}  " + "  ".join(f"{b:11}" for b in BACKENDS)]
    for name in names:
        mine = {row["backend"]: row for row in rows if row["op"] == name}
        used = next(b for b, row in mine.items() if row["status"] == "bound")
        cells = []
        for backend in BACKENDS:
            row = mine[backend]
            note = notes.setdefault(row["reason"], len(notes) + 1) if row["reason"] else None
            cells.append(f"{mark[row['status']] + (f' [{note}]' if note else ''):11}")
        lines.append(f"{name:{width}}  {used:9}  " + "  ".join(cells).rstrip())
    lines.append("* in use   + available   - off; reasons:")
    lines += [f"  [{i}] {why}" for why, i in notes.items()]
    return "\n".join(lines)


