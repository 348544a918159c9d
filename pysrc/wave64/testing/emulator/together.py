"""Launches that run at the same time, as those of several ranks do: their workgroups may wait for each other's, by
flags in memory that they share.

    with hip.record("gfx942") as of_rank_0: ...
    with hip.record("gfx942") as of_rank_1: ...
    execute_together([*of_rank_0, *of_rank_1], [Buffer("data", x.data_ptr(), x.nbytes), ...], seed=3)

A turn is one wave's, until it accesses memory, for a few instructions at most; which wave's, and what the caches do in
the meantime (views.py), comes from the seed, so that every seed is another schedule, and the same one again. A wave
that has stored something is often made to wait, so that others see one store of it and not yet the next.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.coherence import Coherence, CoherentMemory
from wave64.testing.emulator.machine import ENDED, READY, WAITING, Machine
from wave64.testing.emulator.memory import Buffer, EmulationError
from wave64.testing.emulator.run import SECONDS, Counts, Prepared, without_collection
from wave64.testing.emulator.unordered import Shadow, Unordered
from wave64.testing.emulator.views import Wave, World

PATIENCE = 20_000  # instructions of each wave without a change in memory, after which they are taken to wait for ever
LONGEST_TURN = 64  # instructions
LATE = 8                  # of so many schedules, one in which half of the waves start late
HELD = (0, *range(6, 20))  # turns of each other wave, about, that one waits after a store


class Deadlock(EmulationError):
    """No wave can get on: those that run change nothing in memory."""


def execute_together(launches: Sequence, buffers: Iterable[Buffer], seed: int = 0, *,
                     devices: Sequence[int] | None = None, streams: Sequence[int] | None = None,
                     patience: int = PATIENCE, whole_lines: bool = True,
                     checks: tuple[type, ...] = (*ALL, Unordered), seconds: float = SECONDS,
                     show: Callable[[str], None] | None = None) -> Counts:
    """Makes recorded launches at the same time, all their workgroups resident. `buffers` is all memory that they may
    touch, and share, besides their arguments and code objects; a `DeviceBuffer` says in whose memory it is, and of
    which kind. devices: that of each launch; none: each has its own. streams: that of each launch; one begins when
    those before it in its stream have ended; none: all begin at once. whole_lines: see views.py. show: takes the
    schedule, a line for what each wave stores and finds and for when stores are seen; of a seed that failed,
    `show=print` tells how.

    Raises Deadlock, which says where each launch's waves are, once every wave that has not ended waits at a barrier or
    has executed `patience` instructions since a store or an atomic, to memory or LDS, last changed what was there;
    EmulationError as `execute` does, with the launch's number.
    """
    counts, shared, began = Counts(), list(buffers), time.monotonic()
    prepared = [Prepared(launch) for launch in launches]
    order = random.Random(seed)
    world, shadow = World(shared, order, show, whole_lines), Shadow()
    machines = [Machine(p.program, p.kernel, p.shape(p.blocks), (*checks, Coherence)) for p in prepared]
    try:
        with np.errstate(all="ignore"), without_collection():
            for i, (machine, p) in enumerate(zip(machines, prepared, strict=True)):
                machine.memory = CoherentMemory(world, i, shadow, across=len(set(devices or range(len(machines)))) > 1)
                machine.memory.register([*shared, *p.buffers])
                machine.lds.changes = 0
                p.start(machine, 0, p.blocks)
                device = devices[i] if devices else i
                for wave in range(machine.count):
                    world.waves[i, wave] = Wave(i, wave, int(machine.group[wave]), device)
            _interleave(machines, world, shadow, _Streams(streams or range(len(machines))), order, patience,
                        began + seconds)
        for machine, p in zip(machines, prepared, strict=True):
            machine.ended()
            p.note(counts)
            counts.add(machine, machine.count)
    finally:
        for machine in machines:
            machine.release()
    counts.seconds = time.monotonic() - began
    return counts


class _Streams:
    """Which launches run: of each stream the first that has not ended."""

    def __init__(self, streams: Iterable[int]):
        self.queues: dict[int, list[int]] = {}
        for launch, stream in enumerate(streams):
            self.queues.setdefault(stream, []).append(launch)
        self.running = {queue[0] for queue in self.queues.values()}

    @property
    def waiting(self) -> bool:
        return any(len(queue) > 1 for queue in self.queues.values())

    def ended(self, launch: int, world: World, shadow: Shadow) -> None:
        """The next of its stream begins, and finds what the launch has done."""
        self.running.discard(launch)
        queue = next(queue for queue in self.queues.values() if queue[0] == launch)
        shadow.ended(launch)
        if len(queue) > 1:
            queue.pop(0)
            self.running.add(queue[0])
            world.begin(queue[0])
            shadow.began(queue[0])


def _interleave(machines: list[Machine], world: World, shadow: Shadow, streams: _Streams, order: random.Random,
                patience: int, until: float) -> None:
    idle = [np.zeros(machine.count, np.int64) for machine in machines]  # instructions since anything last changed
    running, settled = streams.running, False
    late = order.randrange(LATE) == 0
    held = {wave: order.choice(HELD) * len(world.waves) for wave in world.waves if late and order.randrange(2)}

    def ready() -> list[tuple[int, int]]:
        return [(i, int(wave)) for i in sorted(running) for wave in np.flatnonzero(machines[i].states == READY)]

    while (able := ready()) or streams.waiting:
        if not able:  # all that runs has ended, but for what is on its way
            for number in list(running):
                world.end(number)
                streams.ended(number, world, shadow)
            continue
        free = [each for each in able if held.get(each, 0) <= 0]
        held = {each: turns - 1 for each, turns in held.items() if turns > 1}
        i, wave = order.choice(free or able)
        machine, now = machines[i], world.waves[i, wave]
        before = (world.changes, machine.lds.changes, world.stores)
        world.now = now
        try:
            idle[i][wave] += machine.advance(wave, order.randint(1, LONGEST_TURN))
            if machine.states[wave] != READY:
                machine.meet(partly=True)
        except (EmulationError, NotImplementedError) as e:
            raise type(e)(f"launch {i}: {e}") from None
        if world.stores != before[2]:
            held[i, wave] = order.choice(HELD) * len(able)
        for number in list(running):
            if (machines[number].states == ENDED).all() and world.ends(number):
                streams.ended(number, world, shadow)
        world.pass_time(lambda wave: machines[wave.launch].states[wave.number] == ENDED)
        if (world.changes, machine.lds.changes) != before[:2]:
            settled = False
            for count in idle:
                count.fill(0)
        elif idle[i][wave] >= (enough := patience if settled else patience // 2) and all(
                ((machines[j].states != READY) | (idle[j] >= enough)).all() for j in running):
            if done := [number for number in running if (machines[number].states == ENDED).all()]:
                for number in done:  # it is only late: who follows in its stream may be waited for
                    world.end(number)
                    streams.ended(number, world, shadow)
                for count in idle:
                    count.fill(0)
                continue
            if settled:
                raise Deadlock("\n    ".join([
                    f"deadlock: nothing in memory has changed for {patience:,} instructions of every wave",
                    *_whereabouts(machines)]))
            settled = not world.settle()
        if time.monotonic() > until:
            raise EmulationError("\n    ".join(["still running after the seconds given", *_whereabouts(machines)]))
    world.settle()


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
