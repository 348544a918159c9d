"""FP8 GEMM with scales per tensor, token or output channel: scales and bias are applied once, after the loop.

Bound as fp8_mm.py says. Hopper's matrix cores accumulate with 14 bits, so there sums are added in fp32 every 128
columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import fp8_scaled_mm
from wave64.triton_ops.fp8_mm import (
    key_of,
    launch,
    launch_merge_early,
    products,
    store_tile,
    tile_of_program,
    tuning_of,
    unsupported,
)


@triton.jit
def _scale(ptr, offs, size, EACH: tl.constexpr):
    """Scales at offs if EACH row has one, else the only scale."""
    return tl.load(ptr + offs, mask=offs < size, other=0.0) if EACH else tl.load(ptr)


@triton.jit(do_not_specialize=["M"])
def _fp8_scaled_mm_kernel(y_ptr, a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N, K, stride_a, stride_b,
                          EACH_M: tl.constexpr, EACH_N: tl.constexpr, SHORT: tl.constexpr, SWAP: tl.constexpr,
                          EVEN: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr, GROUP_M: tl.constexpr,
                          XCDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    launch_merge_early(OVERLAP)
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    y = products(a_ptr, b_ptr, None, None, tile_m, tile_n, M, N, K, stride_a, stride_b, 0, 0, 0, 0, 0, 0, SHORT, SWAP,
                 EVEN, WIDE, BLOCK_M, BLOCK_N, BLOCK_K)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    y *= _scale(a_scale_ptr, offs_m, M, EACH_M) * _scale(b_scale_ptr, offs_n, N, EACH_N)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    store_tile(y_ptr, y, tile_m, tile_n, M, N, WIDE, BLOCK_M, BLOCK_N)


def key(a: Tensor, b: Tensor, **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    return key_of(a, b, 0)


TUNING = tuning_of("fp8_scaled_mm", key)


@fp8_scaled_mm.backend("triton", tuning=TUNING, supports=lambda a, *args, **kwargs: unsupported(a))
def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype,
        bias: Tensor | None = None) -> Tensor:
    return launch(_fp8_scaled_mm_kernel, a, b, (a_scale.contiguous(), b_scale.contiguous()), 0, out_dtype, bias,
                  TUNING.choose(**key(a, b)), EACH_M=a_scale.ndim == 2, EACH_N=b_scale.numel() > 1)
