"""How long attention of S queries on S keys is predicted to take: AITER's assembly next to our kernels.

    python tests/bench/attention_predicted.py --arch gfx950 --hsa amd_aiter-0.1.7.post2.dev18-py3-none-any.whl

The emulator counts 256 queries on 256 and on 1024 keys; what a workgroup takes is linear in its keys, so counts of
other lengths follow, and testing/predict.py makes times of them. Without --hsa, or for heads that AITER has no object
for, ours alone.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

from aiter_attention import QUERIES, fmha
from aiter_objects import Objects
from aiter_work import theirs

from wave64.arch import EMULATED
from wave64.op import Case
from wave64.ops.varlen_attention import make_case
from wave64.testing.cost import usages, waves_per_simd
from wave64.testing.predict import Work, predicted_us, work_of

KEYS = (256, 1024)


def ours(backend: str, arch: str, keys: int, dims: tuple[int, int], causal: bool) -> Work:
    draw = functools.partial(make_case, [QUERIES], [keys], heads=1, kv_heads=1, qk_dim=dims[0], v_dim=dims[1],
                             causal=causal)
    (usage,) = usages("varlen_attention", backend, Case("drawn", draw), arch).values()
    return work_of(usage, waves_per_simd(usage))


def aiters(objects: Objects, arch: str, keys: int, causal: bool) -> Work:
    work = next(each for each in fmha(arch, False)
                if f"on {keys} keys" in each.what and causal == ("causal" in each.what))
    (usage,) = theirs(work, objects.read(work.object), strict=False).usages.values()
    return work_of(usage, waves_per_simd(usage))


def of_length(counted: list[Work], length: int, heads: int, dims: tuple[int, int], causal: bool) -> Work:
    """The launch of `length` queries on as many keys, where counted is of QUERIES on KEYS each."""
    few, many = counted
    keys, tiles = (length + QUERIES) / 2 if causal else length, length // QUERIES * heads

    def linear(a: float, b: float) -> float:
        return a + (b - a) * (keys - KEYS[0]) / (KEYS[1] - KEYS[0])

    return dataclasses.replace(few, blocks=few.blocks * tiles, once=4 * length * heads * sum(dims),
                               lines=linear(few.lines, many.lines) * tiles, chain=linear(few.chain, many.chain),
                               cycles={unit: linear(few.cycles[unit], many.cycles[unit]) for unit in few.cycles})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, default="gfx942")
    parser.add_argument("--hsa", type=Path, help="amd-aiter's wheel, or its hsa folder")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dims", type=int, nargs=2, default=(128, 128), help="of queries and keys, and of values")
    options = parser.parse_args()
    dims = tuple(options.dims)
    kernels = {name: functools.partial(ours, name, options.arch, dims=dims) for name in ("triton", "hip")}
    if options.hsa and dims == (128, 128):
        kernels = {"AITER": functools.partial(aiters, Objects(options.hsa, None), options.arch)} | kernels
    print(f"| {options.arch}, {options.heads} heads, us | {' | '.join(kernels)} |\n|---|{'---:|' * len(kernels)}")
    for causal in (False, True):
        counted = {name: [count(keys=keys, causal=causal) for keys in KEYS] for name, count in kernels.items()}
        for length in (1024, 4096, 16384):
            times = [predicted_us(of_length(each, length, options.heads, dims, causal)) for each in counted.values()]
            print(f"| {'causal, ' if causal else ''}S={length} | {' | '.join(f'{us:.1f}' for us in times)} |")


if __name__ == "__main__":
    main()
