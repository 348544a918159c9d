"""SwiGLU and quantization in one launch: the activation is stored in FP8 only.

The trick: a row that is quantized as a whole is one group, whose lanes hold all of it, so x is read once.
Bound by memory: 2 d elements of a row in, d bytes out.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import silu_and_mul_per_token_group_quant_fp8
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN
from wave64.ops.silu_and_mul_per_token_group_quant_fp8 import MAX_ROW
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


def supports(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> str | None:
    columns = x.shape[1] // 2
    return f"holds rows of at most {MAX_ROW}, this one has {columns}" if group_size == PER_TOKEN and columns > MAX_ROW \
        else None


@silu_and_mul_per_token_group_quant_fp8.backend("triton", supports=supports, absent=no_fp8)
def launch(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // 2
    group = triton.next_power_of_2(columns) if group_size == PER_TOKEN else group_size
    return launch_groups(_silu_and_mul_per_token_group_quant_fp8_kernel, x, columns, group, scale_ue8m0)
