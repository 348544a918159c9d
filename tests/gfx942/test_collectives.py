"""Collectives of HIP, the machine code of all ranks side by side under the memory model: every rank has the bits of the
sum in the order of the ranks, whatever the schedule, from call to call on the same arenas."""

import functools
import random
from collections.abc import Sequence

import pytest
import torch
from collectives import (
    FP8,
    INT4,
    INT8,
    LL,
    LL128,
    ONE_SHOT,
    TWO_SHOT,
    AllGather,
    AllReduce,
    Arenas,
    Call,
    Coded,
    FusedNorm,
    FusedNormQuant,
    ReduceScatter,
    by_flags,
    in_rounds,
    launch_plan,
    one_by_one,
    run,
)

from wave64 import platform
from wave64.backends import peers

ARCHS = ("gfx942", "gfx950")
BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROTOCOLS = (LL, LL128, ONE_SHOT, TWO_SHOT)
SIZES = (1, 2, 7, 8, 31, 97, 120, 121, 240, 331)


OPS = (AllGather, ReduceScatter, FusedNorm)


def drawn(world: int, seed: int, number: int) -> list[Call]:
    """Calls of changing operator, protocol, size, dtype and alignment; every second is an all-reduce."""
    order = random.Random(seed)
    protocols, made = [p for _ in range(number) for p in order.sample(PROTOCOLS, 4)], []
    for i, protocol in enumerate(protocols[:number]):
        op = order.choice(OPS) if i % 2 else AllReduce
        made.append(op.drawn(world, order.choice(SIZES), order.choice(DTYPES), protocol, 100 * seed + i,
                             order.choice((0, 0, 1, 3))))
    return made


WORLDS = (2, 4, 3)  # three ranks have the kernels for any number
FLAGGED = (9, 10)   # of `every`: as large messages are sent, which would take long


def every(world: int) -> list[Call]:
    """A call of each kernel for so many ranks."""
    order = random.Random(world)
    kinds = [*((AllReduce, protocol) for protocol in PROTOCOLS), (FusedNorm, LL), (FusedNorm, LL128),
             (FusedNorm, ONE_SHOT), (AllGather, LL), (ReduceScatter, LL), (AllGather, LL), (ReduceScatter, LL)]
    return [op.drawn(world, order.choice(SIZES), order.choice(DTYPES), protocol, 10 * world + i,
                     order.choice((0, 0, 1, 3)))
            for i, (op, protocol) in enumerate(kinds)]


def coded(world: int) -> list[Call]:
    """A call of each kernel that sends codes: blocks of usual numbers, zeros, tiny, huge, NaN and infinite ones."""
    calls: list[Call] = [Coded.drawn(world, 393, (FP16, BF16)[protocol % 2], protocol, 7 * world + protocol, offset)
                         for protocol, offset in ((FP8, 0), (INT8, 0), (INT4, 1))]
    for call in calls:
        for each in call.given:
            each["x"][64:96] = 0
        first, last = call.given[0]["x"], call.given[-1]["x"]
        first[96:128] *= 2.0**-13
        first[128:160] *= 2.0**11
        first[170], last[200], last[230] = torch.nan, torch.inf, -torch.inf
    return calls


def quantized_norm(world: int, protocol: int) -> FusedNormQuant:
    hidden, dtype, offset = (96, BF16, 0) if protocol == LL else (64, FP32, 1)
    return FusedNormQuant.drawn(world, hidden, dtype, protocol, 9 * world + hidden, offset)


def launched(arch: str, worlds: Sequence[int] = WORLDS) -> set[tuple[str, str]]:
    """(operator, kernel) of what test_every_kernel executes."""
    found = set()
    for world in worlds:
        arenas = Arenas(world)
        for number, call in enumerate(every(world)):
            found |= {(each.op, each.kernel) for each in by_flags(call.launches(arch, 0, arenas), number, 0, FLAGGED)}
        for call in [*coded(world), quantized_norm(world, LL), quantized_norm(world, ONE_SHOT)]:
            found |= {(each.op, each.kernel) for each in call.launches(arch, 0, arenas)}
    return found


def held(calls: list[Call], arch: str, seed: int, **options) -> int:
    """The wave instructions that were executed."""
    counts = run(calls, arch, seed, **options)
    for call in calls:
        call.verify()
    return counts.instructions


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel(arch, world, record_property):
    """One after another on the same arenas; on gfx950, which executes the same forms, without checks of the machine."""
    calls = every(world)
    instructions = held(calls, arch, world, change=functools.partial(by_flags, which=FLAGGED),
                        **(dict(checks=()) if arch == "gfx950" else {}))
    record_property("emulated", {"arch": arch, "kernels": sorted(launched(arch, [world])),
                                 "instructions": instructions})


