"""How fast the emulator is: wave instructions a second of one core, for rms_norm's HIP kernel with 64 waves in step.

    python tests/bench/emulator.py [--arch gfx950]

With its checks and without, the best of some runs, in seconds of this process; the first run, which decodes and binds
the instructions, is apart.
"""

import argparse
import time

import torch

from wave64 import OPS, platform
from wave64.testing.emulator import emulate
from wave64.testing.emulator.checks import ALL

ROWS, HIDDEN, RUNS = 16, 7168, 20  # 16 workgroups of 4 waves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("gfx942", "gfx950"), default="gfx942")
    arch = parser.parse_args().arch
    op, x, weight = OPS["rms_norm"], torch.randn(ROWS, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16()
    for checks in ((), ALL):
        seconds = []
        for _ in range(RUNS):
            with platform.target(arch):
                began = time.process_time()
                with emulate(arch, checks) as ran:
                    out = op.backends["hip"].run(x, weight, 1e-6)
                seconds.append(time.process_time() - began)
            assert torch.allclose(out.float(), op.reference(x, weight, 1e-6).float(), atol=0.05, rtol=0.02)
        print(f"{arch}, {ran.waves} waves, {len(checks)} checks: {ran.instructions:,} wave instructions, "
              f"first run {seconds[0]:.3f} s, then {min(seconds):.4f} s: "
              f"{ran.instructions / min(seconds) / 1e6:.1f} million a second")


if __name__ == "__main__":
    main()
