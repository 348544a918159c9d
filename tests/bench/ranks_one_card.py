"""Ranks as streams of one GPU, the development mode of a group: what `ranks.py --one-card` runs.

Sums and speed as there; of the speed, what a message of 8 KiB takes next to an empty launch and to a flag's way to
another block and back, which two blocks of a ping-pong kernel measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from ranks import DTYPES, KIB, MIB, ODD, ONE_BY_ONE, SIZES, SPEEDS, failed, near
from torch import Tensor

from wave64 import ops
from wave64.backends import peers

PING_PONG = """
extern "C" __global__ void ping_pong(volatile int* flags, int side, int rounds) {
    for (int round = 1; round <= rounds; round++) {
        if (side == 0) flags[0] = round;
        while (flags[side == 0 ? 32 : 0] != round) {}
        if (side == 1) flags[32] = round;
    }
}
"""
EMPTY = 'extern "C" __global__ void empty() {}'


class Card:
    """One GPU, a stream for each rank."""

    def __init__(self, world: int):
        self.device = torch.device("cuda", 0)
        self.names = peers.local("card", world, self.device, 5.0)
        self.streams = [torch.cuda.Stream() for _ in self.names]
        x = torch.zeros(64, device=self.device)
        self.protocols = []
        for protocol in peers.PROTOCOLS:
            try:
                self.each(lambda rank, p=protocol: self.call(rank, x.clone(), p))
                self.protocols.append(protocol)
            except ValueError:
                continue
        self.sync()

    def sync(self) -> None:
        torch.cuda.synchronize()
        peers.check()

    def call(self, rank: int, x: Tensor, protocol: int | None) -> Tensor:
        if protocol is None:
            return ops.all_reduce(x, self.names[rank])
        out = torch.empty_like(x)
        peers.launch_all_reduce(peers.of(self.names[rank]), x, out, protocol)
        return out

    def each(self, body: Callable[[int], Any]) -> list[Any]:
        """`body` of each rank, on its stream, behind what the current stream does; which then waits for all."""
        current, got = torch.cuda.current_stream(), []
        for rank, stream in enumerate(self.streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                got.append(body(rank))
        for stream in self.streams:
            current.wait_stream(stream)
        return got

    def graph(self, body: Callable[[int], Any]) -> tuple[Any, list[Any]]:
        """`body` of each rank, captured side by side, and what it gave."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            got = self.each(body)
        return graph, got

    def name(self, protocol: int | None) -> str:
        return "all_reduce" if protocol is None else f"all_reduce {peers.PROTOCOLS[protocol]}"


