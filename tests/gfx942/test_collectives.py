"""Collectives of HIP, the machine code of all ranks side by side under the memory model: every rank has the bits of the
sum in the order of the ranks, whatever the schedule, from call to call on the same arenas."""

import pytest
import torch
from collectives import LL, Call, run

ARCHS = ("gfx942", "gfx950")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: (elements, dtype, protocol, elements from a multiple of 16 bytes on): calls one after another
CALLS = [(97, BF16, LL, 0), (1, FP32, LL, 0), (331, FP16, LL, 1), (64, FP32, LL, 3)]


def drawn(world: int, calls=CALLS, seed: int = 0) -> list[Call]:
    return [Call.drawn(world, count, dtype, protocol, 100 * seed + i, offset)
            for i, (count, dtype, protocol, offset) in enumerate(calls)]


@pytest.mark.parametrize(("world", "seed"), [*((2, seed) for seed in range(4)), (4, 0), (3, 1), (8, 0)])
@pytest.mark.parametrize("arch", ARCHS)
def test_all_reduce(arch, world, seed):
    calls = drawn(world, CALLS if world < 8 else CALLS[:2], seed)
    run(calls, arch, seed)
    for call in calls:
        call.verify()
