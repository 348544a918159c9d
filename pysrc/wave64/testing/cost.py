"""What an operator's kernels cost on the machines they are for, from executing their machine code on the emulator.

    python -m wave64.testing.cost rms_norm 7x768-torch.bfloat16 --arch gfx942 [--backend triton]

Prints, per kernel, cycles of each unit per wave and per workgroup, LDS bank conflicts, bytes of global memory
requested, in lines that each instruction touches, and in lines at all, barriers, waves per SIMD, and the bound: the
longest of the times that the units and the memory need at AMD's published peaks, were each always busy. It leaves out
what instructions wait for, issue limits, cache hits beyond the first touch, and launches: no kernel is faster than its
bound, and most are slower.
"""

import argparse
import sys

from wave64 import OPS, platform
from wave64.arch import lookup
from wave64.op import Op
from wave64.testing import contract, isa
from wave64.testing.emulator.cost import MATRIX_RATES, Usage, counting
from wave64.testing.emulator.jit import emulate_triton
from wave64.testing.emulator.run import emulate

SIMDS = 4  # of a compute unit


def usages(op: Op, backend: str, case_id: str, arch: str) -> dict[str, Usage]:
    """Kernel -> what it used, of one call with the case's arguments."""
    case = next((case for case in op.cases() if case.id == case_id), None)
    if case is None:
        raise ValueError(f"case: expected one of {', '.join(case.id for case in op.cases())}, got {case_id}")
    checks = counting()
    with platform.target(arch):
        args = contract.draw(case, "cpu", 0)
        supports = op.backends[backend].supports
        if supports is not None and (why := supports(**args)):
            raise ValueError(f"{op.name}: backend {backend} declines {case_id}: {why}")
        with (emulate if backend == "hip" else emulate_triton)(arch, (checks,)):
            op.backends[backend].run(**args)
    return checks.usages


def waves_per_simd(usage: Usage) -> float:
    kernel = isa.Resources("", usage.arch, usage.vgprs, 0, usage.vgprs, 0, 0, 0, 0, usage.lds_bytes, 0)
    return isa.waves_per_simd(kernel, usage.lds_bytes, usage.block_waves)


def bounds_us(usage: Usage) -> dict[str, float]:
    """Resource -> microseconds that it is needed for, on the architecture's product. Workgroups that are fewer than
    compute units, or waves than SIMDs, leave the others idle."""
    arch = lookup(usage.arch)
    clock = arch.bf16_tflops * 1e12 / (arch.compute_units * SIMDS * MATRIX_RATES[usage.arch]["bf16"])
    units = min(arch.compute_units, max(1, usage.blocks))
    simds = min(SIMDS * arch.compute_units, max(1, usage.waves), units * SIMDS)
    cycles = usage.cycles
    seconds = {
        "matrix": cycles["matrix"] / simds / clock,
        "vector": (cycles["vector"] + cycles["transcendental"]) / simds / clock,
        "scalar": cycles["scalar"] / simds / clock,
        "LDS": cycles["lds"] / units / clock,
        "memory": usage.compulsory / (arch.bandwidth_gbs * 1e9),
    }
    return {name: 1e6 * value for name, value in seconds.items()}


def table(found: dict[str, Usage]) -> str:
    lines = []
    for kernel, usage in found.items():
        waves, blocks = max(1, usage.waves), max(1, usage.blocks)
        lines.append(f"{kernel}: {usage.blocks} workgroups of {usage.block_waves} waves, {usage.vgprs} vector "
                     f"registers, {usage.lds_bytes} bytes of LDS, {waves_per_simd(usage):g} waves per SIMD")
        lines.append(f"    {'':28}{'per wave':>14}{'per workgroup':>16}")
        rows = {f"{unit} cycles": n for unit, n in usage.cycles.items()}
        rows |= {"lds cycles without conflicts": usage.conflict_free, "bytes requested": usage.requested,
                 "bytes in lines touched": usage.touched, "bytes in lines, each once": usage.compulsory,
                 "barriers": usage.barriers}
        lines += [f"    {name:28}{n / waves:14.1f}{n / blocks:16.1f}" for name, n in rows.items()]
        bounds = bounds_us(usage)
        limit = max(bounds, key=bounds.get)
        lines.append(f"    bound on {lookup(usage.arch).product}: {bounds[limit]:.3f} us, by {limit} ("
                     + ", ".join(f"{name} {us:.3f}" for name, us in bounds.items()) + ")")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64.testing.cost", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS, metavar="OP")
    parser.add_argument("case", metavar="CASE")
    parser.add_argument("--arch", choices=MATRIX_RATES, default="gfx942")
    parser.add_argument("--backend", choices=("hip", "triton"), help="default: hip where there is one")
    args = parser.parse_args()
    op = OPS[args.op]
    backend = args.backend or ("hip" if "hip" in op.backends else "triton")
    if backend not in op.backends:
        parser.error(f"{op.name} has no {backend} kernel")
    try:
        print(table(usages(op, backend, args.case, args.arch)))
    except ValueError as e:
        parser.error(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
