"""How long MLA decode of B sequences of S keys is predicted to take: AITER's assembly next to our kernels.

    python tests/bench/mla_predicted.py --arch gfx950 --hsa amd_aiter-0.1.7.post2.dev18-py3-none-any.whl

Ours is executed on the emulator on a part of the device, with as small a part of the batch, so that the plan of splits
is that of the whole; testing/predict.py makes times of the counts. What a workgroup of AITER's takes is linear in its
keys: it is executed on 256 and on 512, and of 1 to 16 splits, those that are predicted to be fastest count. Its merge
is another kernel, of which only what it reads and the launch count, so a bit less than it takes.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
from aiter_attention import VALUES, mla
from aiter_objects import Objects
from aiter_reports import MANY, several_tokens
from aiter_work import Ours, theirs
from aiter_work import Work as Piece

from wave64 import OPS, platform
from wave64.arch import EMULATED, lookup
from wave64.op import Case
from wave64.ops.mla_decode import make_case
from wave64.ops.mla_decode_rope import make_case as make_rope
from wave64.testing import contract
from wave64.testing.cost import waves_per_simd
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.cost import counting
from wave64.testing.emulator.jit import emulate_triton
from wave64.testing.emulator.run import emulate
from wave64.testing.emulator.watch import Check
from wave64.testing.predict import Work, predicted_us, work_of

ALLOWED = 5e-3  # where the largest results are about 0.1
KEYS, SPLITS, PAGE_SIZE = (256, 512), range(1, 17), 64
SHAPES = [(16, 1), (16, 32), (16, 128), (128, 1), (128, 8), (128, 64)]  # heads, sequences
MAKE = {"mla_decode": make_case, "mla_decode_rope": make_rope}


# ---- AITER's

def counted(objects: Objects, arch: str, heads: int) -> list[Work]:
    """Two workgroups of AITER's, with each of KEYS."""
    name, works = next(mla(arch, True)).object if heads == 16 else f"{arch}/mla/{MANY}.co", []
    for keys in KEYS:
        make = functools.partial(several_tokens, 1, [2 * keys], 2, heads)
        row = theirs(Piece("mla", "", name, make, ALLOWED, Ours("")), objects.read(name), strict=False)
        assert row.error <= ALLOWED, f"{name}: {row.error:.2e} from fp64, {ALLOWED:.0e} allowed"
        (usage,) = row.usages.values()
        works.append(work_of(usage, waves_per_simd(usage)))
    return works


def aiters(few: Work, many: Work, heads: int, seqs: int, length: int) -> tuple[float, float, int]:
    """(us of the decode, us with the merge, splits)."""
    def linear(a: float, b: float, keys: float) -> float:
        return a + (b - a) * (keys - KEYS[0]) / (KEYS[1] - KEYS[0])

    def of(splits: int) -> tuple[float, float, int]:
        blocks, keys = seqs * splits, length / splits
        work = dataclasses.replace(few, blocks=blocks, once=linear(few.once, many.once, keys) * blocks / 2,
                                   lines=linear(few.lines, many.lines, keys) * blocks / 2,
                                   chain=linear(few.chain, many.chain, keys),
                                   cycles={unit: linear(few.cycles[unit], many.cycles[unit], keys)
                                           for unit in few.cycles})
        merged = dataclasses.replace(work, blocks=seqs * heads, once=seqs * heads * VALUES * (4 * splits + 2), lines=0,
                                     chain=1, cycles=dict.fromkeys(few.cycles, 0))
        decode = predicted_us(work)
        return decode, decode + predicted_us(merged), splits
    return min(map(of, SPLITS), key=lambda found: found[1])


# ---- ours

class Busy(Check):
    """Which waves multiply: where splits are planned there are workgroups with nothing to do, which end at once."""

    waves: ClassVar[dict[str, list[np.ndarray]]]  # by kernel, of each batch of workgroups

    def start(self) -> None:
        self.busy = np.zeros((self.machine.count // self.machine.shape.waves, self.machine.shape.waves), bool)
        self.waves.setdefault(self.machine.kernel.name, []).append(self.busy)

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        if not b.instruction.name.startswith("v_mfma"):
            return execute
        waves = b.party.numbers.copy()

        def marked() -> object:
            self.busy.reshape(-1)[waves] = True
            return execute()
        return marked


def ours(op: str, backend: str, arch: str, heads: int, seqs: int, length: int) -> float | None:
    """Microseconds of all kernels; None where the backend declines."""
    units, make, kernel = lookup(arch).compute_units, MAKE[op], OPS[op].backends[backend]
    part, checks, busy = math.gcd(seqs, units), counting(), type("Busy", (Busy,), {"waves": {}})
    case = Case("drawn", functools.partial(make, [length] * (seqs // part), heads=heads, page_size=PAGE_SIZE))
    with platform.target(arch), mock.patch.object(platform, "compute_units", return_value=units // part):
        args = contract.draw(case, "cpu", 0)
        if kernel.supports(**args | whole_batch(args, part)):
            return None
        with (emulate if backend == "hip" else emulate_triton)(arch, (checks, busy)):
            kernel.run(**args)
    total = 0.0
    for name, usage in checks.usages.items():
        work, blocks = work_of(usage, waves_per_simd(usage)), sum(x.any(1).sum() for x in busy.waves[name])
        blocks = blocks or usage.blocks  # a merge multiplies nothing
        cycles = {unit: n * usage.blocks / blocks for unit, n in work.cycles.items()}
        total += predicted_us(dataclasses.replace(work, blocks=float(blocks * part), once=work.once * part,
                                                  lines=work.lines * part, cycles=cycles))
    return total


def whole_batch(args: dict, part: int) -> dict:
    """Queries of `part` times as many sequences, for a backend to say whether it serves them."""
    return {name: args[name].repeat(part, *[1] * (args[name].ndim - 1)) for name in ("q", "q_nope") if name in args}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, default="gfx942")
    parser.add_argument("--hsa", type=Path, help="amd-aiter's wheel, or its hsa folder")
    parser.add_argument("--op", choices=MAKE, default="mla_decode")
    parser.add_argument("--length", type=int, default=4096, help="keys of a sequence")
    options = parser.parse_args()
    arch, objects = options.arch, Objects(options.hsa, None)
    print(f"| {arch}, {options.op}, S={options.length}, us | AITER: decode | and merge (splits) | HIP | Triton |\n"
          f"|---|{'---:|' * 4}")
    of_heads = {heads: counted(objects, arch, heads) for heads in sorted({heads for heads, _ in SHAPES})}
    for heads, seqs in SHAPES:
        few, many = of_heads[heads]
        decode, merged, splits = aiters(few, many, heads, seqs, options.length)
        times = [ours(options.op, backend, arch, heads, seqs, options.length) for backend in ("hip", "triton")]
        print(f"| {heads} heads, B={seqs} | {decode:.1f} | {merged:.1f} ({splits}) | "
              + " | ".join("" if us is None else f"{us:.1f}" for us in times) + " |", flush=True)


if __name__ == "__main__":
    main()
