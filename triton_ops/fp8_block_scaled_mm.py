"""FP8 GEMM with block scales: the matrix cores sum one group of K at a time, and its scaled sum is added in fp32.

The trick: all columns of a tile are in one block of b, so a step has one scale per row of a, loaded a step ahead, and
scaling costs one fused multiply-add per element. Bound as fp8_mm.py says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import fp8_block_scaled_mm
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


@triton.jit(do_not_specialize=["M"])
def _fp8_block_scaled_mm_kernel(y_ptr, a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, stride_am, stride_ak, stride_bn,
                                stride_bk, bias_ptr, M, N, K, stride_a, stride_b, GROUP_N: tl.constexpr,
                                GROUP_K: tl.constexpr, SHORT: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
                                WIDE: tl.constexpr, OVERLAP: tl.constexpr, GROUP_M: tl.constexpr, XCDS: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    launch_merge_early(OVERLAP)
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    acc = products(a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, tile_m, tile_n, M, N, K, stride_a, stride_b, stride_am,
                   stride_ak, stride_bn, stride_bk, GROUP_N, GROUP_K, SHORT, SWAP, EVEN, WIDE, BLOCK_M, BLOCK_N,
                   BLOCK_K)
    store_tile(y_ptr, acc, tile_m, tile_n, M, N, WIDE, BLOCK_M, BLOCK_N)


def key(a: Tensor, b: Tensor, block_shape: list[int], **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    return key_of(a, b, block_shape[1])


TUNING = tuning_of("fp8_block_scaled_mm", key)


@fp8_block_scaled_mm.backend("triton", tuning=TUNING, supports=lambda a, b, a_scale, b_scale, block_shape, out_dtype:
                             unsupported(a, block_shape[1]))
def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
        out_dtype: torch.dtype) -> Tensor:
    bn, bk = block_shape
    return launch(_fp8_block_scaled_mm_kernel, a, b, (a_scale, b_scale, *a_scale.stride(), *b_scale.stride()), bk,
                  out_dtype, None, TUNING.choose(**key(a, b, block_shape)), GROUP_N=bn, GROUP_K=bk)
