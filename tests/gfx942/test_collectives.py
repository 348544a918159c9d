"""Collectives of HIP, the machine code of all ranks side by side under the memory model: every rank has the bits of the
sum in the order of the ranks, whatever the schedule, from call to call on the same arenas."""

import random

import pytest
import torch
from collectives import (
    LL,
    LL128,
    ONE_SHOT,
    TWO_SHOT,
    AllGather,
    AllReduce,
    Call,
    FusedNorm,
    ReduceScatter,
    by_flags,
    in_rounds,
    run,
)

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


def held(calls: list[Call], arch: str, seed: int, **options) -> None:
    run(calls, arch, seed, **options)
    for call in calls:
        call.verify()


@pytest.mark.parametrize(("arch", "world", "seed", "number"), [
    ("gfx942", 2, 0, 8), ("gfx942", 3, 2, 4), ("gfx942", 8, 3, 2), ("gfx950", 4, 5, 4)])
def test_calls_one_after_another(arch, world, seed, number):
    held(drawn(world, seed, number), arch, seed)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rounds_of_a_call(protocol):
    """One block has to come back for what more would have done; then the next call's rounds go on."""
    calls = [AllReduce.drawn(2, count, BF16, protocol, count) for count in (5000, 300)]
    held(calls, "gfx942", 5, change=in_rounds)


@pytest.mark.parametrize(("op", "world"), [(AllGather, 2), (ReduceScatter, 4)])
def test_large_messages_go_by_flags(op, world):
    """As those of more than LL_BYTES, which would take long."""
    held([op.drawn(world, count, FP16, ONE_SHOT, count) for count in (340, 3)], "gfx942", world, change=by_flags)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200))
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("arch", ARCHS)
def test_many_schedules(arch, world, seed):
    held(drawn(world, 1000 + seed, 4), arch, seed)
