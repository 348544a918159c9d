"""FP8 product scaled in blocks: each group's sum starts anew in the matrix cores and joins the others in fp32.

The trick: a tile's columns of b share a block, so the scale of a step is one number per row of a, loaded a step ahead,
and joining costs one fused multiply-add per number. Bound as triton_ops/fp8_mm.py says.
"""


import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import fp8_block_scaled_mm
from wave64.triton_ops.fp8_mm import (
    BUCKETS,
    Config,
    announce,
    candidates,
    deal_tiles,
    facts_of,
    launch,
    pairs,
    products,
    store_tile,
    unsupported,
)
from wave64.triton_ops.geometry import on_hopper
from wave64.tuning import choose

__all__ = ["BUCKETS", "Config", "candidates", "facts", "pairs"]  # what the tuner looks for


@triton.jit(do_not_specialize=["M"])
def _fp8_block_scaled_mm_kernel(y_ptr, a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, stride_am, stride_ak, stride_bn,
                                stride_bk, bias_ptr, M, N, K, stride_a, stride_b, GROUP_N: tl.constexpr,
                                GROUP_K: tl.constexpr, SHORT: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
                                WIDE: tl.constexpr, OVERLAP: tl.constexpr, GROUP_M: tl.constexpr, XCDS: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    announce(OVERLAP)
    tile_m, tile_n = deal_tiles(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    acc = products(a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, tile_m, tile_n, M, N, K, stride_a, stride_b, stride_am,
                   stride_ak, stride_bn, stride_bk, GROUP_N, GROUP_K, SHORT, SWAP, EVEN, WIDE, BLOCK_M, BLOCK_N,
                   BLOCK_K)
    store_tile(y_ptr, acc, tile_m, tile_n, M, N, WIDE, BLOCK_M, BLOCK_N)


def facts(a: Tensor, b: Tensor, block_shape: list[int], out_dtype: torch.dtype, **others) -> dict[str, int | bool]:
    """Of a call's arguments, by their names, what the choice of a configuration depends on."""
    kernel = on_hopper("fp8_block_scaled_mm")
    hopper = kernel is not None and kernel.serves(a, b, block_shape, out_dtype)
    return facts_of(a, b, block_shape[1]) | {"hopper": hopper}


@fp8_block_scaled_mm.backend("triton", supports=lambda a, b, a_scale, b_scale, block_shape, out_dtype:
                             unsupported(a, block_shape[1]))
def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
        out_dtype: torch.dtype) -> Tensor:
    bn, bk = block_shape
    config = choose("fp8_block_scaled_mm", Config, **facts(a, b, block_shape, out_dtype))
    if config.hopper:
        out = torch.empty((len(a), len(b)), dtype=out_dtype, device=a.device)
        on_hopper("fp8_block_scaled_mm").launch(out, a, b, a_scale, b_scale, block_shape, config.group_m)
        return out
    return launch(_fp8_block_scaled_mm_kernel, a, b, (a_scale, b_scale, *a_scale.stride(), *b_scale.stride()), bk,
                  out_dtype, None, config, GROUP_N=bn, GROUP_K=bk)
