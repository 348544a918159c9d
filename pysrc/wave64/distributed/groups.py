"""Groups of ranks, registered under names: torch's operator schemas take no objects, so a collective takes a name.

A process joins a world once, then partitions it into smaller groups. Every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

WORLD = "world"

#: what torch calls each group that this process is a member of, by our name
_REGISTERED: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class Group:
    """Where this process stands among those that exchange tensors under `name`."""

    name: str
    rank: int
    size: int


ALONE = Group("alone", 0, 1)


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
    _REGISTERED[WORLD] = world
    return Group(WORLD, rank, size)


def partition(name: str, groups: Sequence[Sequence[int]]) -> Group:
    """Register the groups of ranks of the world that will exchange tensors under `name`, each rank in one of them;
    returns this process's. Raises ValueError unless every rank of the world is in exactly one group."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if sorted(member for group in groups for member in group) != list(range(size)):
        raise ValueError(f"groups {name!r}: expected each of {size} ranks in one group, got {[*map(list, groups)]}")
    mine = ALONE
    for group in groups:
        made = dist.new_group(list(group))
        if rank in group:
            assert isinstance(made, dist.ProcessGroup)
            _REGISTERED[name] = made
            mine = Group(name, list(group).index(rank), len(group))
    return mine


def leave() -> None:
    """Forget all groups of this process."""
    _REGISTERED.clear()
    dist.destroy_process_group()


def registered(name: str) -> dist.ProcessGroup:
    """torch's object for a group. Raises ValueError for a name that is not registered."""
    if name not in _REGISTERED:
        raise ValueError(f"group: expected one of {', '.join(_REGISTERED) or 'none'}, which are registered, got "
                         f"{name!r}; join() a world or partition() it first")
    return _REGISTERED[name]
