"""What an operator's kernels cost on the machines they are for, from executing their machine code on the emulator.

    python -m wave64.testing.cost rms_norm 7x768-torch.bfloat16 --arch gfx942 [--backend triton]

Prints, per kernel, cycles of each unit per wave and per workgroup, LDS cycles also as they were without bank conflicts,
bytes of global memory requested, in the lines of 64 and of 128 bytes that each instruction touches, and in those that
are touched at all, barriers, waves per SIMD, and the bound: the longest of the times that the units and the memory
need, were each always busy. Kernels run one after another, so the bounds of a call's kernels add up. Next to the bound
stands how long the kernel is predicted to take (predict.py, and how far off that is), with its data in the Infinity
Cache where it fits, and cold.

No kernel that finds its data in device memory is faster than its bound, and most are slower. A kernel whose data an
earlier one, or an earlier run, left in the caches (4 MiB of L2 on each of 8 dies, 256 MiB of Infinity Cache) can be
faster than "memory" says, since it counts as read from device memory; the other units bound it all the same.
Left out are
  - waiting: for memory, for LDS, for results of the instruction before, at barriers;
  - issue: that a wave starts one instruction at a time, and a SIMD one of each kind; fetching instructions;
  - sharing: work is dealt evenly to all units that workgroups can reach, none of which waits for the last to end; that
    waves per SIMD may be too few to keep a unit busy is printed, not counted;
  - caches: what is touched comes from, or goes to, device memory once, at its peak, however often it is touched, and
    caches serve at any rate;
  - address units, atomics in L2, scratch memory, and the launch itself;
  - clocks that fall under load: 2.1 GHz (MI300X) and 2.4 GHz (MI355X) are the highest.
Where each rate comes from is said in emulator/cost.py.
"""

import argparse
import sys

from wave64 import OPS, platform
from wave64.arch import lookup
from wave64.op import Case
from wave64.testing import contract, isa, predict
from wave64.testing.emulator.cost import LINE, Usage, counting
from wave64.testing.emulator.jit import emulate_triton
from wave64.testing.emulator.run import emulate
from wave64.testing.predict import CLOCK_GHZ, SIMDS


def usages(op: str, backend: str, case: str | Case, arch: str) -> dict[str, Usage]:
    """Kernel -> what it used, of one call with the arguments of a case: one of the operator's by name, or any other.
    Raises ValueError where there is no such case, or the backend declines it."""
    kernel, checks = OPS[op].backends[backend], counting()
    with platform.target(arch):
        if isinstance(case, str):
            cases = {each.id: each for each in OPS[op].cases()}
            if case not in cases:
                raise ValueError(f"case: expected one of {', '.join(cases)}, got {case}")
            case = cases[case]
        args = contract.draw(case, "cpu", 0)
        if kernel.supports is not None and (why := kernel.supports(**args)):
            raise ValueError(f"{op}: backend {backend} declines {case.id}: {why}")
        with (emulate if backend == "hip" else emulate_triton)(arch, (checks,)):
            kernel.run(**args)
    return checks.usages


def waves_per_simd(usage: Usage) -> float:
    kernel = isa.Resources("", usage.arch, usage.vgprs, 0, usage.vgprs, usage.sgprs, 0, 0, 0, usage.lds_bytes, 0)
    return isa.waves_per_simd(kernel, usage.lds_bytes, usage.block_waves)


def times_us(usage: Usage) -> dict[str, float]:
    """Resource -> microseconds that it is needed for, on the architecture's product. Workgroups that are fewer than
    compute units, or waves than SIMDs, leave the others idle."""
    arch = lookup(usage.arch)
    clock = CLOCK_GHZ[usage.arch] * 1e3  # cycles in a microsecond
    units = min(arch.compute_units, max(1, usage.blocks))
    simds = min(SIMDS * units, max(1, usage.waves))
    cycles = usage.cycles
    return {
        "matrix": cycles["matrix"] / simds / clock,
        "vector": (cycles["vector"] + cycles["transcendental"]) / simds / clock,
        "scalar": cycles["scalar"] / simds / clock,
        "LDS": cycles["lds"] / units / clock,
        "memory": usage.once() / (arch.bandwidth_gbs * 1e3),
    }


def bounds_us(op: str, backend: str, case: str | Case, arch: str) -> dict[str, float]:
    """Kernel -> its bound in microseconds."""
    return {kernel: max(times_us(usage).values()) for kernel, usage in usages(op, backend, case, arch).items()}


def table(found: dict[str, Usage]) -> str:
    lines, total = [], 0.0
    for kernel, usage in found.items():
        waves, blocks = max(1, usage.waves), max(1, usage.blocks)
        lines.append(f"{kernel}: {usage.blocks} workgroups of {usage.block_waves} waves, {usage.vgprs} vector "
                     f"registers, {usage.lds_bytes} bytes of LDS, {waves_per_simd(usage):g} waves per SIMD")
        lines.append(f"    {'':40}{'per wave':>14}{'per workgroup':>16}")
        rows = {f"{unit} cycles": n for unit, n in usage.cycles.items()}
        rows |= {"lds cycles without conflicts": usage.conflict_free, "bytes requested": usage.requested}
        for size in (LINE, 2 * LINE):
            rows |= {f"bytes in lines of {size}, by instruction": usage.touched[size],
                     f"bytes in lines of {size}, each once": usage.once(size)}
        lines += [f"    {name:40}{n / waves:14.1f}{n / blocks:16.1f}" for name, n in rows.items()]
        lines.append(f"    {'barriers':40}{usage.barriers / waves:14.1f}{usage.barriers / waves:16.1f}")
        work = predict.work_of(usage, waves_per_simd(usage))
        warm, cold = (predict.predicted_us(work, cold) for cold in (False, True))
        parts = ", ".join(f"{name} {us:.3f}" for name, us in predict.parts_us(work, True).items())
        lines.append(f"    {'loads that depend on one another':40}{usage.chain:14}")
        lines.append(f"    predicted: {warm:.2f} us, cold {cold:.2f} us (start {predict.CONSTANTS.start:.2f}, {parts})")
        times = times_us(usage)
        limit = max(times, key=times.__getitem__)
        total += times[limit]
        lines.append(f"    bound on {lookup(usage.arch).product}: {times[limit]:.3f} us, by {limit} ("
                     + ", ".join(f"{name} {us:.3f}" for name, us in times.items()) + ")")
    if len(found) > 1:
        lines.append(f"all kernels, one after another: {total:.3f} us")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64.testing.cost", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS, metavar="OP")
    parser.add_argument("case", metavar="CASE")
    parser.add_argument("--arch", choices=CLOCK_GHZ, default="gfx942")
    parser.add_argument("--backend", choices=("hip", "triton"), help="default: hip where there is one")
    args = parser.parse_args()
    backends = OPS[args.op].backends
    backend = args.backend or ("hip" if "hip" in backends else "triton")
    if backend not in backends:
        parser.error(f"{args.op} has no {backend} kernel")
    try:
        print(table(usages(args.op, backend, args.case, args.arch)))
    except ValueError as e:
        parser.error(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
