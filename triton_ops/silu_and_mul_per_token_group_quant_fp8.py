"""SwiGLU and quantization in one launch: the activation is stored in FP8 only.

Bound by memory: 2 d elements of a row in, d bytes out.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import silu_and_mul_per_token_group_quant_fp8
from wave64.triton_ops.gated import logistic
from wave64.triton_ops.quant import group_tile, launch_groups, no_fp8, store_groups


@triton.jit(do_not_specialize=["groups"])
def _silu_and_mul_per_token_group_quant_fp8_kernel(q_ptr, scale_ptr, x_ptr, groups, x_stride, COLUMNS: tl.constexpr,
                                                   GROUP: tl.constexpr, LIMIT: tl.constexpr, BELOW: tl.constexpr,
                                                   WIDE: tl.constexpr, BLOCK_G: tl.constexpr):
    offs_x, offs_q, mask = group_tile(groups, x_stride, COLUMNS, GROUP, WIDE, BLOCK_G)
    gate = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + COLUMNS + offs_x, mask=mask, other=0.0).to(tl.float32)
    store_groups(q_ptr, scale_ptr, gate * logistic(gate) * up, offs_q, mask, groups, LIMIT, BELOW, BLOCK_G)


@silu_and_mul_per_token_group_quant_fp8.backend("triton", absent=no_fp8)
def launch(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return launch_groups(_silu_and_mul_per_token_group_quant_fp8_kernel, x, x.shape[1] // 2, group_size, scale_ue8m0)
