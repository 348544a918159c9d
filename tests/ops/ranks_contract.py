"""One rank of test_emulated_ranks.py: `python ranks_contract.py RANK SIZE PORT`, on an emulated device. The ranks make
the same calls, so that the contract's reference, which is torch.distributed's, runs in all of them as its kernels do.
Prints a line of JSON for each result."""

import json
import os
import sys

import torch

import wave64
from wave64 import OPS, BadArgument, Case, distributed, ops, platform
from wave64.backends import peers
from wave64.serve.model.parallel import Ranks
from wave64.testing import contract

CPU, DTYPES = torch.device("cpu"), (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 96), (3, 97), (0, 8))
ANY_DTYPE = (torch.bool, torch.int16, torch.int64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.complex64)


def cases(name: str, size: int):
    """Calls with ranks that differ in x alone: what else there is comes of a generator of its own."""
    for i, (rows, width) in enumerate(SHAPES):
        for dtype in DTYPES:
            def make(rows=rows, width=width, dtype=dtype, seed=i):
                n = rows * size if name == "reduce_scatter" else rows
                args = dict(x=torch.randn(n, width, dtype=dtype))
                if name == "fused_all_reduce_rms_norm":
                    same = torch.Generator().manual_seed(seed)
                    args |= dict(residual=torch.randn(n, width, generator=same).to(dtype),
                                 weight=torch.randn(width, generator=same).to(dtype), eps=1e-5)
                return args | dict(group=distributed.WORLD)
            yield Case(f"{rows}x{width}-{dtype}", make)
    if name == "all_gather":
        yield Case("bytes", lambda: dict(x=torch.randint(255, (5, 3), dtype=torch.uint8), group="world"))


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def bits(rank: int, name: str, case: Case) -> int:
    """A mark of all that a call of the hip backend gives and writes."""
    args = contract.draw(case, "cpu", rank)
    found = contract.outputs(OPS[name], OPS[name].backends["hip"].run(**args), args)
    return hash(tuple(bytes(x.contiguous().view(torch.uint8).flatten().tolist()) for x in found))


def gathers(rank: int, dtype: torch.dtype) -> bool:
    """Whether all_gather gives what two ranks have."""
    of = [torch.arange(r, r + 6).view(3, 2).to(torch.float32).to(dtype) for r in range(2)]
    got, wanted = ops.all_gather(of[rank], "world"), torch.cat([each.view(torch.uint8) for each in of])
    return got.dtype == dtype and torch.equal(got.view(torch.uint8), wanted)


def sum_and_norm(rank: int, size: int) -> dict[str, float]:
    """How far a model's sum and its norm are from exact ones, where ranks send FP8."""
    world, generator = distributed.member("world"), torch.Generator().manual_seed(1)
    x = [torch.randn(64, 8192, generator=generator).bfloat16() for _ in range(size)]
    residual, weight = torch.zeros(64, 8192, dtype=torch.bfloat16), torch.ones(8192, dtype=torch.bfloat16)
    got = Ranks(world, attention=world, quantize="fp8").norm_of_sum(x[rank].clone(), residual, weight, 1e-6)
    exact = torch.stack(x).double().sum(0)
    off = (residual.double() - exact).abs().max(), (got.double() - exact / size**0.5).abs().max()
    return {"sum": round(float(off[0]), 3), "norm": round(float(off[1]), 3)}


def refused(act) -> str:
    try:
        act()
    except (BadArgument, RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def main(rank: int, size: int, port: int) -> None:
    store = distributed.meet("127.0.0.1", port, first=rank == 0)
    with wave64.emulate("gfx942") as device:
        driver = device._driver
        distributed.join(store, rank, size, "gloo", 120.0)
        say(reason=peers.reason("world"))
        for entry_point, code in (("hipExtMallocWithFlags", 2), ("hipIpcOpenMemHandle", 1), ("hipHostMalloc", 2)):
            if rank == 1:
                driver.library.standin_fail(entry_point.encode(), code, 1)
            say(refused=peers.connect("world", CPU))
        say(by_torch=float(ops.all_reduce(torch.ones(3), "world")[0]), launches=device.counts.launches)
        gathered = {str(dtype): gathers(rank, dtype) for dtype in ANY_DTYPE}
        graph, x = platform.streams().CUDAGraph(), torch.zeros(8)
        with torch.inference_mode(), platform.streams().graph(graph):
            added = ops.all_reduce(x, "world")
        x.fill_(rank + 1.0)
        graph.replay()
        say(by_torch_too=gathered, replayed=float(added[7]))
        say(strange=refused(lambda: peers.connect("nowhere", CPU)), known=peers._KNOWN.get("nowhere"),
            order=refused(lambda: distributed.partition("pair", [[1, 0]])))
        say(connected=peers.connect("world", CPU))
        for name in ("all_reduce", "all_gather", "reduce_scatter", "fused_all_reduce_rms_norm"):
            for case in cases(name, size):
                contract.verify(OPS[name], "hip", case, "cpu", seed=rank)
                if name in ("all_reduce", "fused_all_reduce_rms_norm"):
                    say(name=name, case=case.id, bits=bits(rank, name, case))
        for protocol, words in peers.PROTOCOLS.items():
            x, out = torch.full((3000,), rank + 0.5), torch.empty(3000)
            peers.launch_all_reduce(peers.of("world"), x, out, protocol)
            say(protocol=words, right=bool((out == size * size / 2).all()))
        large = Case("codes", lambda: dict(x=torch.randn(64, 8192).bfloat16(), group="world", quantize="int8"))
        contract.verify(OPS["all_reduce"], "hip", large, "cpu", seed=rank)
        say(codes=sum_and_norm(rank, size))
        streams, made = platform.streams(), {}
        graph, x = streams.CUDAGraph(), torch.zeros(8)
        with torch.inference_mode(), streams.graph(graph):
            made["out"] = ops.all_reduce(x, "world")
        for replay in (1.0, 2.0):
            x.fill_(replay * (rank + 1))
            graph.replay()
            say(replay=replay, sum=float(made["out"][7]))
        record = torch.frombuffer((peers.ctypes.c_int32 * 5).from_address(peers.of("world").record[0]),
                                  dtype=torch.int32)
        record.copy_(torch.tensor([1, 3, 17, 2, 1 - rank]))
        say(waited=refused(peers.check))
        record.zero_()
        say(group=refused(lambda: ops.all_reduce(x, "nowhere")), rows=refused(
            lambda: ops.reduce_scatter(torch.zeros(size + 1, 2), "world")))
        peers.of("world").wait_at_most(0.02)  # of the rank that calls first; the other one's call is refused
        ours = (lambda: ops.all_gather(x, "world"), lambda: ops.all_reduce(x, "world"))[rank]
        refused(ours)
        say(differs=refused(peers.check))
        distributed.leave()
        say(left=refused(graph.replay))
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