@pytest.mark.parametrize(("arch", "world"), [("gfx942", 2), ("gfx942", 4), ("gfx942", 8), ("gfx950", 2), ("gfx950", 4),
                                             ("gfx950", 3)])
def test_codes(arch, world, record_property):
    """The kernels for codes are the formula's numbers, bit by bit, whatever is in their blocks."""
    told = {"arch": arch, "kernels": [], "instructions": 0}
    for call in coded(world):
        counts = one_by_one(call, arch, shots=2, **(dict(checks=()) if world == 8 else {}))
        told["kernels"] += sorted(counts.kernels)
        told["instructions"] += counts.instructions
        with platform.target(arch):
            call.verify()
        assert call.out[0].isnan().sum() == 3 * 32
        assert not call.out[0][64:96].any()
    record_property("emulated", told)


@pytest.mark.parametrize("protocol", [LL, ONE_SHOT])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_norm_and_quantization(arch, world, protocol, record_property):
    """The bits of the two operators one after another."""
    call = quantized_norm(world, protocol)
    one_by_one(call.norm, arch, shots=1, checks=())
    counts = one_by_one(call, arch, shots=1, **(dict(checks=()) if arch == "gfx950" else {}))
    with platform.target(arch):
        call.verify()
    record_property("emulated", {"arch": arch, "kernels": sorted(counts.kernels), "instructions": counts.instructions})


def test_norm_and_quantization_of_ranks_that_run_together():
    call = quantized_norm(2, LL)
    run([call], "gfx942", 4)
    one_by_one(call.norm, "gfx942", shots=1, checks=())
    with platform.target("gfx942"):
        call.verify()


def test_blocks_are_as_few_as_a_card_has_capacity_for():
    arenas, call = Arenas(4), AllReduce.drawn(4, 1 << 18, BF16, TWO_SHOT, 1)
    arenas.max_blocks = peers.blocks_that_fit(4, 132)
    launch, = call.launches("gfx942", 0, arenas)
    plan = launch_plan(launch)
    assert [peers.blocks_that_fit(size, 132) for size in (2, 4, 8)] == [128, 33, 16]
    with pytest.raises(ValueError, match="size: expected at most 4 ranks on a card of 4 compute units, .*, got 5"):
        peers.blocks_that_fit(5, 4)
    assert launch.grid[0] <= arenas.max_blocks
    per_block = plan["block"] * plan["lines"] * 4
    assert (plan["rounds"] * plan["grid"] + plan["longer"]) * per_block >= (1 << 18) // 8


@pytest.mark.parametrize(("dtype", "hidden", "kernel"), [
    (BF16, 7680, "ll128"), (BF16, 7681, "flagged"), (FP32, 3840, "ll128"), (FP32, 4096, "flagged")])
def test_rows_that_do_not_fit_ll128s_lines_go_by_flags(dtype, hidden, kernel):
    """64 lines of 120 bytes, twice."""
    call = FusedNorm.drawn(2, hidden, dtype, LL128, 1)
    launch, = call.launches("gfx942", 0, Arenas(2))
    assert launch.kernel == f"fused_all_reduce_rms_norm_{kernel}_2"
    assert launch.block == (512, 1, 1)


def test_codes_of_ranks_that_run_together():
    """Two calls, of several blocks a lane, then of one."""
    calls = [Coded.drawn(2, count, BF16, INT4, count) for count in (3000, 40)]
    run(calls, "gfx942", 9, change=in_rounds)
    with platform.target("gfx942"):
        for call in calls:
            call.verify()


def test_eight_ranks():
    held(drawn(8, 3, 1), "gfx942", 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rounds_of_a_call(protocol):
    """One block has to come back for what more would have done; then the next call's rounds go on."""
    calls = [AllReduce.drawn(2, count, BF16, protocol, count) for count in (5000, 300)]
    held(calls, "gfx942", 5, change=in_rounds)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wait_is_bounded(protocol):
    """Of a rank whose peer makes no calls: the record says who waited for whom, and the next call ends at once."""
    arenas, calls = Arenas(2, timeout=1), [AllReduce.drawn(2, 40, FP32, protocol, i) for i in range(2)]
    run(calls, "gfx942", 0, arenas, lambda launches, number, rank: [] if rank else launches)
    broken, op, number, block, waited_for = arenas.records[0][:5].tolist()
    assert (broken, op, number, block, waited_for) == (1, 1, 1, 0, 1)
    assert not arenas.records[1].any()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200))
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("arch", ARCHS)
def test_many_schedules(arch, world, seed):
    held(drawn(world, 1000 + seed, 4), arch, seed)
