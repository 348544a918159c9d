"""How many waves a block gets: Triton's `num_warps` counts waves of 64 lanes on CDNA and of 32 elsewhere."""

import triton

from wave64 import platform


def num_warps(lanes: int) -> int:
    """`num_warps` for a block of at least `lanes` lanes, within one wave and the 1024 lanes that every GPU allows."""
    arch = platform.arch()
    wave_size = arch.wave_size if arch else 64
    return max(1, min(triton.next_power_of_2(lanes), 1024) // wave_size)
