"""The contract every backend of every operator is held to, case by case.

`verify(op, backend, case)` draws the case's arguments, evaluates the reference in fp64, runs the backend and raises
`ContractError` unless
  - each result is at most twice as far from the fp64 evaluation as the reference run in the operator's own dtype, plus
    half a unit of the result's dtype (integers: equal; or as the operator's `agree` says);
  - every output was written (memory handed out during the call is filled with NaN or the largest integer);
  - nothing but the declared arguments changed, those only inside their views;
  - a second run gives the same bits;
  - on a GPU, a captured graph of a kernel replays to the same bits.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wave64 import quant
from wave64.op import Case, Op, describe

FP8 = tuple(quant.FP8.values())


class ContractError(AssertionError):
    """A backend broke the contract; the message says which clause, and by how much."""


@dataclass(frozen=True)
class Verdict:
    """How far a backend was from the fp64 evaluation, and how far it was allowed to be."""

    error: float
    bound: float


def verify(op: Op, backend: str, case: Case, device: str, seed: int = 0, run: Callable | None = None) -> Verdict:
    """Runs one (operator, backend, case) on `device`; raises ContractError where it breaks the contract. run: the
    backend's own call, unless something else is to run its kernels."""
    run = run or op.backends[backend].run
    args = draw(case, device, seed)
    exact_args = {name: widen(value) for name, value in args.items()}
    exact = outputs(op, op.reference(**exact_args), exact_args)
    own_args = copy(args)
    own = outputs(op, op.reference(**own_args), own_args)

    mine = copy(args)
    with poisoned():
        result = run(**mine)
    got = outputs(op, result, mine)
    _only_declared_changed(op, args, mine)
    if op.agree is not None:
        op.agree(exact_args, result, exact[0] if len(exact) == 1 else exact)
        verdict = Verdict(0.0, 0.0)
    else:
        verdict = _close(op, got, own, exact)

    again = copy(args)
    with poisoned():
        repeated = outputs(op, run(**again), again)
    for i, (first, second) in enumerate(zip(got, repeated, strict=True)):
        if not same_bits(first, second):
            raise ContractError(f"{op.name}: result {i} differs between two runs on the same arguments")
    if device == "cuda" and backend != "reference":
        _replays(op, run, args, got)
    return verdict


def draw(case: Case, device: str, seed: int) -> dict[str, Any]:
    """The case's arguments on `device`, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        return case.make()


def copy(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the same layout on storage of their own; views of one storage stay views of one copy."""
    storages: dict[int, Tensor] = {}

    def one(value):
        if not isinstance(value, Tensor):
            return value
        key = value.untyped_storage().data_ptr() if value.numel() else id(value)
        if key not in storages:
            storages[key] = _bytes(value).clone()
        twin = torch.empty(0, dtype=value.dtype, device=value.device)
        return twin.set_(storages[key].untyped_storage(), value.storage_offset(), value.size(), value.stride())

    return {name: one(value) for name, value in args.items()}


def widen(value: Any) -> Any:
    """Floating-point tensors in fp64 (FP8 stays FP8: it is storage, exact in itself); others copied."""
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() and value.dtype not in FP8 else value.clone()


def outputs(op: Op, result: Any, args: dict[str, Any]) -> list[Tensor]:
    """Everything a call wrote: what it returned, then the arguments it declares to write."""
    returned = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return returned + [args[name] for name in op.mutates if args.get(name) is not None]


def distance(got: Tensor, exact: Tensor) -> float:
    """The larger of two distances: of the worst element relative to the largest exact value, and root mean square.

    Infinite and NaN elements must be the same on both sides; infinity otherwise."""
    got, exact = got.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(finite, got.isfinite()) or not got[~finite].allclose(exact[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    off, scale = (got - exact)[finite].abs(), exact[finite].abs()
    worst = (off.max() / scale.max().clamp_min(1e-30)).item()
    mean = (off.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30)).item()
    return max(worst, mean)


def floor(dtype: torch.dtype) -> float:
    """What is always allowed: half a unit in the last place of 1; of fp32 eight units, since its sums are long."""
    return torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _close(op: Op, got: list[Tensor], own: list[Tensor], exact: list[Tensor]) -> Verdict:
    if len(got) != len(exact):
        raise ContractError(f"{op.name}: expected {len(exact)} results, got {len(got)}")
    worst = Verdict(0.0, 0.0)
    for i, (g, o, e) in enumerate(zip(got, own, exact, strict=True)):
        if g.shape != o.shape or g.dtype != o.dtype:
            raise ContractError(f"{op.name}: result {i}: expected {describe(o)}, got {describe(g)}")
        if not g.is_floating_point():
            if not torch.equal(g, e.to(g.dtype)):
                raise ContractError(f"{op.name}: result {i}: {int((g != e).sum())} of {g.numel()} integers differ")
            continue
        error, bound = distance(g, e), 2 * distance(o, e) + floor(g.dtype)
        if not error <= bound:
            raise ContractError(f"{op.name}: result {i}: error {error:.3g} against fp64, allowed {bound:.3g}")
        if error >= worst.error:
            worst = Verdict(error, bound)
    return worst


def _only_declared_changed(op: Op, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Restores the declared views from the originals, then compares whole storages byte by byte."""
    restored = {name: value for name, value in after.items() if isinstance(value, Tensor)}
    kept = copy(after)
    for name in op.mutates:
        if kept.get(name) is not None:
            kept[name].copy_(before[name])
    for name in restored:
        if not torch.equal(_bytes(kept[name]), _bytes(before[name])):
            inside = "outside its view" if name in op.mutates else "though it is not declared as written"
            raise ContractError(f"{op.name}: argument {name} changed {inside}")


def _replays(op: Op, run, args: dict[str, Any], expected: list[Tensor]) -> None:
    static = copy(args)
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(**copy(args))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")  # a call with nothing to do launches nothing, and torch warns of empty graphs
        result = run(**static)
    captured = outputs(op, result, static)
    for name in op.mutates:
        if static.get(name) is not None:
            static[name].copy_(args[name])
    graph.replay()
    torch.cuda.synchronize()
    for i, (first, second) in enumerate(zip(expected, captured, strict=True)):
        if not same_bits(first, second):
            raise ContractError(f"{op.name}: result {i} of a replayed graph differs from the eager one")


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage under `tensor`, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _poison(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor.fill_(True)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised arrives full of NaN (integers: the largest), so that what a kernel
    leaves unwritten shows."""
    patched = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in patched]

    def filled(original):
        return lambda *args, **kwargs: _poison(original(*args, **kwargs))

    for (owner, name), original in zip(patched, originals, strict=True):
        setattr(owner, name, filled(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(patched, originals, strict=True):
            setattr(owner, name, original)
