"""How long a kernel takes on the products that wave64.arch names, predicted from what its execution on the emulator
counted. Where testing/cost.py has bounds, which hold, this has estimates, whose error is known.

    python -m wave64.testing.cost rms_norm 128x7168          # prints both
    python tests/bench/aiter.py --calibrate                  # the constants, anew, and the errors on held-out rows

A launch takes START, and then about as long as the slowest of what it does at the same time:
  - products and other vector instructions of the workgroups that one compute unit gets, in whole rounds. The two do not
    overlap, and under load the clock is below its peak, which the factors MATRIX and VECTOR hold;
  - LDS, as many cycles as its banks need;
  - loads that depend on one another, each LATENCY, of the workgroups that a compute unit runs one after another;
  - device memory, or, of data that fits there and was left there, the Infinity Cache;
  - lines that instructions touch, from L2.
These overlap, but not quite: they are joined by a norm of degree DEGREE, at 1 a sum, at infinity a maximum.

The constants were calibrated on half of AITER's published timings of its own assembly (tests/bench/calibration.json)
and held to the other half, whose errors HELD_OUT says; never on kernels of this project. Two predictions that differ by
less than TIE are a tie. Left out: lengths that differ between workgroups, atomics, and scratch memory.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from wave64.arch import lookup
from wave64.testing.emulator.cost import LINE, Usage

SIMDS = 4  # of a compute unit
CLOCK_GHZ = {"gfx942": 2.1, "gfx950": 2.4}  # peak engine clocks of the products that wave64.arch names
INFINITY_CACHE = 256 << 20  # bytes


@dataclass(frozen=True)
class Constants:
    start: float = 3.71     # us: what the smallest launch takes
    matrix: float = 1.83    # time of matrix instructions, in their cycles at the peak clock
    vector: float = 0.67    # ... and of other vector instructions
    latency: float = 0.515  # us of a load
    memory: float = 0.834   # of device memory's peak rate
    cache: float = 1.09     # rate of the Infinity Cache, in device memory's peak rates: weakly determined, since the
    #                         timings are of data in turn, most of which no cache kept
    l2: float = 23.2        # bytes that a compute unit gets from L2 in a cycle
    degree: float = 4.31


CONSTANTS = Constants()
#: of held-out rows, the part that is predicted within 25 %, with more workgroups than 304 and with at most as many
HELD_OUT = (0.99, 0.97)
#: Predictions whose ratio is below this count as a tie: of ten held-out rows eight are predicted within it.
TIE = 1.2


@dataclass(frozen=True)
class Work:
    """A launch. cycles: of a workgroup, all its waves, by unit as in Usage. chain: of dependent loads of a wave."""

    arch: str
    units: int           # compute units
    blocks: float        # workgroups
    block_waves: int
    at_once: int         # workgroups that a compute unit runs at once
    cycles: dict[str, float]
    once: float          # bytes of memory that are touched at all
    lines: float         # bytes of the lines of 128 that instructions touch
    chain: float


def blocks_at_once(waves_per_simd: float, block_waves: int) -> int:
    return max(1, int(SIMDS * waves_per_simd / block_waves))


def work_of(usage: Usage, waves_per_simd: float) -> Work:
    blocks = max(1, usage.blocks)
    return Work(usage.arch, lookup(usage.arch).compute_units, blocks, usage.block_waves,
                blocks_at_once(waves_per_simd, usage.block_waves),
                {unit: cycles / blocks for unit, cycles in usage.cycles.items()},
                usage.once(), usage.touched[2 * LINE], usage.chain)


def parts_us(work: Work, cold: bool, c: Constants = CONSTANTS) -> dict[str, float]:
    """Resource -> microseconds. cold: no data is in the Infinity Cache; else all is that fits."""
    clock = CLOCK_GHZ[work.arch] * 1e3  # cycles in a microsecond
    rounds = math.ceil(work.blocks / work.units - 1e-9)
    simds = min(SIMDS, work.block_waves * min(work.at_once, rounds))
    vector = work.cycles["vector"] + work.cycles["transcendental"]
    rate = c.memory if cold or work.once > INFINITY_CACHE else c.cache
    return {
        "matrix and vector": rounds * (c.matrix * work.cycles["matrix"] + c.vector * vector) / simds / clock,
        "LDS": rounds * work.cycles["lds"] / clock,
        "latency": math.ceil(rounds / work.at_once) * work.chain * c.latency,
        "memory": work.once / (rate * lookup(work.arch).bandwidth_gbs * 1e3),
        "L2": work.lines / (c.l2 * work.units * clock),
    }


def predicted_us(work: Work, cold: bool = False, c: Constants = CONSTANTS) -> float:
    parts = parts_us(work, cold, c).values()
    return c.start + sum(part**c.degree for part in parts) ** (1 / c.degree)


def fingerprint() -> str:
    """Of this file: a test holds it, so that the model does not change unseen while kernels are tuned by it."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