def draw(card: Card, rank: int, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(card.device).manual_seed(1000 * seed + rank)
    return torch.randn(n, device=card.device, generator=generator).to(dtype)


def check_sums(card: Card, what: str, xs: list[Tensor], got: list[Tensor]) -> None:
    card.sync()
    each = [x.double() for x in xs]
    total, size = sum(each[1:], each[0]), sum((x.abs() for x in each[1:]), each[0].abs())
    bound = total.abs() * torch.finfo(xs[0].dtype).eps + size * len(xs) * 2.0**-24 + 1e-7
    for rank, out in enumerate(got):
        near(f"{what}, rank {rank}", out, total, bound)
        assert torch.equal(out, got[0]), f"{what}: bits of rank {rank} differ from rank 0's"


def correct(card: Card) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for protocol in (None, *card.protocols):
        cases = 0
        try:
            for dtype in DTYPES:
                for n in [*(size // dtype.itemsize for size in SIZES), *ODD]:
                    what = f"[{n}] {dtype}"
                    xs = [draw(card, rank, n, dtype, 0) for rank in range(len(card.names))]
                    torch.cuda.synchronize()
                    check_sums(card, what, xs, card.each(lambda rank, xs=xs: card.call(rank, xs[rank], protocol)))  # noqa: B023
                    graph, outs = card.graph(lambda rank, xs=xs: card.call(rank, xs[rank], protocol))  # noqa: B023
                    for seed in (1, 2):
                        for rank, x in enumerate(xs):
                            x.copy_(draw(card, rank, n, dtype, seed))
                        graph.replay()
                        check_sums(card, f"{what}, replay {seed}", xs, outs)
                    cases += 3
            found[card.name(protocol)] = cases
        except (AssertionError, RuntimeError, ValueError) as error:
            found[card.name(protocol)] = failed(error)
    return found


def many(card: Card) -> dict[str, Any]:
    per_graph, replays, world = 100, 1000, len(card.names)
    choice = torch.Generator().manual_seed(7)
    sizes = [16, 40, 1000, 4096, 8192, 30_000, 100_001]
    plan = [(sizes[int(torch.randint(len(sizes), (1,), generator=choice))],
             DTYPES[int(torch.randint(3, (1,), generator=choice))]) for _ in range(per_graph)]
    run = (None, *card.protocols)
    steps = [torch.zeros(1, dtype=torch.int32, device=card.device) for _ in range(world)]
    wrong = [torch.zeros(1, dtype=torch.int64, device=card.device) for _ in range(world)]
    index = torch.arange(max(sizes), dtype=torch.int32, device=card.device)

    def body(rank: int) -> None:
        for i, (n, dtype) in enumerate(plan):
            def brought(r: int, n: int = n) -> Tensor:
                return (index[:n] + steps[rank] * 7 + 13 * r).remainder(31)  # sums are exact in bf16

            out = card.call(rank, brought(rank).to(dtype), run[i % len(run)])
            wanted = sum((brought(r) for r in range(1, world)), brought(0))
            wrong[rank].add_((out.int() != wanted).sum())
            steps[rank].add_(1)

    graph, _ = card.graph(body)
    began = time.monotonic()
    for _ in range(replays):
        graph.replay()
    card.sync()
    bad = sum(int(each) for each in wrong)
    assert bad == 0, f"{bad} elements of {per_graph * replays} all-reduces are wrong"
    return {"all-reduces": per_graph * replays, "wrong elements": bad, "seconds": round(time.monotonic() - began, 2)}


def median_us(run: Callable[[], Any], count: int) -> float:
    run()
    took = []
    for _ in range(9):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        took.append(1000 * begin.elapsed_time(end) / count)
    return round(sorted(took)[len(took) // 2], 2)


def ping_pong(card: Card) -> dict[str, float]:
    """Microseconds of an empty launch in a graph, and of a flag's way to another block and back."""
    kernel = torch.cuda._compile_kernel(PING_PONG, "ping_pong")
    empty = torch.cuda._compile_kernel(EMPTY, "empty")
    flags, rounds = torch.zeros(64, dtype=torch.int32, device=card.device), 10_000

    def play() -> None:
        flags.zero_()
        card.each(lambda rank: kernel((1, 1, 1), (1, 1, 1), (flags, rank, rounds)) if rank < 2 else None)

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(ONE_BY_ONE):
            empty((1, 1, 1), (1, 1, 1), ())
    return {"round trip": median_us(play, rounds), "empty launch": median_us(graph.replay, ONE_BY_ONE)}


def speed(card: Card) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for size in SPEEDS:
        row: dict[str, Any] = {}
        xs = [torch.zeros(size // 2, dtype=torch.bfloat16, device=card.device) for _ in card.names]
        for protocol in (None, *card.protocols):
            if protocol == peers.LL and size > MIB:
                continue
            count = ONE_BY_ONE if size <= MIB else 10
            try:
                graph, _ = card.graph(lambda rank, xs=xs, p=protocol, count=count: [
                    card.call(rank, xs[rank], p) for _ in range(count)])
                row[card.name(protocol)] = median_us(graph.replay, count)
                peers.check()
            except (RuntimeError, ValueError) as error:
                row[card.name(protocol)] = failed(error)
        table[str(size)] = row
    try:
        floor = ping_pong(card)
        best = min(us for us in table[str(8 * KIB)].values() if not isinstance(us, str))
        table["floor"] = {**floor, "8 KiB over it": round(best / sum(floor.values()), 2)}
    except Exception as error:  # torch's compiler of kernels is not a public one
        table["floor"] = {"not measured": f"{type(error).__name__}: {error}"[:300]}
    return table


PARTS = {"correct": correct, "many": many, "speed": speed}
