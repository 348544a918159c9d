"""What launchers ask of the architecture: how many waves and stages a block gets, and options of its compiler.

Triton's `num_warps` counts waves of 64 lanes on CDNA and of 32 elsewhere.
"""

import triton
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch


def matrix_options(arch: Arch, size: int) -> dict[str, int]:
    """Triton's options for products on CDNA's matrix cores, in tiles of `size` rows. kpack 2: a lane reads the factors
    of two instructions, 16 bytes, from LDS at a time; gfx950's instructions take 16 bytes each, and no such option."""
    return {"matrix_instr_nonkdim": size} | ({} if arch.name == "gfx950" else {"kpack": 2})


def num_stages(stages: int, waves: int, block_k: int, *factors: tuple[Tensor, int]) -> int:
    """`num_stages` for a loop over tiles of [rows, block_k] of these (factor [..., K], rows).

    On gfx950 Triton 3.9 loads a tile straight to LDS where every lane has 4 aligned bytes or more of it, others through
    registers. With one factor each way the loop comes to its barrier before the latter's stores to LDS were waited for:
    the emulator saw waves read what was not there yet. Such loops are not pipelined.
    """
    arch = platform.arch()
    if arch is None or arch.name != "gfx950":
        return stages
    straight = [factor.stride(-2) % 16 == 0 and factor.shape[-1] % 16 == 0
                and rows * block_k * factor.element_size() >= 4 * 64 * waves for factor, rows in factors]
    return stages if all(straight) else 1


def num_warps(lanes: int) -> int:
    """`num_warps` for a block of at least `lanes` lanes, within one wave and the 1024 lanes that every GPU allows."""
    arch = platform.arch()
    wave_size = arch.wave_size if arch else 64
    return max(1, min(triton.next_power_of_2(lanes), 1024) // wave_size)
