"""What launchers ask of the architecture: how many waves a block gets, and whether an operator has a kernel of its own.

Triton's `num_warps` counts waves of 64 lanes on CDNA and of 32 elsewhere.
"""

import functools
import importlib
from types import ModuleType

import triton

from wave64 import platform
from wave64.arch import Arch


def matrix_options(arch: Arch, size: int) -> dict[str, int]:
    """Triton's options for products on CDNA's matrix cores, in tiles of `size` rows. kpack 2: a lane reads the factors
    of two instructions, 16 bytes, from LDS at a time; gfx950's instructions take 16 bytes each, and no such option."""
    return {"matrix_instr_nonkdim": size} | ({} if arch.name == "gfx950" else {"kpack": 2})


def num_warps(lanes: int) -> int:
    """`num_warps` for a block of at least `lanes` lanes, within one wave and the 1024 lanes that every GPU allows."""
    arch = platform.arch()
    wave_size = arch.wave_size if arch else 64
    return max(1, min(triton.next_power_of_2(lanes), 1024) // wave_size)


def on_hopper(op: str) -> ModuleType | None:
    """The operator's kernel in hopper/; None on other machines, where Triton need not have what it is written in."""
    arch = platform.arch()
    return _hopper_kernel(op) if arch is not None and arch.matrix == "wgmma" else None


@functools.cache
def _hopper_kernel(op: str) -> ModuleType:
    return importlib.import_module(f"wave64.triton_ops.hopper.{op}")
