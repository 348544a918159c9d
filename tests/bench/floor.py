"""The floor under a call that moves so many bytes: what a kernel that only reads them takes by the same clock.

The clock counts a launch, and what overwriting the cache left in it, which is written out while a kernel reads. So the
floor of a small call is far above its bytes over the bandwidth of a long one.
"""

import functools

import torch
import triton
import triton.language as tl

from wave64 import platform
from wave64.testing import timing

#: Waves of a program, and programs for each compute unit: what was fastest at one size or another.
SHAPES = ((8, 1), (4, 2), (4, 4), (4, 8))
WORDS = 4096


@triton.jit
def _read_kernel(out_ptr, x_ptr, words, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * STEPS * BLOCK
    mixed = tl.zeros([BLOCK], tl.int32)
    # Triton's compiler iterates over what its types say cannot be; num_warps below is of the launch
    for step in tl.range(0, STEPS, loop_unroll_factor=4):  # pyright: ignore[reportGeneralTypeIssues]
        offs = start + step * BLOCK + tl.arange(0, BLOCK)
        mixed ^= tl.load(x_ptr + offs, mask=offs < words, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(mixed))


@functools.cache
def read_us(nbytes: int, device: str) -> float:
    """Microseconds that reading `nbytes` takes at least, by `timing.median_ms`."""
    x = torch.zeros(max(1, nbytes // 4), dtype=torch.int32, device=device)
    if device != "cuda":
        return timing.median_ms(x.sum, device) * 1e3
    found = []
    for num_warps, programs in SHAPES:
        steps = triton.cdiv(triton.cdiv(len(x), programs * platform.compute_units()), WORDS)
        grid = triton.cdiv(len(x), steps * WORDS)
        out = torch.empty(grid, dtype=torch.int32, device=device)
        launch = functools.partial(_read_kernel[grid,], out, x, len(x), STEPS=steps, BLOCK=WORDS,
                                   num_warps=num_warps)  # pyright: ignore[reportCallIssue]
        found.append(timing.median_ms(timing.captured(launch, device), device, repeat_ms=20))
    return min(found) * 1e3


@functools.cache
def copy_us(nbytes: int, device: str) -> float:
    """Microseconds that torch's copy takes to read half of `nbytes` and write the other half, by the same clock."""
    source = torch.zeros(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return timing.median_ms(timing.captured(lambda: target.copy_(source), device), device, repeat_ms=20) * 1e3
