"""Collectives of several GPUs of one host: right, for long, in bounded time, and how fast next to others.

    python tests/bench/ranks.py --world 2 [--out FILE.json] [--part NAME ...]   # a GPU for each rank
    python tests/bench/ranks.py --world 2 --one-card                            # ranks as streams of one GPU
    python tests/bench/ranks.py --dry                                           # emulated MI300X, each in a process

Parts, each in processes of its own and within a time of its own, so that one that fails leaves the others' results:
  correct  every collective, every protocol, from 16 bytes to 64 MiB, three dtypes, eager and captured: each sum within
           rounding of the sum in fp64, the same bits on every rank and in every replay
  many     100,000 captured all-reduces of changing size and data, every element of every sum compared
  speed    in graphs, next to NCCL and torch's symmetric memory; times are the slowest rank's median
  wait     one rank is stopped: the others give up in time and say whom they waited for
The result is JSON, written after each part, and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ranks_ways
import torch
from torch import Tensor

import wave64
from wave64 import OPS, distributed, ops, platform
from wave64.backends import peers

HERE = Path(__file__)
LIMIT_S = {"correct": 150.0, "many": 90.0, "wait": 60.0, "speed": 120.0}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KIB, MIB = 1 << 10, 1 << 20
SIZES = (16, 48, 2 * KIB, 8 * KIB, 64 * KIB + 16, 512 * KIB, 2 * MIB, 16 * MIB, 64 * MIB)
ODD = (1, 7, 1023, 100_003)  # elements
SPEEDS = (8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB,
          16 * MIB)
HIDDEN = 4096
ONE_BY_ONE = 50  # calls of a graph that is timed


class Rank:
    """One rank: its group's name, its device, and what its calls run on."""

    def __init__(self, group: str, device: torch.device, dry: bool):
        self.group, self.device, self.dry = group, device, dry
        self.me = distributed.member(group)
        self.gpu = platform.streams()

    def draw(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
        """What any rank brings, the same wherever it is drawn."""
        generator = torch.Generator(self.device).manual_seed(1000 * seed + rank)
        return torch.randn(shape, device=self.device, generator=generator).to(dtype)

    def protocols(self) -> list[int]:
        """Those that the build has."""
        found = []
        x = torch.zeros(64, device=self.device)
        for protocol in peers.PROTOCOLS:
            with contextlib.suppress(ValueError):
                peers.launch_all_reduce(peers.of(self.group), x, torch.empty_like(x), protocol)
                found.append(protocol)
        self.sync()
        return found

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()
        peers.check()

    def graph(self, body: Callable[[], Any]) -> Any:
        """The calls of `body`, captured."""
        if not self.dry:
            side = torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                body()  # loads what a capture cannot
            torch.cuda.synchronize()
        graph = self.gpu.CUDAGraph()
        with torch.inference_mode(), self.gpu.graph(graph):
            body()
        return graph


def exact_sum(rank: Rank, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The sum in fp64, and how far a sum in fp32, rounded once, may be from it."""
    each = [rank.draw(r, shape, dtype, seed).double() for r in range(rank.me.size)]
    total, sizes = sum(each[1:], each[0]), sum((x.abs() for x in each[1:]), each[0].abs())
    return total, total.abs() * torch.finfo(dtype).eps + sizes * rank.me.size * 2.0**-24 + 1e-7


def ways(rank: Rank) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way to add x up: the operator's choice, then each protocol."""
    def by(protocol: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            peers.launch_all_reduce(peers.of(rank.group), x, out, protocol)
            return out
        return run

    return {"all_reduce": lambda x: ops.all_reduce(x, rank.group),
            **{f"all_reduce {peers.PROTOCOLS[p]}": by(p) for p in rank.protocols()}}


def shapes(dtype: torch.dtype, dry: bool) -> list[tuple[int, ...]]:
    if dry:
        return [(16 // dtype.itemsize,), (2 * KIB // dtype.itemsize,), (7,)]
    return [*((size // dtype.itemsize,) for size in SIZES), *((n,) for n in ODD)]


def correct(rank: Rank) -> dict[str, Any]:
    """Name -> cases that were right, or what was wrong first."""
    found: dict[str, Any] = {}
    for name, run in ways(rank).items():
        found[name] = _right(lambda run=run: [  # noqa: B023
            _one(rank, run, shape, dtype, captured) for dtype in DTYPES for shape in shapes(dtype, rank.dry)
            for captured in (False, True)])
    others = {"all_gather": _gathered, "reduce_scatter": _scattered, "fused_all_reduce_rms_norm": _normalized,
              "all_reduce, quantized": _coded}
    for name, test in others.items():
        found[name] = _right(lambda test=test: [  # noqa: B023
            test(rank, rows, dtype) for dtype in DTYPES for rows in ((1, 3) if rank.dry else (1, 3, 64, 1024))])
        if "hip" not in OPS[name.split(",")[0]].backends:
            found[name] = f"by torch.distributed: {found[name]}"
    return found


def _right(cases: Callable[[], list]) -> Any:
    try:
        return len(cases())
    except (AssertionError, RuntimeError, ValueError) as error:
        return failed(error)


def failed(error: Exception) -> str:
    return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:400]}"


def near(what: str, got: Tensor, exact: Tensor, bound: Tensor) -> None:
    off = (got.double() - exact).abs()
    wrong = ~(off <= bound)
    assert not wrong.any(), (f"{what}: {int(wrong.sum())} of {got.numel()} are wrong, "
                             f"the first is {int(wrong.flatten().nonzero()[0])}")


def _same_bits(rank: Rank, what: str, got: Tensor) -> None:
    """On all ranks, where ranks are processes."""
    if rank.group != distributed.WORLD:
        return
    words = got.contiguous().view(torch.uint8).flatten().long()
    mark = (words * (torch.arange(words.numel(), device=words.device) % 8191 + 1)).sum().reshape(1)
    marks = distributed.all_gather(mark, rank.group)
    assert (marks == marks[0]).all(), f"{what}: bits differ between ranks"


def _one(rank: Rank, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype,
         captured: bool) -> None:
    what = f"{list(shape)} {dtype}{', captured' if captured else ''}"
    x = rank.draw(rank.me.rank, shape, dtype)
    if not captured:
        _check_sum(rank, what, run(x), dtype, 0)
        return
    made: dict[str, Tensor] = {}
    graph = rank.graph(lambda: made.update(out=run(x)))
    for seed in (1, 2, 3):
        x.copy_(rank.draw(rank.me.rank, shape, dtype, seed))
        graph.replay()
        _check_sum(rank, f"{what}, replay {seed}", made["out"], dtype, seed)


def _check_sum(rank: Rank, what: str, got: Tensor, dtype: torch.dtype, seed: int) -> None:
    rank.sync()
    near(what, got, *exact_sum(rank, tuple(got.shape), dtype, seed))
    _same_bits(rank, what, got)


def _gathered(rank: Rank, rows: int, dtype: torch.dtype) -> None:
    got = ops.all_gather(rank.draw(rank.me.rank, (rows, 97), dtype), rank.group)
    rank.sync()
    wanted = torch.cat([rank.draw(r, (rows, 97), dtype) for r in range(rank.me.size)])
    assert torch.equal(got, wanted), f"{rows} rows of {dtype}: not what the ranks brought"


def _scattered(rank: Rank, rows: int, dtype: torch.dtype) -> None:
    shape = (rows * rank.me.size, 97)
    got = ops.reduce_scatter(rank.draw(rank.me.rank, shape, dtype), rank.group)
    rank.sync()
    exact, bound = (each[rows * rank.me.rank:][:rows] for each in exact_sum(rank, shape, dtype))
    near(f"{rows} rows of {dtype}", got, exact, bound)


def _coded(rank: Rank, rows: int, dtype: torch.dtype) -> None:
    """Codes keep at least 1 / 14 of the largest magnitude, of each rank's and of the sum."""
    x = [rank.draw(r, (rows, 8192), dtype) for r in range(rank.me.size)]
    exact = torch.stack([each.double() for each in x]).sum(0)
    for codes in peers.QUANTIZED:
        got = ops.all_reduce(x[rank.me.rank], rank.group, codes)
        rank.sync()
        bound = (exact.abs().max() + 6.0 * rank.me.size).expand_as(exact) / 13
        near(f"{rows} rows of {dtype} as {codes}", got, exact, bound)
        _same_bits(rank, codes, got)


def _normalized(rank: Rank, rows: int, dtype: torch.dtype) -> None:
    hidden = 96 if rank.dry else HIDDEN
    residual, weight = rank.draw(50, (rows, hidden), dtype), rank.draw(51, (hidden,), dtype)
    exact, bound = exact_sum(rank, (rows, hidden), dtype)
    exact = exact + residual.double()
    got = ops.fused_all_reduce_rms_norm(rank.draw(rank.me.rank, (rows, hidden), dtype), residual, weight, 1e-5,
                                        rank.group)
    rank.sync()
    eps = torch.finfo(dtype).eps
    near("residual", residual, exact, bound + 2 * eps * exact.abs() + 2 * eps)
    normed = torch.nn.functional.rms_norm(exact, (hidden,), weight.double(), 1e-5)
    near(f"{rows} rows of {dtype}", got, normed, 8 * eps * (normed.abs() + weight.double().abs()))
    _same_bits(rank, "fused_all_reduce_rms_norm", got)


def many(rank: Rank) -> dict[str, Any]:
    """All-reduces of changing size: graphs of 100, replayed; the data of each replay is another."""
    per_graph, replays = (4, 3) if rank.dry else (100, 1000)
    choice = torch.Generator().manual_seed(7)
    sizes = [16, 40, 1000, 4096, 8192, 30_000, 100_001] if not rank.dry else [16, 40, 300]
    plan = [(sizes[int(torch.randint(len(sizes), (1,), generator=choice))],
             DTYPES[int(torch.randint(3, (1,), generator=choice))]) for _ in range(per_graph)]
    run = [*ways(rank).values()]
    step = torch.zeros(1, dtype=torch.int32, device=rank.device)
    wrong = torch.zeros(1, dtype=torch.int64, device=rank.device)
    index = torch.arange(max(sizes), dtype=torch.int32, device=rank.device)

    def brought(r: int, n: int) -> Tensor:
        return (index[:n] + step * 7 + 13 * r).remainder(31)  # sums are exact in bf16

    def body() -> None:
        for i, (n, dtype) in enumerate(plan):
            out = run[i % len(run)](brought(rank.me.rank, n).to(dtype))
            wanted = sum((brought(r, n) for r in range(1, rank.me.size)), brought(0, n))
            wrong.add_((out.int() != wanted).sum())
            step.add_(1)

    graph = rank.graph(body)
    if rank.dry:
        wrong.zero_()  # a capture computes what torch computes, on sums that it does not make
    began = time.monotonic()
    for _ in range(replays):
        graph.replay()
    rank.sync()
    count = per_graph * (replays if rank.dry else replays + 1)
    assert int(wrong) == 0, f"{int(wrong)} elements of {count} all-reduces are wrong"
    return {"all-reduces": count, "wrong elements": int(wrong), "seconds": round(time.monotonic() - began, 2)}


def wait(rank: Rank) -> dict[str, Any]:
    """The last rank is stopped; the others say so."""
    x = torch.ones(4096, device=rank.device)
    ops.all_reduce(x, rank.group)
    rank.sync()
    if rank.me.rank == rank.me.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    peers.of(rank.group).wait_at_most(1.0)
    began = time.monotonic()
    for _ in range(3):
        ops.all_reduce(x, rank.group)
    try:
        rank.sync()
    except peers.WaitTimeout as error:
        seconds = time.monotonic() - began
        assert seconds < 4 or rank.dry, f"gave up after {seconds:.1f} s"
        return {"said": str(error), "seconds": round(seconds, 2)}
    raise AssertionError("no wait timed out, and a rank is stopped")


def timed(rank: Rank, call: Callable[[], Any], count: int = ONE_BY_ONE) -> float:
    """Microseconds of a call in a graph of `count`: the slowest rank's median of 9."""
    graph = rank.graph(lambda: [call() for _ in range(count)])
    graph.replay()
    took = []
    for _ in range(9):
        torch.distributed.barrier()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(1000 * begin.elapsed_time(end) / count)
    peers.check()
    said: list[Any] = [None] * rank.me.size
    torch.distributed.all_gather_object(said, sorted(took)[len(took) // 2])
    return round(max(said), 2)


def speed(rank: Rank) -> dict[str, Any]:
    """Bytes -> way -> microseconds."""
    table: dict[str, Any] = {}
    mine = ways(rank)
    for size in SPEEDS:
        n = size // 2
        x, row = torch.zeros(n, dtype=torch.bfloat16, device=rank.device), {}
        kept = x.clone()

        def nccl(x: Tensor = x) -> None:
            torch.distributed.all_reduce(x, group=distributed.registered(rank.group))

        calls: dict[str, Callable[[], Any]] = {"NCCL": nccl}
        try:
            calls |= ranks_ways.symmetric(rank.group, n)
        except (RuntimeError, ImportError, AttributeError) as error:
            row["symm_mem"] = f"FAILED: {' '.join(str(error).split())[:200]}"
        calls |= {name: lambda run=run, x=kept: run(x) for name, run in mine.items()}
        if size >= MIB:
            calls |= {f"all_reduce {codes}": lambda codes=codes, x=kept: ops.all_reduce(x, rank.group, codes)
                      for codes in peers.QUANTIZED}
        if "hip" in OPS["fused_all_reduce_rms_norm"].backends and size <= MIB:
            rows = kept.view(-1, HIDDEN)
            for protocol in (None, peers.LL, peers.LL128, peers.ONE_SHOT):
                by = "" if protocol is None else f" {peers.PROTOCOLS[protocol]}"
                calls[f"fused_all_reduce_rms_norm{by}"] = functools.partial(
                    ranks_ways.normed, rank.group, rows, torch.zeros_like(rows), torch.ones_like(rows[0]), protocol)
        for name, call in calls.items():
            if name == f"all_reduce {peers.PROTOCOLS[peers.LL]}" and size > MIB:
                continue  # twice the bytes, and every rank's to every rank: for small messages
            try:
                row[name] = timed(rank, call, ONE_BY_ONE if size <= MIB else 10)
            except (RuntimeError, ValueError) as error:
                row[name] = f"FAILED: {' '.join(str(error).split())[:200]}"
        table[str(size)] = row
    return table


def dry_speed(rank: Rank) -> dict[str, Any]:
    """How many wave instructions a rank's 8 KiB take: there is nothing to time."""
    emulated = platform.emulated()
    assert emulated is not None
    before = emulated.counts.instructions
    ops.all_reduce(torch.zeros(4096, dtype=torch.bfloat16), rank.group)
    return {"8192": {"wave instructions, waits included": emulated.counts.instructions - before}}


PARTS = {"correct": correct, "many": many, "speed": speed, "wait": wait}


def run_part(part: Callable[[Any], dict[str, Any]], what: Any) -> dict[str, Any]:
    try:
        return part(what)
    except Exception as error:
        return {"FAILED": failed(error)}


@contextlib.contextmanager
def rank_of(args: argparse.Namespace) -> Iterator[Rank]:
    """This process as a rank of the world. Ends the process with words where its ranks are not connected."""
    store = distributed.meet("127.0.0.1", args.port, first=args.rank == 0)
    with wave64.emulate("gfx942") if args.dry else contextlib.nullcontext():
        device = torch.device("cpu") if args.dry else torch.device("cuda", args.rank)
        if args.dry:
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(device)
        distributed.join(store, args.rank, args.world, "gloo" if args.dry else "nccl", 60.0)
        why = peers.connect("world", device, 10.0)
        if why is not None:
            raise SystemExit(f"not connected: {why}")
        yield Rank("world", device, args.dry)


def be_rank(args: argparse.Namespace) -> None:
    """Runs parts, and writes what they found: {part: result}."""
    if args.one_card:
        import ranks_one_card

        card = ranks_one_card.Card(args.world)
        found = {part: run_part(ranks_one_card.PARTS[part], card) for part in args.part}
        Path(args.out).write_text(json.dumps(found))
    else:
        with rank_of(args) as rank:
            parts = {**PARTS, **({"speed": dry_speed} if args.dry else {})}
            found = {}
            for part in args.part:
                found[part] = run_part(parts[part], rank)
                if args.rank == 0 or failures(found):
                    Path(args.out).write_text(json.dumps(found))
    os._exit(0)  # a rank that is stopped, or a group that is broken, is not waited for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(args: argparse.Namespace, parts: list[str], folder: Path) -> dict[str, Any]:
    """Runs parts, in a process for each rank, which have ended when this returns; {part: result}."""
    port, limit, world = free_port(), sum(LIMIT_S[part] for part in parts), 1 if args.one_card else args.world
    outs = [folder / f"{parts[0]}-{rank}.json" for rank in range(world)]
    logs = [(folder / f"{parts[0]}-{rank}.log").open("w+") for rank in range(world)]
    env = {"GLOO_SOCKET_IFNAME": "lo", **({"OMP_NUM_THREADS": "1"} if args.dry else {}), **os.environ}
    env.pop("TRITON_INTERPRET", None)
    flags = [flag for flag, given in (("--dry", args.dry), ("--one-card", args.one_card)) if given]
    processes = [subprocess.Popen(
        [sys.executable, HERE, "--world", str(args.world), "--rank", str(rank), "--port", str(port), "--part", *parts,
         "--out", outs[rank], *flags], stdout=logs[rank], stderr=subprocess.STDOUT, env=env) for rank in range(world)]
    began = time.monotonic()
    others = processes[:-1] if "wait" in parts else processes  # which stops the last one
    try:
        while any(p.poll() is None for p in others) and time.monotonic() - began < limit:
            if any(p.poll() not in (None, 0) for p in others):
                time.sleep(2.0)
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    said = [json.loads(out.read_text()) if out.exists() else {} for out in outs]
    found = {part: dict(said[0].get(part, {"FAILED": f"no result within {limit:.0f} s"})) for part in parts}
    for rank, each in enumerate(said[1:], 1):
        for part, result in each.items():
            found[part] |= {f"rank {rank}": failures(result)} if failures(result) else {}
    for part, result in found.items():
        if failures(result):
            for rank, log in enumerate(logs):
                log.seek(0)
                found[part][f"log of rank {rank}"] = log.read()[-800:]
    found[parts[0]]["seconds of the processes"] = round(time.monotonic() - began, 1)
    return found


def failures(found: Any) -> list[str]:
    """All that is marked as failed in a result."""
    if isinstance(found, dict):
        return [f"{k}: {v}" for k, v in found.items() if k == "FAILED"] + [
            f"{k}: {line}" for k, v in found.items() if k != "FAILED" for line in failures(v)]
    return [found] if isinstance(found, str) and "FAILED" in found else []


def show(found: dict[str, Any]) -> None:
    for part, result in found["parts"].items():
        if part != "speed":
            print(f"{part}: {json.dumps(result)}")
            continue
        rows = {size: row for size, row in result.items() if size.isdecimal()}
        print(f"{part}: {json.dumps({key: value for key, value in result.items() if key not in rows})}")
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        print("us per call; columns: " + ", ".join(f"[{i}] {name}" for i, name in enumerate(names)))
        for size, row in rows.items():
            cells = [str(row.get(name, "-"))[:7] for name in names]
            print(f"{int(size) // KIB:>6} KiB " + " ".join(f"{cell:>9}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--one-card", action="store_true")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--out")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        be_rank(args)
    found: dict[str, Any] = {"world": args.world, "torch": torch.__version__, "parts": {},
                             "device": "gfx942 (emulated)" if args.dry else torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as folder:
        parts = [part for part in args.part if not (args.one_card and part == "wait")]
        for group in [parts] if args.dry else [[part] for part in parts]:
            found["parts"] |= spawn(args, group, Path(folder))
            if args.out:
                Path(args.out).write_text(json.dumps(found, indent=1))
    show(found)
    return int(bool(failures(found)))


if __name__ == "__main__":
    sys.exit(main())
