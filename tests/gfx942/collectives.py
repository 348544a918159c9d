"""Ranks of a group on the emulator: their arenas, the launches of a collective as each rank makes them, and what must
come of it. Launches of all ranks run side by side (execute_together), those of a rank one behind the other."""

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from wave64.backends import hip
from wave64.testing.emulator import Counts, Place, execute_together

LL, LL128, ONE_SHOT, TWO_SHOT = range(4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def layout():
    return hip.constants("all_reduce")


class Arenas:
    """Memory of each rank that all of them map, zeros at first; what a test does not touch costs nothing."""

    def __init__(self, world: int, uncached: bool = True):
        self.world, self.uncached = world, uncached
        self.memory = [np.zeros(layout().ARENA_BYTES + 4096, np.uint8) for _ in range(world)]
        self.addresses = tuple(-(-memory.ctypes.data // 4096) * 4096 for memory in self.memory)

    def places(self, blocks: int, lanes: int) -> Iterator[Place]:
        """What blocks of so many lanes use of each arena: lines of their own, so that the views stay small."""
        at = layout()
        ranges = [(block * at.LINE, 4) for block in range(blocks)] + [(at.BROKEN_AT, 4)]
        halves = [(block, half) for block in range(blocks) for half in range(2)]
        sources = range(self.world)
        ranges += [(at.FLAGS_AT + ((use * at.BLOCKS + block) * at.MAX_RANKS + source) * at.LINE, 4)
                   for block, use in halves for source in sources]
        line = 16 * at.LANES
        ranges += [(at.LL_AT + (2 * block + half) * at.LL_HALF + (source * 2 * at.LL_PACKS + i) * line, 16 * lanes)
                   for block, half in halves for source in sources for i in range(2 * at.LL_PACKS)]
        for region in (at.LL128_AT, at.DATA_AT):
            slot = at.SLOT_HALF // (2 if self.world == 2 else 4 if self.world == 4 else 8)
            ranges += [(region + (2 * block + half) * at.SLOT_HALF + source * slot + i * line, 16 * lanes)
                       for block, half in halves for source in sources for i in range(slot // line)]
        for rank, base in enumerate(self.addresses):
            yield from (Place(f"arena {rank}", base + start, size, rank, self.uncached) for start, size in ranges)


@dataclass
class Call:
    """An all-reduce: the tensors of each rank."""

    x: list[Tensor]
    out: list[Tensor]
    protocol: int
    args: dict = field(default_factory=dict)

    @classmethod
    def drawn(cls, world: int, count: int, dtype: torch.dtype, protocol: int, seed: int, offset: int = 0) -> "Call":
        """offset: elements from a multiple of 16 bytes on to where the tensors begin."""
        random = torch.Generator().manual_seed(seed)
        x = [_aligned(count, dtype, offset).copy_(torch.randn(count, generator=random)) for _ in range(world)]
        return cls(x, [_aligned(count, dtype, offset).fill_(torch.nan) for _ in range(world)], protocol)

    def launches(self, arch: str, rank: int, arenas: Arenas) -> list:
        x, out = self.x[rank], self.out[rank]
        with hip.record(arch) as launches:
            hip.launch("all_reduce", arenas=arenas.addresses, rank=rank, world=arenas.world, status=0, timeout=0, x=x,
                       out=out, count=x.numel(), dtype=x.dtype, protocol=self.protocol, **self.args)
        return launches

    def verify(self) -> None:
        """The fp32 sum in the order of the ranks, bit by bit; which is near the exact one."""
        sums, exact = self.x[0].float(), torch.stack(self.x).double().sum(0)
        for x in self.x[1:]:
            sums = sums + x.float()
        expected = sums.to(self.x[0].dtype)
        for rank, out in enumerate(self.out):
            bits = (out.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(*bits), f"rank {rank}: wrong from byte {(bits[0] != bits[1]).nonzero()[0].item()} on"
        size = torch.stack(self.x).double().abs().sum(0)
        error = torch.finfo(expected.dtype).eps / 2 * exact.abs() + len(self.x) * 2.0**-24 * size
        assert ((expected.double() - exact).abs() <= 1.01 * error + 1e-7).all()


def _aligned(count: int, dtype: torch.dtype, offset: int) -> Tensor:
    """In a storage of its own, of which it takes all but what lies before it."""
    bytes_ = torch.zeros((count + offset) * dtype.itemsize + 16, dtype=torch.uint8)
    start = -bytes_.data_ptr() % 16 + offset * dtype.itemsize
    return bytes_[start:start + count * dtype.itemsize].view(dtype)


def in_rounds(launches: list, number: int, rank: int) -> list:
    """The launches with one wave, which does in rounds what their blocks were to do."""
    return [planned(launch, block=64, grid=1, lines=min(2, launch_plan(launch)["lines"])) for launch in launches]


#: what the launcher sets: the struct's last fields
PLAN = ("block", "grid", "lines")


def launch_plan(launch) -> dict[str, int]:
    return dict(zip(PLAN, struct.unpack("3i", launch.args[-12:]), strict=True))


def planned(launch, **plan: int) -> SimpleNamespace:
    plan = launch_plan(launch) | plan
    return SimpleNamespace(op=launch.op, kernel=launch.kernel, code_object=launch.code_object, lds_bytes=0,
                           grid=(plan["grid"], 1, 1), block=(plan["block"], 1, 1), tensors=launch.tensors,
                           args=launch.args[:-12] + struct.pack("3i", *(plan[name] for name in PLAN)))


def run(calls: Sequence[Call], arch: str, seed: int, arenas: Arenas | None = None,
        change: Callable[[list, int, int], list] = lambda launches, call, rank: launches, **options) -> Counts:
    """The calls one after another on every rank. change: of a rank's launches of a call, makes those that it makes."""
    world = len(calls[0].x)
    arenas = arenas or Arenas(world)
    launches, ranks = [], []
    for number, call in enumerate(calls):
        for rank in range(world):
            made = change(call.launches(arch, rank, arenas), number, rank)
            launches += made
            ranks += [rank] * len(made)
    blocks, lanes = (max(getattr(launch, of)[0] for launch in launches) for of in ("grid", "block"))
    buffers = [*arenas.places(blocks, lanes)]
    for number, call in enumerate(calls):
        for rank in range(world):
            for name, x in (("x", call.x[rank]), ("out", call.out[rank])):
                if x.numel():
                    buffers.append(Place(f"{name} of rank {rank} in call {number}", x.data_ptr(), x.nbytes, rank))
    return execute_together(launches, buffers, seed, devices=ranks, streams=ranks, **options)
