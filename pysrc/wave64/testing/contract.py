"""The contract every backend of every operator is held to, case by case.

`verify(op, backend, case)` draws the case's arguments, evaluates the reference in fp64, runs the backend and raises
`ContractError` unless
  - each result is at most twice as far from the fp64 evaluation as the reference run in the operator's own dtype, plus
    half a unit of the result's dtype, eight of fp32: in each row (the last dimension), by the worst element relative to
    the row's largest exact one and by root mean square (wave64/testing/judge.py; integers: equal; or as the operator's
    `agree` says);
  - every output was written (memory handed out during the call is filled with NaN or the largest integer);
  - nothing but the declared arguments changed, those only inside their views;
  - under Triton's interpreter no load, store or atomic leaves the tensors that its launch was given, by a byte;
  - of a case's sparse pools nothing was touched, on a CPU, but the pages of memory that hold its rows in use;
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
from wave64.pools import GIB, rows_in_use
from wave64.testing import guard, judge, sparse
from wave64.testing.judge import distance, floor

__all__ = ["ContractError", "Verdict", "copy", "distance", "draw", "floor", "outputs", "poisoned", "same_bits",
           "too_large", "verify", "widen"]

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
    rows = {name: rows_in_use(args[name]) for name in case.sparse}
    exact_args = {name: widen(value, name in rows) for name, value in args.items()}
    exact = outputs(op, op.reference(**exact_args), exact_args, rows)
    own_args = copy(args, case.sparse)
    own = outputs(op, op.reference(**own_args), own_args, rows)
    del own_args

    mine = copy(args, case.sparse)
    with poisoned(), _inside(op, case, mine):
        result = run(**mine)
    got = outputs(op, result, mine, rows)
    _only_declared_changed(op, args, mine, rows)
    for name in case.sparse:
        if (byte := sparse.touched(_bytes(mine[name]), _in_use(mine, mine[name], case.sparse))) is not None:
            raise ContractError(f"{op.name}: argument {name} was touched outside its rows in use, about byte {byte}")
    if op.agree is not None:
        op.agree(exact_args, result, exact[0] if len(exact) == 1 else exact)
        verdict = Verdict(0.0, 0.0)
    else:
        verdict = _close(op, got, own, exact)

    del mine
    again = copy(args, case.sparse)
    with poisoned():
        repeated = outputs(op, run(**again), again, rows)
    for i, (first, second) in enumerate(zip(got, repeated, strict=True)):
        if not same_bits(first, second):
            raise ContractError(f"{op.name}: result {i} differs between two runs on the same arguments")
    if device == "cuda" and backend != "reference":
        _replays(op, run, args, got, rows)
    return verdict


def too_large(case: Case, device: str) -> str | None:
    """Why a case cannot be verified here, or None: on a GPU sparse pools take all their memory, in several copies."""
    if device == "cuda" and case.sparse and torch.cuda.get_device_properties(0).total_memory < 64 * GIB:
        return "copies of its pools take up to 64 GiB, more than this GPU has"
    return None


def draw(case: Case, device: str, seed: int) -> dict[str, Any]:
    """The case's arguments on `device`, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        return case.make()


