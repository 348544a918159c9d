"""How fast the emulator is on one core, with all its checks: wave instructions and multiply-adds a second.

    python tests/bench/emulator.py [--arch gfx950] [--op mla_decode_rope]

Triton kernels of some operators, on problems whose waves fill the machine, executed by the core in C and by NumPy:
the first time, which decodes the instructions and has the checks look at each step, and the best of some runs after it.
Seconds are of this process, and of executing alone, without compiling and the launchers. Results are held to the
reference before anything is printed. Then loops of a matrix instruction alone.
"""

import argparse
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wave64 import OPS, platform
from wave64.ops.fp8_block_scaled_mm import make_case as make_block_product
from wave64.ops.fused_moe import make_case as make_experts
from wave64.ops.mla_decode_rope import make_case as make_latents
from wave64.ops.paged_attention import make_case as make_decode
from wave64.ops.prefill_attention import make_prefill
from wave64.testing.emulator import jit
from wave64.testing.emulator.run import Counts

HALF = torch.bfloat16
PROBLEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "paged_attention": functools.partial(make_decode, [1500, 1024, 700, 2000], heads=16, kv_heads=4, head_dim=128,
                                         page_size=16, dtype=HALF),
    "mla_decode_rope": functools.partial(make_latents, [1500, 700], heads=16, page_size=64, dtype=HALF),
    "fused_moe": functools.partial(make_experts, 64, experts=8, hidden=1024, inter=256, top_k=2, dtype=HALF, scales="",
                                   block_shape=None),
    "fp8_block_scaled_mm": functools.partial(make_block_product, 128, 512, 1024, out_dtype=HALF,
                                             block_shape=[128, 128]),
    "prefill_attention": functools.partial(make_prefill, [200, 100], [600, 100], heads=8, kv_heads=2, head_dim=128,
                                           dtype=HALF),
}
RUNS = {"numpy": 2, "c": 10}
MATRICES = {"v_mfma_f32_16x16x16_bf16": 4, "v_mfma_f32_32x32x8_bf16": 16, "v_mfma_f32_32x32x16_fp8_fp8": 16}
TURNS = {"numpy": 5, "c": 100}
_SHAPE = re.compile(r"v_mfma\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_")


def multiply_adds(counts: Counts) -> int:
    """Of its matrix instructions."""
    return sum(count * int(m[1]) * int(m[2]) * int(m[3]) * int(m[4] or 1)
               for name, count in counts.by_name.items() if (m := _SHAPE.match(name)))


def measure(op: str, arch: str, core: str) -> tuple[Counts, list[float]]:
    """What was executed, and seconds of each run."""
    seconds, execute = [], jit.execute

    def timed(*args: Any) -> Counts:
        began = time.process_time()
        try:
            return execute(*args)
        finally:
            seconds[-1] += time.process_time() - began

    torch.manual_seed(0)
    args = PROBLEMS[op]()
    jit.execute = timed
    try:
        for _ in range(RUNS[core]):
            given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in args.items()}
            seconds.append(0.0)
            with jit.emulate_triton(arch, core=core) as ran:
                out = OPS[op].backends["triton"].run(**given)
    finally:
        jit.execute = execute
    want = OPS[op].reference(**args)
    got, want = (x[0] if isinstance(x, tuple) else x for x in (out, want))
    assert torch.allclose(got.float(), want.float(), atol=0.02 * float(want.float().abs().max()), rtol=0.05), op
    return ran, seconds


def matrix_alone(name: str, registers: int, core: str) -> tuple[Counts, list[float]]:
    """A loop of a matrix instruction of gfx942 whose result, and addend, are so many registers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "gfx942"))
    from assembled import assemble, run

    ones = "".join(f"v_mov_b32_e32 v{i}, 1.0\n" for i in range(8, 12 + registers))
    result = f"v[12:{11 + registers}]"
    loop = 4 * f"{name} {result}, v[8:9], v[10:11], {result}\ns_nop 15\ns_nop 15\n"
    body = f"{ones}s_movk_i32 s4, {TURNS[core]}\ns_nop 7\nagain:\n{loop}s_sub_i32 s4, s4, 1\ns_cmp_lg_u32 s4, 0\n"
    code = assemble("gfx942", (("loop", body + "s_cbranch_scc1 again\n"),))
    unused, seconds = np.zeros(64, np.uint32), []
    for _ in range(RUNS[core]):
        began = time.process_time()
        ran = run(code, "loop", unused, unused, grid=(64, 1), core=core)
        seconds.append(time.process_time() - began)
    return ran, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("gfx942", "gfx950"), default="gfx942")
    parser.add_argument("--op", choices=PROBLEMS, action="append", help="default: all of them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.arch:28} {'core':6} {'waves':>6} {'instructions':>12} {'first run':>10} {'then':>9} {'million/s':>9} "
          f"{'G multiply-adds/s':>17}")
    whats = {op: functools.partial(measure, op, args.arch) for op in args.op or PROBLEMS}
    whats |= {} if args.op else {name: functools.partial(matrix_alone, name, registers)
                                 for name, registers in MATRICES.items()}
    for what, measured in whats.items():
        for core in RUNS:
            with platform.target(args.arch):
                ran, seconds = measured(core)
            best = min(seconds[1:])
            print(f"{what:28} {core:6} {ran.waves:6} {ran.instructions:12,} {seconds[0]:8.3f} s {best:7.4f} s "
                  f"{ran.instructions / best / 1e6:9.2f} {multiply_adds(ran) / best / 1e9:17.2f}", flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
