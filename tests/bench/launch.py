"""What a call of each HIP operator costs its caller, in microseconds of the host: python tests/bench/launch.py

The smallest case that launches something, called again and again without waiting for the GPU. The columns:

    launch  the extension's function alone: fields checked, the kernel given to the driver (some take two)
    call    all of the backend: outputs by torch.empty, the adapter, the launch

The first row is torch's own smallest operator, by the same clock. Needs a GPU.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from wave64 import OPS
from wave64.backends import hip, probe
from wave64.testing import contract

CALLS = 500


def per_call_us(call: Callable[[], object]) -> float:
    """The quickest of ten rounds: what else runs on the machine only adds to it."""
    rounds = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS // 10):
            call()
        rounds.append(time.perf_counter() - began)
    return min(rounds) / (CALLS // 10) * 1e6


def launch_of(run: Callable[[], object]) -> tuple[Callable[[], object], object]:
    """The launch in `run`, fields and all, and what has to live as long as its outputs are used."""
    modules: list[Any] = [
        module for name, module in sys.modules.items()
        if name.startswith("wave64.backends.hip_ops.") and getattr(module, "launch", None) is hip.launch]
    noted = []

    def note(*args, **fields):
        noted.append(functools.partial(hip.launch, *args, **fields))
        hip.launch(*args, **fields)

    for module in modules:
        module.launch = note
    try:
        result = run()
    finally:
        for module in modules:
            module.launch = hip.launch
    return noted[-1], result


def smallest(op) -> dict | None:
    """The arguments of the op's smallest case whose outputs are not empty and that its kernel takes."""
    found = []
    for case in op.cases():
        args = contract.draw(case, "cuda", 0) if not case.large else {}
        supports = op.backends["hip"].supports
        size = sum(value.numel() for value in args.values() if isinstance(value, torch.Tensor))
        if size and not (supports and supports(**args)) and all(
                value.numel() for value in args.values() if isinstance(value, torch.Tensor)):
            found.append((size, args))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def main() -> int:
    if why := probe("hip", "cuda"):
        print(f"launch.py: {why}", file=sys.stderr)
        return 2
    print("| op | launch | call |\n|---|---:|---:|")
    x = torch.zeros(1, device="cuda")
    print(f"| torch's add_ | | {per_call_us(functools.partial(x.add_, x)):.2f} |", flush=True)
    for op in OPS.values():
        if "hip" in op.backends and (args := smallest(op)) is not None:
            run = functools.partial(op.backends["hip"].run, **args)
            launch, _result = launch_of(run)
            print(f"| {op.name} | {per_call_us(launch):.2f} | {per_call_us(run):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
