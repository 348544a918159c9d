"""Launch options that depend on the architecture: waves and stages of a block, and options of the compiler.

Triton's `num_warps` is the number of waves, which have 64 lanes on CDNA and 32 elsewhere.
"""

import triton
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch


def matrix_options(arch: Arch, size: int) -> dict[str, int]:
    """Triton's options for CDNA's matrix instructions with `size` rows. kpack 2: a lane reads the operands of two
    instructions, 16 bytes, from LDS at a time; gfx950's instructions take 16 bytes each and do not have the option."""
    return {"matrix_instr_nonkdim": size} | ({} if arch.name == "gfx950" else {"kpack": 2})


def num_stages(stages: int, waves: int, block_k: int, *factors: tuple[Tensor, int]) -> int:
    """`num_stages` for a loop over tiles [rows, block_k] of the given (operand [..., K], rows).

    On gfx950 Triton 3.9 loads a tile directly to LDS if every lane has at least 4 aligned bytes of it, others through
    registers. With one operand of each kind, the loop does not wait for the stores to LDS of the second before its
    barrier, and waves read stale data, as the emulator reported. Such loops are not pipelined.
    """
    arch = platform.arch()
    if arch is None or arch.name != "gfx950":
        return stages
    direct = [factor.stride(-2) % 16 == 0 and factor.shape[-1] % 16 == 0
              and rows * block_k * factor.element_size() >= 4 * 64 * waves for factor, rows in factors]
    return stages if all(direct) else 1


def num_warps(lanes: int) -> int:
    """`num_warps` for a block of at least `lanes` lanes, but at most the 1024 lanes that every GPU allows."""
    arch = platform.arch()
    wave_size = arch.wave_size if arch else 64
    return max(1, min(triton.next_power_of_2(lanes), 1024) // wave_size)
