"""AITER's all-reduce of eight GPUs as a piece of work: each sums an eighth of the numbers, and stores it to all."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from aiter_work import Arrays, Launch, Ours, Work, bf16, distance, slots, wide

from wave64.testing.emulator.memory import Buffer

sys.path.append(str(Path(__file__).parents[1] / "gfx942"))
import collectives  # noqa: E402

RANKS, WAVES, WAVE_BYTES = 8, 4, 1024
SIGNALS = RANKS * 64 * 8  # bytes: two counters for each rank and each of up to 64 workgroups


def _all_reduce(groups: int) -> Launch:
    random, mem = np.random.default_rng(7), Arrays()
    by_wave, by_group, by_rank = WAVE_BYTES, WAVES * WAVE_BYTES, groups * WAVES * WAVE_BYTES
    drawn = [bf16(random.standard_normal(RANKS * by_rank // 2)) for _ in range(RANKS)]
    data = [mem.put(f"data of rank {rank}", x) for rank, x in enumerate(drawn)]
    signals = [mem.new(f"signals of rank {rank}", (SIGNALS,), np.uint8, 0) for rank in range(RANKS)]
    pointers = mem.put("pointers", np.array([x.ctypes.data for x in data], np.uint64))
    args = [slots(pointers, *signals, rank, by_rank, by_group, by_wave, 1) for rank in range(RANKS)]
    want = sum(wide(x) for x in drawn)

    def error() -> float:
        assert not any(each.any() for each in signals)  # as they were, for the next call
        return max(distance(wide(x), want) for x in data)
    return Launch((groups, 1, 1), 64 * WAVES, args, mem, error)


def _ours(count: int, arch: str) -> tuple[list, list[Buffer], Callable[[], None]]:
    """Our two-shot all-reduce of as many numbers."""
    call = collectives.AllReduce.drawn(RANKS, count, torch.bfloat16, collectives.TWO_SHOT, 7)
    arenas = collectives.Arenas(RANKS)
    launches = [launch for rank in range(RANKS) for launch in call.launches(arch, rank, arenas)]
    blocks, lanes = (max(getattr(launch, of)[0] for launch in launches) for of in ("grid", "block"))
    buffers: list[Buffer] = [*arenas.buffers(blocks, lanes)]
    for rank in range(RANKS):
        buffers += [Buffer(f"{name} of rank {rank}", x.data_ptr(), x.nbytes) for name, x in call.tensors(rank).items()]

    def verify(held: collectives.Arenas = arenas) -> None:
        """Holds the arenas, which are not the call's, until then."""
        call.verify()
    return launches, buffers, verify


def allreduce(arch: str, small: bool) -> Iterator[Work]:
    if arch != "gfx942":
        return
    for groups in [1] if small else [1, 4]:
        count = RANKS * groups * WAVES * WAVE_BYTES // 2
        yield Work("allreduce", f"all-reduce of {count:,} bf16 numbers, {RANKS} GPUs", "gfx942/all_reduce.co",
                   functools.partial(_all_reduce, groups), 1e-2,
                   Ours("all_reduce", ranks=functools.partial(_ours, count)),
                   "counts are of all GPUs together, and stores are seen at once: bytes and bound are not those of one")
