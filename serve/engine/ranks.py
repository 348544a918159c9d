"""Who of an engine's ranks does what: the groups that the flags ask for, and how a process joins them."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from wave64 import distributed, platform
from wave64.backends import peers
from wave64.distributed import ALONE, Group, Store
from wave64.serve.args import ServerArgs
from wave64.serve.model.parallel import Ranks

log = logging.getLogger("wave64")

PATIENCE = 0.8  # of the time that a step may take: then a kernel that waits for a rank says for which
TIMEOUT_S = 24 * 3600.0  # of a collective: rank 0 notices sooner which rank is to blame (team.py)


def ranks_of(args: ServerArgs, rank: int) -> Ranks:
    """Where rank `rank` of tp_size stands; its groups are not joined."""
    if args.tp_size == 1:
        return Ranks()
    world, (attention, data) = Group("world", rank, args.tp_size), _groups(args)
    if args.groups == 1:
        return Ranks(world, attention=world, ep_size=args.ep_size or 1)
    return Ranks(world, _member("attention", attention, rank), _member("data", data, rank), args.ep_size or 1)


def join(args: ServerArgs, rank: int, store: Store, device: torch.device) -> Ranks:
    """Join the groups of rank `rank`. Blocks until all ranks have come."""
    ranks = ranks_of(args, rank)
    distributed.join(store, rank, args.tp_size, "gloo" if device.type == "cpu" else "nccl", TIMEOUT_S)
    if args.groups > 1:
        for name, groups in zip(("attention", "data"), _groups(args), strict=True):
            distributed.partition(name, groups)
    if device.type == "cuda" or platform.emulated() is not None:
        for group in {each.name: each for each in (ranks.world, ranks.attention, ranks.data)}.values():
            _connect(args, group, device)
    return _quantized(args, ranks)


def _quantized(args: ServerArgs, ranks: Ranks) -> Ranks:
    """The ranks, sending large sums as the flag says, if kernels serve their group."""
    if args.quick_reduce_quantization == "none":
        return ranks
    if (why := peers.reason(ranks.attention.name)) is None:
        return replace(ranks, quantize=args.quick_reduce_quantization)
    if ranks.world.rank == 0:
        log.warning("--quick-reduce-quantization: sums over ranks stay exact: %s", why)
    return ranks


def _connect(args: ServerArgs, group: Group, device: torch.device) -> None:
    """Let kernels exchange what the ranks of a group have, or say why torch.distributed does."""
    if group.size == 1:
        return
    if args.enable_mscclpp:
        from wave64.distributed import mscclpp

        why = mscclpp.connect(group)
        if why is None:
            peers.disconnect(group.name, "--enable-mscclpp: MSCCL++ sums messages of 512 bytes to 8 MiB")
            return
        if group.rank == 0:
            log.warning("group %s: --enable-mscclpp: MSCCL++ takes no part: %s", group.name, why)
    if args.disable_custom_all_reduce:
        peers.disconnect(group.name, why := "--disable-custom-all-reduce")
    else:
        step_s = args.watchdog_timeout or peers.TIMEOUT_S
        why = peers.connect(group.name, device, min(peers.TIMEOUT_S, PATIENCE * step_s))
    if why is not None and group.rank == 0:
        log.warning("group %s: torch.distributed exchanges its tensors: %s", group.name, why)


def served(rows: list[dict[str, str]], ranks: Ranks) -> list[dict[str, str]]:
    """The rows of `wave64.report()` as they are for these ranks: where kernels do not reach the memory of a group's
    ranks, on whichever of them, torch.distributed serves the collectives. Every rank calls it."""
    groups = {each.name: each for each in (ranks.world, ranks.attention, ranks.data) if each.size > 1}
    mine = next((f"group {name}: {why}" for name in groups if (why := peers.reason(name))), None)
    why = next(filter(None, distributed.said(mine, ranks.world.name)), None) if groups else None
    changed = {row["op"] for row in rows if row["backend"] == "hip" and row["status"] == "bound"
               and row["op"] in peers.OPS.values()} if why else ()  # fmt: skip
    now = {"hip": {"status": "off", "reason": why}, "reference": {"status": "bound", "reason": "torch.distributed"}}
    return [row | now.get(row["backend"], {}) if row["op"] in changed else row for row in rows]


def _groups(args: ServerArgs) -> tuple[list[list[int]], list[list[int]]]:
    """With data-parallel attention: the ranks that share sequences, and those that have the same heads."""
    size = args.tp_size // args.groups
    return ([[*range(first, first + size)] for first in range(0, args.tp_size, size)],
            [[*range(first, args.tp_size, size)] for first in range(size)])


def _member(name: str, groups: list[list[int]], rank: int) -> Group:
    ranks = next(group for group in groups if rank in group)
    return Group(name, ranks.index(rank), len(ranks))


def smallest(value: int, ranks: Ranks, device: torch.device) -> int:
    """The smallest of the ranks' values, on each of them."""
    if ranks.world == ALONE:
        return value
    return int(distributed.all_gather(torch.tensor([value], device=device), ranks.world.name).min())
