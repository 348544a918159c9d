"""Groups of ranks, registered under names: torch's operator schemas take no objects, so a collective takes a name.

A process joins a world once, then partitions it into smaller groups. Every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

WORLD = "world"


@dataclass(frozen=True)
class Group:
    """Where this process stands among those that exchange tensors under `name`."""

    name: str
    rank: int
    size: int


ALONE = Group("alone", 0, 1)

#: by name: where this process stands, and what torch has for the group; None: nothing
_REGISTERED: dict[str, tuple[Group, dist.ProcessGroup | None]] = {ALONE.name: (ALONE, None)}
_SUMMING: dict[str, Summing] = {}
_AT_LEAVE: list[Callable[[], None]] = []


def meet(host: str, port: int, first: bool = False) -> TCPStore:
    """Where ranks find each other: `first` listens there (port 0: a free one, `.port`), the others connect."""
    return TCPStore(host, port, is_master=first, wait_for_workers=False)


def join(store: Store, rank: int, size: int, backend: str, timeout_s: float) -> Group:
    """Join `size` ranks that meet at `store`, as `rank`; returns the group "world". Blocks until all are there.

    backend    what torch.distributed exchanges tensors with: "gloo" between CPUs, "nccl" between GPUs (RCCL on ROCm)
    timeout_s  how long joining and each collective may take
    raises     torch.distributed.DistError, or RuntimeError, when a rank does not come in time
    """
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    world = dist.group.WORLD
    assert world is not None
    return register(Group(WORLD, rank, size), world)


def partition(name: str, groups: Sequence[Sequence[int]]) -> Group:
    """Register the groups of ranks of the world that will exchange tensors under `name`, each rank in one of them;
    returns this process's. Raises ValueError unless every rank of the world is in exactly one group, and each group is
    in ascending order, which is torch's."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if sorted(member for group in groups for member in group) != list(range(size)) or any(
            list(group) != sorted(group) for group in groups):
        raise ValueError(f"groups {name!r}: expected each of {size} ranks in one group, each group in ascending order, "
                         f"got {[*map(list, groups)]}")
    mine = ALONE
    for group in groups:
        made = dist.new_group(list(group))
        if rank in group:
            assert isinstance(made, dist.ProcessGroup)
            mine = register(Group(name, list(group).index(rank), len(group)), made)
    return mine


def register(group: Group, made: dist.ProcessGroup | None = None) -> Group:
    """Make a group known by its name. made: torch's; None: torch has none, so that only operators whose kernels reach
    the other ranks serve it."""
    _REGISTERED[group.name] = group, made
    return group


class Summing(Protocol):
    """What sums tensors of a group in torch.distributed's stead, as far as it can."""

    def all_reduce(self, x: Tensor) -> bool:
        """Sum x over the ranks, in place, on the current stream; whether that was done."""
        ...


def serve_by(name: str, other: Summing | None) -> None:
    """Let `other` sum what the ranks of a group have, where it can; None: torch.distributed alone."""
    member(name)
    _SUMMING.pop(name, None)
    if other is not None:
        _SUMMING[name] = other


def summing(name: str) -> Summing | None:
    """What `serve_by` has named."""
    return _SUMMING.get(name)


def at_leave(run: Callable[[], None]) -> None:
    """`run` is called once, when this process leaves its groups."""
    _AT_LEAVE.append(run)


def leave() -> None:
    """Forget all groups of this process."""
    while _AT_LEAVE:
        _AT_LEAVE.pop()()
    _REGISTERED.clear()
    _SUMMING.clear()
    register(ALONE)
    if dist.is_initialized():
        dist.destroy_process_group()


def said(mine: Any, name: str) -> list[Any]:
    """What each rank of a group says, in their order, any picklable value. Every rank calls it, outside of captures."""
    everything: list[Any] = [mine] * member(name).size
    if len(everything) > 1:
        dist.all_gather_object(everything, mine, group=registered(name))
    return everything


def names() -> list[str]:
    """All that is registered."""
    return list(_REGISTERED)


def member(name: str) -> Group:
    """Where this process stands in a group. Raises ValueError for a name that is not registered."""
    if name not in _REGISTERED:
        raise ValueError(f"group: expected one of {', '.join(_REGISTERED)}, which are registered, got {name!r}; join() "
                         "a world or partition() it first")
    return _REGISTERED[name][0]


def registered(name: str) -> dist.ProcessGroup:
    """torch's object for a group. Raises ValueError for a name that is not registered, or that torch does not know."""
    member(name)
    made = _REGISTERED[name][1]
    if made is None:
        raise ValueError(f"group: expected one that torch.distributed serves, got {name!r}, whose ranks have none")
    return made
