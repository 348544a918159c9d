"""Quantize groups of columns: a program has several whole groups, so that amax is reduced within a wave.

Bound by memory: x in, half of that (of 16-bit x) out.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import per_token_group_quant_fp8
from wave64.triton_ops.quant import group_tile, launch_groups, no_fp8, store_groups


@triton.jit(do_not_specialize=["groups"])
def _per_token_group_quant_fp8_kernel(q_ptr, scale_ptr, x_ptr, groups, x_stride, COLUMNS: tl.constexpr,
                                      GROUP: tl.constexpr, LIMIT: tl.constexpr, BELOW: tl.constexpr,
                                      WIDE: tl.constexpr, BLOCK_G: tl.constexpr):
    offs_x, offs_q, mask = group_tile(groups, x_stride, COLUMNS, GROUP, WIDE, BLOCK_G)
    x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    store_groups(q_ptr, scale_ptr, x, offs_q, mask, groups, LIMIT, BELOW, BLOCK_G)


@per_token_group_quant_fp8.backend("triton", absent=no_fp8)
def launch(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return launch_groups(_per_token_group_quant_fp8_kernel, x, x.shape[1], group_size, scale_ue8m0)
