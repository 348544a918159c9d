"""What the steps of a model cost on the card that an emulated device stands for, by operator: each launch's bound, as
wave64.testing.cost has it, and for matrix products of torch's own the roofline, since another library's kernels make
those. Sums are floors: of launches that run one after another, each at AMD's peaks.

    costs = StepCosts("gfx942")
    with wave64.emulate("gfx942", meter=costs), costs.watching():
        ...                     # a step
        step = costs.take()     # of what ran since the last time
    print(table({"a step": step}))
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from wave64.arch import lookup
from wave64.testing.cost import times_us
from wave64.testing.emulator.cost import Usage, counting

#: torch's products -> which argument is the left factor
PRODUCTS = {"linear": 0, "mm": 0, "bmm": 0, "matmul": 0, "addmm": 1, "baddbmm": 1}
TORCH = "products by torch"
LEFT_OUT = """Left out: torch's other operations (embedding, indexing, copies), of which {others} ran in a decode step;
waiting for memory, results and barriers; caches beyond the first touch of a line; launches, and what lies between them;
falling clocks. Products by torch are at their roofline (AMD's peaks of bandwidth and bf16 rate), whatever library makes
them."""


@dataclass
class Row:
    """Of one operator, over a step."""

    launches: int = 0
    instructions: int = 0  # of waves
    bound_us: float = 0.0
    limits: dict[str, float] = field(default_factory=dict)  # resource -> microseconds of launches that it limits

    def add(self, times: dict[str, float]) -> None:
        """A launch that needs each resource for so many microseconds."""
        limit = max(times, key=times.__getitem__)
        self.launches += 1
        self.bound_us += times[limit]
        self.limits[limit] = self.limits.get(limit, 0.0) + times[limit]


@dataclass
class Step:
    """What ran: operator -> its row; `others` is how many operations of torch's are in no row."""

    rows: dict[str, Row] = field(default_factory=dict)
    others: int = 0

    @property
    def bound_us(self) -> float:
        return sum(row.bound_us for row in self.rows.values())

    @property
    def instructions(self) -> int:
        return sum(row.instructions for row in self.rows.values())


class StepCosts:
    """The meter of an emulated device (see emulator/device.py), and of torch's operations inside `watching`."""

    def __init__(self, arch: str):
        self.arch = lookup(arch)
        self._counting = counting()
        self.checks: tuple[type, ...] = (self._counting,)
        self.is_counting = True
        self._step = Step()

    def add(self, op: str, kernel: str, instructions: int) -> None:
        """A launch of `kernel`, for the operator `op`, was executed."""
        row = self._step.rows.setdefault(op, Row())
        row.instructions += instructions
        for usage in self._counting.usages.values():
            if usage.waves:
                row.add(times_us(usage))
                _forget(usage)

    def take(self) -> Step:
        """What ran since the last time."""
        step, self._step = self._step, Step()
        return step

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What torch computes inside counts, too."""
        with _Watch(self):
            yield

    def add_torch(self, name: str, args: tuple, result: Any) -> None:
        """torch computed `result` by its operation `name`."""
        if name not in PRODUCTS:
            self._step.others += 1
            return
        tensors = [x for x in pytree.tree_leaves((args, result)) if isinstance(x, Tensor)]
        flops = 2 * result.numel() * args[PRODUCTS[name]].shape[-1]
        times = {"memory": sum(x.nbytes for x in tensors) / (self.arch.bandwidth_gbs * 1e3),
                 "matrix": flops / (self.arch.bf16_tflops * 1e6)}
        self._step.rows.setdefault(TORCH, Row()).add(times)


class _Watch(TorchDispatchMode):
    def __init__(self, costs: StepCosts):
        super().__init__()
        self._costs = costs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace != "wave64" and not _is_view(func, args, result):
            self._costs.add_torch(func._schema.name.partition("::")[2], args, result)
        return result


def _is_view(func, args: tuple, result: Any) -> bool:
    """Whether an operation moved no data: a view, or memory that is only allocated."""
    if func._schema.is_mutable or "empty" in func._schema.name:
        return not func._schema.is_mutable
    given = {x.untyped_storage()._cdata for x in pytree.tree_leaves(args) if isinstance(x, Tensor)}
    return all(x.untyped_storage()._cdata in given for x in pytree.tree_leaves(result) if isinstance(x, Tensor))


def _forget(usage: Usage) -> None:
    """The next launch counts alone. In place: the instructions of a machine are bound to it."""
    usage.waves = usage.blocks = usage.instructions = usage.conflict_free = usage.requested = usage.barriers = 0
    usage.cycles.update(dict.fromkeys(usage.cycles, 0))
    usage.touched.update(dict.fromkeys(usage.touched, 0))
    usage.lines.clear()


def table(steps: Mapping[str, Step], product: str) -> str:
    """A line per operator, with launches, wave instructions and microseconds in each of the steps, by what they are
    called."""
    ops = list(dict.fromkeys(op for step in steps.values() for op in step.rows))
    width = max([len(op) for op in ops] + [len("one after another")])
    lines = [" " * width + "".join(f"  {name:>42}" for name in steps),
             f"{'on ' + product:{width}}" + "".join(f"  {'launches':>8} {'instructions':>12} {'us':>8} {'limit':>11}"
                                                    for _ in steps)]
    for op in ops:
        cells = []
        for step in steps.values():
            row = step.rows.get(op)
            limit = max(row.limits, key=row.limits.__getitem__) if row else ""
            cells.append(f"  {row.launches:8} {row.instructions:12,} {row.bound_us:8.2f} {limit:>11}"
                         if row else " " * 44)
        lines.append(f"{op:{width}}" + "".join(cells).rstrip())
    sums = "".join(f"  {sum(row.launches for row in step.rows.values()):8} {step.instructions:12,} {step.bound_us:8.2f}"
                   + " " * 12 for step in steps.values())
    lines.append(f"{'one after another':{width}}" + sums.rstrip())
    return "\n".join(lines)
