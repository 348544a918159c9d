"""How long a mixture of FP8 experts of DeepSeek-V3, a rank's of 8, is predicted to take: AITER's assembly next to our
kernels.

    python tests/bench/moe_predicted.py --arch gfx942 --hsa amd_aiter-0.1.7.post2.dev18-py3-none-any.whl

Every expert gets the same number of pairs, those that get any. Of ours the emulator counts 8 of the 256 experts; of
AITER's a workgroup, which takes up to 32 pairs and is linear in the columns, of 512 and of 1024 of them; and
testing/predict.py makes times of the workgroups that there are. AITER's one launch needs its tokens quantized, the
pairs sorted and the result zeroed, by launches that are not in this wheel; so ours stands without quantizing and
sorting, whose times are given apart. What AITER's atomics take is left out. Data is cold. Without --hsa, ours alone.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

from aiter_moe import ROWS, WHOLE, whole
from aiter_objects import Objects
from aiter_work import Ours, counting, theirs
from aiter_work import Work as Piece

from wave64 import OPS, platform
from wave64.arch import EMULATED
from wave64.op import Case
from wave64.ops.fused_moe import make_case
from wave64.testing import contract
from wave64.testing.cost import waves_per_simd
from wave64.testing.emulator.cost import Usage
from wave64.testing.emulator.jit import emulate_triton
from wave64.testing.emulator.run import emulate
from wave64.testing.predict import CONSTANTS, Work, parts_us, predicted_us, work_of

EXPERTS, TOP_K, HIDDEN, INTER = 256, 8, 7168, 256
TOKENS = (1, 16, 64, 256, 1024, 4096)
COLUMNS = (512, 1024)
NEEDED_BY_BOTH = ("align", "quant")  # in names of kernels


def counted(tokens: int) -> tuple[int, int, int]:
    """(tokens, experts, how many times as many there are)"""
    few = max(1, tokens * TOP_K // EXPERTS)
    return few, TOP_K, tokens // few


def line(work: Work) -> tuple[float, str]:
    """(microseconds, the two resources that it needs most)"""
    parts = sorted(parts_us(work, True).items(), key=lambda part: -part[1])
    return predicted_us(work, True), ", ".join(f"{name} {us:.1f}" for name, us in parts[:2] if us > CONSTANTS.start / 4)


def times(usage: Usage, many: float) -> Work:
    """The launch of so many times the workgroups."""
    work = work_of(usage, waves_per_simd(usage))
    return dataclasses.replace(work, blocks=work.blocks * many, once=work.once * many, lines=work.lines * many)


def ours(backend: str, arch: str, tokens: int) -> dict[str, tuple[float, str]]:
    few, experts, many = counted(tokens)
    make = functools.partial(make_case, few, experts, TOP_K, HIDDEN, INTER, scales="block", block_shape=[128, 128])
    checks = counting()
    with platform.target(arch):
        args = contract.draw(Case("drawn", make), "cpu", 0)
        with (emulate if backend == "hip" else emulate_triton)(arch, (checks,)):
            OPS["fused_moe"].backends[backend].run(**args)
    return {name: line(times(usage, many)) for name, usage in checks.usages.items()}


def aiters(objects: Objects, arch: str, tokens: int) -> dict[str, tuple[float, str]]:
    pairs, _, _ = counted(tokens)
    found = []
    for hidden in COLUMNS:
        make = functools.partial(whole, arch, min(pairs, ROWS), hidden, INTER, 2, 2)
        piece = Piece("moe", "", WHOLE, make, 5e-2, Ours("fused_moe"))
        row = theirs(piece, objects.read(f"{arch}/{WHOLE}"), strict=False)
        assert row.error is not None
        assert row.error <= piece.allowed, f"AITER's result is {row.error:.2e} from fp64"
        [usage] = row.usages.values()
        found.append(times(usage, 1))
    few, more = found
    active = min(EXPERTS, tokens * TOP_K)
    blocks = active * -(-pairs // ROWS)

    def linear(a: float, b: float) -> float:
        return a + (b - a) * (HIDDEN - COLUMNS[0]) / (COLUMNS[1] - COLUMNS[0])

    return {"one launch": line(dataclasses.replace(
        few, blocks=blocks, once=(active * 3 * INTER + 3 * tokens) * HIDDEN, chain=linear(few.chain, more.chain),
        lines=linear(few.lines, more.lines) / few.blocks * blocks,
        cycles={unit: linear(few.cycles[unit], more.cycles[unit]) for unit in few.cycles}))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, default="gfx942")
    parser.add_argument("--hsa", type=Path, help="amd-aiter's wheel, or its hsa folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--backends", nargs="*", default=["triton", "hip"])
    options = parser.parse_args()
    kernels = {name: functools.partial(ours, name, options.arch) for name in options.backends}
    if options.hsa:
        kernels = {"AITER": functools.partial(aiters, Objects(options.hsa, None), options.arch)} | kernels
    for tokens in options.tokens:
        for who, count in kernels.items():
            found = count(tokens=tokens)
            total = sum(us for name, (us, _) in found.items() if not any(each in name for each in NEEDED_BY_BOTH))
            print(f"{options.arch}, {tokens} tokens, {who}: {total:.1f} us", flush=True)
            for name, (us, limits) in found.items():
                print(f"    {name}: {us:.1f} ({limits})", flush=True)


if __name__ == "__main__":
    main()
