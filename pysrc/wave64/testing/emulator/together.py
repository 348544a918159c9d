"""Launches that run at the same time, as those of several ranks do: their workgroups may wait for each other's, by
flags in memory that they share.

    with hip.record("gfx942") as of_rank_0: ...
    with hip.record("gfx942") as of_rank_1: ...
    execute_together([*of_rank_0, *of_rank_1], [Buffer("data", x.data_ptr(), x.nbytes), ...], seed=3)

A turn is one wave's, for a few instructions; which wave's and for how many comes from the seed, so that every seed is
another interleaving, and the same one again. Every store is seen by all at once: what a protocol owes to caches and to
the order of stores on their way, its cache controls and waits before a flag is set, goes unseen here.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.machine import ENDED, READY, WAITING, Machine
from wave64.testing.emulator.memory import Buffer, EmulationError
from wave64.testing.emulator.run import SECONDS, Counts, Prepared, without_collection

PATIENCE = 20_000  # instructions of each wave without a change in memory, after which they are taken to wait for ever
LONGEST_TURN = 64  # instructions


class Deadlock(EmulationError):
    """No wave can get on: those that run change nothing in memory."""


def execute_together(launches: Sequence, buffers: Iterable[Buffer], seed: int = 0, *, patience: int = PATIENCE,
                     checks: tuple[type, ...] = ALL, seconds: float = SECONDS) -> Counts:
    """Makes recorded launches at the same time, all their workgroups resident. `buffers` is all memory that they may
    touch, and share, besides their arguments and code objects.

    Raises Deadlock, which says where each launch's waves are, once every wave that has not ended waits at a barrier or
    has executed `patience` instructions since a store or an atomic, to memory or LDS, last changed what was there;
    EmulationError as `execute` does, with the launch's number.
    """
    counts, shared, began = Counts(), list(buffers), time.monotonic()
    prepared = [Prepared(launch) for launch in launches]
    machines = [Machine(p.program, p.kernel, p.shape(p.blocks), checks) for p in prepared]
    try:
        with np.errstate(all="ignore"), without_collection():
            for machine, p in zip(machines, prepared, strict=True):
                machine.memory.register([*shared, *p.buffers])
                machine.memory.changes = machine.lds.changes = 0
                p.start(machine, 0, p.blocks)
            _interleave(machines, random.Random(seed), patience, began + seconds)
        for machine, p in zip(machines, prepared, strict=True):
            p.note(counts)
            counts.add(machine, machine.count)
    finally:
        for machine in machines:
            machine.release()
    counts.seconds = time.monotonic() - began
    return counts


def _changes(machine: Machine) -> int:
    return (machine.memory.changes or 0) + (machine.lds.changes or 0)


def _interleave(machines: list[Machine], order: random.Random, patience: int, until: float) -> None:
    idle = [np.zeros(machine.count, np.int64) for machine in machines]  # instructions since memory last changed
    while ready := [(i, int(wave)) for i, machine in enumerate(machines)
                    for wave in np.flatnonzero(machine.states == READY)]:
        i, wave = order.choice(ready)
        machine = machines[i]
        before = _changes(machine)
        try:
            idle[i][wave] += machine.advance(wave, order.randint(1, LONGEST_TURN))
            if machine.states[wave] != READY:
                machine.meet(partly=True)
        except (EmulationError, NotImplementedError) as e:
            raise type(e)(f"launch {i}: {e}") from None
        if _changes(machine) != before:
            for count in idle:
                count.fill(0)
        elif idle[i][wave] >= patience and all(
                ((machine.states != READY) | (count >= patience)).all()
                for machine, count in zip(machines, idle, strict=True)):
            raise Deadlock("\n    ".join([f"deadlock: nothing in memory has changed for {patience:,} instructions of "
                                          "every wave", *_whereabouts(machines)]))
        if time.monotonic() > until:
            raise EmulationError("\n    ".join(["still running after the seconds given", *_whereabouts(machines)]))


def _whereabouts(machines: list[Machine]) -> Iterator[str]:
    """Where the waves of each launch are, in words."""
    for i, machine in enumerate(machines):
        alive = machine.states != ENDED
        if not alive.any():
            yield f"launch {i}: {machine.kernel.name} has ended"
        pcs = Counter(zip(machine.pcs[alive].tolist(), machine.states[alive].tolist(), strict=True))
        for (pc, state), count in sorted(pcs.items()):
            doing = "wait at the barrier before" if state == WAITING else "run at"
            yield f"launch {i}: {count} of {machine.count} waves {doing} {machine.where(pc)}"