def copy(args: dict[str, Any], pools: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments with the same layout on storage of their own; views of one storage stay views of one copy. Of `pools`,
    which are sparse, only the rows in use are copied."""
    storages: dict[int, Tensor] = {}
    for name in pools:
        whole = _bytes(args[name])
        if whole.data_ptr() not in storages:
            storages[whole.data_ptr()] = sparse.empty((whole.numel(),), torch.uint8, whole.device)
        few = storages[whole.data_ptr()]
        for start, end in sparse.spans(args[name]):
            few[start:end] = whole[start:end]

    def one(value):
        if not isinstance(value, Tensor):
            return value
        key = value.untyped_storage().data_ptr() if value.numel() else id(value)
        if key not in storages:
            storages[key] = _bytes(value).clone()
        twin = torch.empty(0, dtype=value.dtype, device=value.device)
        return twin.set_(storages[key].untyped_storage(), value.storage_offset(), value.size(), value.stride())

    return {name: one(value) for name, value in args.items()}


def widen(value: Any, is_sparse: bool = False) -> Any:
    """Floating-point tensors in fp64 (FP8 stays FP8: it is storage, exact in itself); others copied."""
    if not isinstance(value, Tensor):
        return value
    widens = value.is_floating_point() and value.dtype not in FP8
    if is_sparse:
        return sparse.widened(value) if widens else copy({"pool": value}, ("pool",))["pool"]
    return value.double() if widens else value.clone()


def outputs(op: Op, result: Any, args: dict[str, Any], rows: dict[str, list[int]] | None = None) -> list[Tensor]:
    """Everything a call wrote: what it returned, then the arguments it declares to write, of sparse ones a copy of
    their `rows` in use."""
    returned = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    written = {name: args[name] for name in op.mutates if args.get(name) is not None}
    return returned + [sparse.held(x, rows[name]) if rows and name in rows else x for name, x in written.items()]


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
        error, bound, far = judge.compare(g, o, e)
        if far:
            raise ContractError(f"{op.name}: result {i}: {far}")
        if error >= worst.error:
            worst = Verdict(error, bound)
    return worst


@contextlib.contextmanager
def _inside(op: Op, case: Case, args: dict[str, Any]) -> Iterator[None]:
    """Interpreted kernels keep to their tensors, to the rows in use of sparse ones; else a ContractError names both."""
    known = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            used = _in_use(args, value, case.sparse) if name in case.sparse else [(0, storage.nbytes())]
            known.setdefault(storage.data_ptr(), (used, f"argument {name}"))
    try:
        with guard.watched(known):
            yield
    except guard.Outside as e:
        raise ContractError(f"{op.name}, case {case.id}: {e}") from None


def _in_use(args: dict[str, Any], pool: Tensor, pools: tuple[str, ...]) -> sparse.Spans:
    """What of the storage under a sparse pool is in use, by it or by another of `pools`."""
    storage = pool.untyped_storage().data_ptr()
    return sorted(span for name in pools if args[name].untyped_storage().data_ptr() == storage
                  for span in sparse.spans(args[name]))


def _restore(op: Op, args: dict[str, Any], originals: dict[str, Any], rows: dict[str, list[int]]) -> None:
    """What the operator declares to write as it was."""
    for name in op.mutates:
        if args.get(name) is not None:
            for row in rows.get(name, [...]):
                args[name][row].copy_(originals[name][row])


def _only_declared_changed(op: Op, before: dict[str, Any], after: dict[str, Any], rows: dict[str, list[int]]) -> None:
    """Restores the declared views from the originals, then compares storages byte by byte: all of them, or what is in
    use of sparse ones."""
    kept = copy(after, tuple(rows))
    _restore(op, kept, before, rows)
    for name in (name for name, value in after.items() if isinstance(value, Tensor)):
        now, then = _bytes(kept[name]), _bytes(before[name])
        spans = sparse.spans(before[name]) if name in rows else [(0, then.numel())]
        if not all(torch.equal(now[start:end], then[start:end]) for start, end in spans):
            inside = "outside its view" if name in op.mutates else "though it is not declared as written"
            raise ContractError(f"{op.name}: argument {name} changed {inside}")


def _replays(op: Op, run, args: dict[str, Any], expected: list[Tensor], rows: dict[str, list[int]]) -> None:
    static = copy(args, tuple(rows))
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(**copy(args, tuple(rows)))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")  # a call with nothing to do launches nothing, and torch warns of empty graphs
        result = run(**static)
    _restore(op, static, args, rows)
    graph.replay()
    torch.cuda.synchronize()
    captured = outputs(op, result, static, rows)
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
    """Memory that torch hands out uninitialized arrives full of NaN (integers: the largest), so that what a kernel
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
