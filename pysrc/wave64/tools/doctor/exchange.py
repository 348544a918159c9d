"""An all-reduce over all GPUs of this host, in a process each, with an end to its time: for `doctor --multi`."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from datetime import timedelta

from wave64.tools.doctor.machine import FAIL, OK, WARN, Row

COUNT = 1 << 18  # elements: 1 MiB of fp32
SLOW_US = 5000.0
LIMIT_S = 60.0  # most of which is starting processes


def _rank(rank: int, world: int, port: int, backend: str, out) -> None:
    import torch
    import torch.distributed as dist

    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                                timeout=timedelta(seconds=LIMIT_S / 2))
        x = torch.full((COUNT,), float(rank + 1), device=device)
        dist.all_reduce(x)
        began = time.monotonic()
        for _ in range(20):
            dist.all_reduce(x.fill_(rank + 1.0))
        right = bool((x == world * (world + 1) / 2).all())
        out.put((rank, right, (time.monotonic() - began) / 20 * 1e6))
        dist.destroy_process_group()
    except Exception as e:  # a rank that cannot take part is what is looked for
        out.put((rank, f"{type(e).__name__}: {e}".partition("\n")[0], 0.0))


def exchange_rows(world: int, backend: str = "nccl", limit_s: float = LIMIT_S) -> Iterator[Row]:
    """One row: how long the GPUs take for a sum, or which of them did not answer."""
    if world < 2:
        yield Row("all-reduce", OK, f"{world} GPU{'s' * (world != 1)}: nothing to exchange")
        return
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    out = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, world, port, backend, out), daemon=True)
             for rank in range(world)]
    for rank in ranks:
        rank.start()
    found: dict[int, tuple] = {}
    until = time.monotonic() + limit_s
    while len(found) < world and time.monotonic() < until:
        try:
            rank, *result = out.get(timeout=0.2)
            found[rank] = tuple(result)
        except Exception:  # empty: ranks that have ended without an answer never will give one
            if all(not each.is_alive() for each in ranks) and out.empty():
                break
    for each in ranks:
        each.kill()
    yield verdict(world, found, limit_s)


def verdict(world: int, found: dict[int, tuple], limit_s: float) -> Row:
    silent = [str(rank) for rank in range(world) if rank not in found]
    said = [f"rank {rank}: {result[0]}" for rank, result in sorted(found.items()) if isinstance(result[0], str)]
    wrong = [str(rank) for rank, result in sorted(found.items()) if result[0] is False]
    why = "serving on several GPUs hangs or fails like this"
    if silent and not said:
        return Row("all-reduce", FAIL, f"no answer of GPU {', '.join(silent)} within {limit_s:.0f} s", why,
                   "NCCL_DEBUG=INFO python -m wave64 doctor --multi; then pci=realloc=off iommu=pt, IOMMU, /dev/shm")
    if said:
        return Row("all-reduce", FAIL, "; ".join(said[:2]), why, "NCCL_DEBUG=INFO python -m wave64 doctor --multi")
    if wrong:
        return Row("all-reduce", FAIL, f"wrong sums on GPU {', '.join(wrong)}",
                   "peer memory is not what it seems: IOMMU", "boot with iommu=pt, or NCCL_P2P_DISABLE=1 until then")
    slow = max(result[1] for result in found.values())
    took = f"{world} GPUs, 1 MiB in {slow:.0f} us"
    if slow < SLOW_US:
        return Row("all-reduce", OK, took)
    return Row("all-reduce", WARN, took, "this goes through host memory or sockets", "amd-smi topology")
