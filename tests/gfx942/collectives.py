"""Ranks of a group on the emulator: their arenas, the launches of a collective as each rank makes them, and what must
come of it. Launches of all ranks run side by side (execute_together), those of a rank one behind the other."""

import functools
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from wave64 import quant
from wave64.backends import hip, peers
from wave64.ops.per_token_group_quant_fp8 import grouped
from wave64.testing.emulator import Buffer, Counts, DeviceBuffer, execute, execute_together

LL, LL128, ONE_SHOT, TWO_SHOT = range(4)
FP8, INT8, INT4 = range(4, 7)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def layout():
    return hip.constants("all_reduce")


class Arenas:
    """Memory of each rank that all of them map, zeros at first; what a test does not touch costs nothing."""

    def __init__(self, world: int, uncached: bool = True, timeout: int = 0):
        self.world, self.uncached, self.timeout, self.max_blocks = world, uncached, timeout, layout().BLOCKS
        self.records = np.zeros((world, 16), np.int32)
        self.memory = [np.zeros(layout().ARENA_BYTES + 4096, np.uint8) for _ in range(world)]
        self.addresses = tuple(-(-memory.ctypes.data // 4096) * 4096 for memory in self.memory)

    def status(self, rank: int) -> int:
        return int(self.records[rank].ctypes.data)

    def buffers(self, blocks: int, lanes: int, coded: bool = False) -> Iterator[DeviceBuffer]:
        """What blocks of so many lanes use of each arena: lines of their own, so that the views stay small. coded:
        where codes are sent, too."""
        at = layout()
        ranges = [(block * at.LINE, 4) for block in range(blocks)] + [(at.BROKEN_AT, 4)]
        halves = [(block, half) for block in range(blocks) for half in range(2)]
        sources = range(self.world)
        ranges += [(at.FLAGS_AT + ((use * at.BLOCKS + block) * at.MAX_RANKS + source) * at.LINE, 4)
                   for block, use in halves for source in sources]
        line, slots_of = 16 * at.LANES, self.world if self.world in (2, 4) else at.MAX_RANKS  # that a kernel is for
        ranges += [(at.LL_AT + (2 * block + half) * at.LL_HALF + (source * 2 * at.LL_PACKS + i) * line, 16 * lanes)
                   for block, half in halves for source in range(slots_of) for i in range(2 * at.LL_PACKS)]
        slot = at.SLOT_HALF // (2 if self.world == 2 else 4 if self.world == 4 else 8)
        slots = [(2 * block + half) * at.SLOT_HALF + source * slot for block, half in halves for source in sources]
        ranges += [(region + start + i * line, 16 * lanes) for region in (at.LL128_AT, at.DATA_AT) for start in slots
                   for i in range(slot // line)]
        if coded:  # 16 bytes of a lane, 2 of 8-bit codes, then 4 bytes
            line, blocks_of = 16 * at.CODED_LANES, 8 * slot // at.SLOT_HALF
            for lines in (1, 2):
                at_use = [at.DATA_AT + start + use * slot // 2 for start in slots for use in range(2)]
                ranges += [(start + i * line, 16 * lanes) for start in at_use for i in range(blocks_of * lines)]
                ranges += [(start + blocks_of * lines * line + i * line // 4, 4 * lanes) for start in at_use
                           for i in range(blocks_of)]
            ranges = _merged(ranges)
        yield DeviceBuffer("status records", self.records.ctypes.data, self.records.nbytes)
        for rank, base in enumerate(self.addresses):
            yield from (DeviceBuffer(f"arena {rank}", base + start, size, rank, self.uncached)
                        for start, size in ranges)


@dataclass
class Call:
    """A collective: what each rank gives and gets, and what it should get."""

    op: str
    given: list[dict[str, Tensor]]
    out: list[Tensor]
    scalars: dict = field(default_factory=dict)
    written: dict[str, list[Tensor]] = field(default_factory=dict)  # in place, besides out

    @classmethod
    def drawn(cls, world: int, count: int, dtype: torch.dtype, protocol: int, seed: int, offset: int = 0) -> "Call":
        """One with drawn elements, `count` of a rank."""
        raise NotImplementedError

    def launches(self, arch: str, rank: int, arenas: Arenas) -> list:
        with hip.record(arch) as launches:
            hip.launch(self.op, arenas=arenas.addresses, rank=rank, world=arenas.world, status=arenas.status(rank),
                       timeout=arenas.timeout, max_blocks=arenas.max_blocks, **self.given[rank], out=self.out[rank],
                       **self.scalars)
        return launches

    def tensors(self, rank: int) -> dict[str, Tensor]:
        return {**self.given[rank], "out": self.out[rank]}

    def verify(self) -> None:
        raise NotImplementedError

    def same_bits(self, found: list[Tensor], expected: list[Tensor]) -> None:
        for rank, (out, wanted) in enumerate(zip(found, expected, strict=True)):
            bits = (out.view(torch.uint8), wanted.view(torch.uint8))
            wrong = (bits[0] != bits[1]).nonzero()
            assert not wrong.numel(), f"rank {rank}: wrong from byte {wrong[0].tolist()} on"


def summed(x: Sequence[Tensor]) -> Tensor:
    """In fp32, in the order of the ranks, rounded once; held to the exact sum."""
    sums, exact, size = x[0].float(), torch.stack([*x]).double().sum(0), torch.stack([*x]).double().abs().sum(0)
    for each in x[1:]:
        sums = sums + each.float()
    rounded = sums.to(x[0].dtype)
    error = torch.finfo(rounded.dtype).eps / 2 * exact.abs() + len(x) * 2.0**-24 * size
    assert ((rounded.double() - exact).abs() <= 1.01 * error + 1e-7).all()
    return rounded


def drawn(world: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: int = 0) -> list[Tensor]:
    """A tensor of each rank. offset: elements from a multiple of 16 bytes on to where they begin."""
    random = torch.Generator().manual_seed(seed)
    return [_aligned(shape, dtype, offset).copy_(torch.randn(shape, generator=random)) for _ in range(world)]


def poisoned(world: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    return [_aligned(shape, dtype, offset).fill_(torch.nan) for _ in range(world)]


class AllReduce(Call):
    """Every rank has the sum, bit by bit."""

    @classmethod
    def drawn(cls, world, count, dtype, protocol, seed, offset=0) -> "AllReduce":
        x = drawn(world, (count,), dtype, seed, offset)
        return cls("all_reduce", [{"x": each} for each in x], poisoned(world, (count,), dtype, offset),
                   dict(count=count, dtype=dtype, protocol=protocol))

    def verify(self) -> None:
        self.same_bits(self.out, [summed([each["x"] for each in self.given])] * len(self.out))


class Coded(AllReduce):
    """Every rank has the sum of what codes keep, bit by bit; off from the exact one by what the operator says."""

    def verify(self) -> None:
        codes = {protocol: name for name, protocol in peers.QUANTIZED.items()}[self.scalars["protocol"]]
        x, dtype = [each["x"] for each in self.given], self.scalars["dtype"]
        parts = [quant.coded(each, codes) for each in x]
        sums = functools.reduce(torch.add, parts)
        expected = quant.coded(sums, codes).to(dtype)
        self.same_bits(self.out, [self.out[0]] * len(self.out))
        self.same_bits([torch.where(self.out[0].isnan(), torch.nan, self.out[0])],  # of whichever NaN
                       [torch.where(expected.isnan(), torch.nan, expected)])
        exact = torch.stack(x).double().sum(0)
        error = sum(code_error(each, codes) for each in [*x, sums]) + torch.finfo(dtype).eps / 2 * exact.abs()
        finite = torch.nn.functional.pad(exact, (0, -exact.numel() % 32)).view(-1, 32).isfinite().all(1, keepdim=True)
        usual = finite.expand(-1, 32).flatten()[: exact.numel()]
        assert (expected.isnan() == ~usual).all()
        assert ((expected.double() - exact).abs() <= 1.01 * error + 1e-7)[usual].all()


def code_error(x: Tensor, codes: str) -> Tensor:
    """How far codes may be from x, as all_reduce says."""
    blocks = torch.nn.functional.pad(x.double(), (0, -x.numel() % 32)).view(-1, 32).abs()
    amax = blocks.amax(1, keepdim=True).expand_as(blocks)
    by = {"fp8": torch.maximum(blocks / 16, amax / 2**18), "int8": amax / 251, "int4": amax / 13.8}
    return by[codes].flatten()[: x.numel()]


class AllGather(Call):
    @classmethod
    def drawn(cls, world, count, dtype, protocol, seed, offset=0) -> "AllGather":
        x = [each.view(torch.uint8) for each in drawn(world, (count,), dtype, seed, offset)]
        out = [each.view(torch.uint8) for each in poisoned(world, (world * count,), dtype, offset)]
        return cls("all_gather", [{"x": each} for each in x], out, dict(count=x[0].nbytes))

    def verify(self) -> None:
        self.same_bits(self.out, [torch.cat([each["x"] for each in self.given])] * len(self.out))


class ReduceScatter(Call):
    @classmethod
    def drawn(cls, world, count, dtype, protocol, seed, offset=0) -> "ReduceScatter":
        x = drawn(world, (world, count), dtype, seed, offset)
        return cls("reduce_scatter", [{"x": each} for each in x], poisoned(world, (count,), dtype, offset),
                   dict(count=count, dtype=dtype))

    def verify(self) -> None:
        self.same_bits(self.out, [*summed([each["x"] for each in self.given])])


class FusedNorm(Call):
    """The residual bit by bit, its norm near what fp64 makes of it."""

    expected: Tensor  # residual

    @classmethod
    def drawn(cls, world, count, dtype, protocol, seed, offset=0) -> "FusedNorm":
        tokens, hidden = 1 + count % 3, max(1, count)
        x = drawn(world, (tokens, hidden), dtype, seed, offset)
        residual = [*drawn(1, (tokens, hidden), dtype, seed + 1, offset)]
        residual += [_aligned((tokens, hidden), dtype, offset).copy_(residual[0]) for _ in range(world - 1)]
        weight, = drawn(1, (hidden,), dtype, seed + 2, offset)
        made = cls("fused_all_reduce_rms_norm",
                   [{"x": a, "residual": b, "weight": weight} for a, b in zip(x, residual, strict=True)],
                   poisoned(world, (tokens, hidden), dtype, offset),
                   dict(num_tokens=tokens, hidden=hidden, eps=1e-5, dtype=dtype, protocol=protocol))
        sums = x[0].float()
        for each in x[1:]:
            sums = sums + each.float()
        made.expected = (sums + residual[0].float()).to(dtype)
        return made

    def verify(self) -> None:
        self.same_bits([each["residual"] for each in self.given], [self.expected] * len(self.out))
        exact = torch.nn.functional.rms_norm(self.expected.double(), self.expected.shape[1:],
                                             self.given[0]["weight"].double(), 1e-5)
        bound = 1.1 * (torch.finfo(self.expected.dtype).eps / 2 + 2.0**-20) * exact.abs() + 1e-7
        self.same_bits(self.out, [self.out[0]] * len(self.out))
        assert ((self.out[0].double() - exact).abs() <= bound).all()


class FusedNormQuant(Call):
    """The bits of the norm alone, as `norm` has them, quantized."""

    norm: FusedNorm

    @classmethod
    def drawn(cls, world, count, dtype, protocol, seed, offset=0) -> "FusedNormQuant":
        norm = FusedNorm.drawn(world, count, dtype, protocol, seed, offset)
        again = FusedNorm.drawn(world, count, dtype, protocol, seed, offset)
        shape, size = norm.out[0].shape, 32
        given = [{**each, "scale": torch.full((shape[0], shape[1] // size), torch.nan)} for each in again.given]
        made = cls("fused_all_reduce_rms_norm_quant_fp8", given,
                   [torch.full(shape, 0x7F, dtype=torch.uint8) for _ in range(world)],
                   norm.scalars | {"group_size": size})
        made.norm = norm
        return made

    def verify(self) -> None:
        self.norm.verify()
        q, scale = grouped(self.norm.out[0].float(), self.scalars["group_size"])
        self.same_bits(self.out, [q.view(torch.uint8)] * len(self.out))
        self.same_bits([each["scale"] for each in self.given], [scale] * len(self.out))
        self.same_bits([each["residual"] for each in self.given], [self.norm.expected] * len(self.out))


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    """In a storage of its own."""
    count = math.prod(shape)
    bytes_ = torch.zeros((count + offset) * dtype.itemsize + 16, dtype=torch.uint8)
    start = -bytes_.data_ptr() % 16 + offset * dtype.itemsize
    return bytes_[start:start + count * dtype.itemsize].view(dtype).view(shape)


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, size): those that overlap or touch as one."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        first, end = (merged.pop(), start + size) if merged and start <= sum(merged[-1]) else ((start, 0), start + size)
        merged.append((first[0], max(sum(first), end) - first[0]))
    return merged


def in_rounds(launches: list, number: int, rank: int) -> list:
    """The launches with one wave, which does in rounds what their blocks were to do."""
    return [planned(launch, block=64, grid=1, lines=min(2, launch_plan(launch)["lines"])) for launch in launches]


def by_flags(launches: list, number: int, rank: int, which: Sequence[int]) -> list:
    """Of these calls the kernels for large messages."""
    return [planned(launch, launch.kernel.replace("_ll_", "_flagged_") if number in which else "")
            if launch.op in ("all_gather", "reduce_scatter") else launch for launch in launches]


CODED = re.compile("_(fp8|int8|int4)_")  # kernels
#: what the launcher sets: the struct's last fields
PLAN = ("bytes", "block", "grid", "lines", "rounds", "longer")


def launch_plan(launch) -> dict[str, int]:
    return dict(zip(PLAN, struct.unpack("6i", launch.args[-24:]), strict=True))


def planned(launch, kernel: str = "", **plan: int) -> SimpleNamespace:
    """The launch with another plan, or kernel; its rounds follow."""
    plan, kernel = launch_plan(launch) | plan, kernel or launch.kernel
    of_8 = 15 if "ll128" in kernel else 8 * hip.arguments(launch)["world"] if "two_shot" in kernel else 8
    of_block = plan["block"] // 8 * of_8 * plan["lines"]
    plan["rounds"], rest = divmod(-(-plan["bytes"] // (64 if CODED.search(kernel) else 16)), of_block * plan["grid"])
    plan["longer"] = -(-rest // of_block)
    return SimpleNamespace(op=launch.op, kernel=kernel, code_object=launch.code_object, lds_bytes=0,
                           grid=(plan["grid"], 1, 1), block=(plan["block"], 1, 1), tensors=launch.tensors,
                           args=launch.args[:-24] + struct.pack("6i", *(plan[name] for name in PLAN)))


def run(calls: Sequence[Call], arch: str, seed: int, arenas: Arenas | None = None,
        change: Callable[[list, int, int], list] = lambda launches, call, rank: launches, **options) -> Counts:
    """The calls one after another on every rank. change: of a rank's launches of a call, makes those that it makes."""
    world = len(calls[0].out)
    arenas = arenas or Arenas(world)
    launches, ranks = [], []
    for number, call in enumerate(calls):
        for rank in range(world):
            made = change(call.launches(arch, rank, arenas), number, rank)
            launches += made
            ranks += [rank] * len(made)
    blocks, lanes = (max(getattr(launch, of)[0] for launch in launches) for of in ("grid", "block"))
    buffers = [*arenas.buffers(blocks, lanes, any(CODED.search(launch.kernel) for launch in launches))]
    for number, call in enumerate(calls):
        for rank in range(world):
            buffers += [DeviceBuffer(f"{name} of rank {rank} in call {number}", x.data_ptr(), x.nbytes, rank)
                        for name, x in call.tensors(rank).items() if x.numel()]
    return execute_together(launches, buffers, seed, devices=ranks, streams=ranks, **options)


def one_by_one(call: Call, arch: str, shots: int, code: str | None = None, **options) -> Counts:
    """The call with each rank's launch by itself, which is quick: peers' flags are set before, so that none waits, and
    tags are waited for for a moment. A pass for each shot leaves what the next one needs in the arenas; the last one's
    outputs stay, and no wait may end in vain there. code: of a code object that stands in for the package's."""
    counts, arenas, at = Counts(), Arenas(len(call.out), timeout=1), layout()
    buffers = [Buffer("status records", arenas.records.ctypes.data, arenas.records.nbytes)]
    buffers += [Buffer(f"arena {rank}", base, at.ARENA_BYTES) for rank, base in enumerate(arenas.addresses)]
    words = [memory[base - memory.ctypes.data:][:at.LL_AT].view(np.int32)
             for memory, base in zip(arenas.memory, arenas.addresses, strict=True)]
    before = [{name: x.clone() for name, x in given.items()} for given in call.given]
    for _ in range(shots + 1):
        arenas.records[:] = 0
        for rank, own in enumerate(words):
            for name, x in before[rank].items():  # some are written in place
                call.given[rank][name].copy_(x)
            own[:at.FLAGS_AT // 4] = 0  # the first round, no wait given up
            own[at.FLAGS_AT // 4:] = 1 << 30  # rounds ahead
            tensors = [Buffer(name, x.data_ptr(), x.nbytes) for name, x in call.tensors(rank).items()]
            for launch in call.launches(arch, rank, arenas):
                if code is not None:
                    launch = planned(launch)
                    launch.code_object = code
                execute(launch, [*buffers, *tensors], counts, **options)
    for rank, record in enumerate(arenas.records):
        assert not record.any(), f"rank {rank} waited in vain: {record[:5].tolist()}"
    return counts
