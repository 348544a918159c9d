"""Residual add, RMSNorm and quantization: the sum and the norm stay in registers.

Bound by memory: x and residual in, the residual and half of it (of 16-bit x) out. A row is normalized as
fused_add_rms_norm does it, in one dimension, and then cut into groups without leaving its lanes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import quant
from wave64.ops import fused_add_rms_norm_quant_fp8
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.quant import limits, no_fp8, scales


@triton.jit
def _fused_add_rms_norm_quant_fp8_kernel(q_ptr, scale_ptr, x_ptr, residual_ptr, weight_ptr, x_stride, residual_stride,
                                         hidden, eps, groups, LIMIT: tl.constexpr, BELOW: tl.constexpr,
                                         GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < hidden
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + offs, x, mask=mask)
    sums = x.to(tl.float32)
    y = (sums * tl.rsqrt(tl.sum(sums * sums, 0) / hidden + eps) * weight).to(x.dtype)
    y = tl.reshape(y, [BLOCK // GROUP, GROUP]).to(tl.float32)
    offs_g = tl.arange(0, BLOCK // GROUP)
    scale, inverse = scales(tl.max(tl.abs(y), 1), LIMIT, BELOW)
    tl.store(scale_ptr + row * groups + offs_g, scale, mask=offs_g < groups)
    offs_q = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(q_ptr + row * hidden + offs_q, (y * inverse[:, None]).to(q_ptr.dtype.element_ty), mask=offs_q < hidden)


@fused_add_rms_norm_quant_fp8.backend("triton", absent=no_fp8)
def launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group_size: int,
           scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    group = block if group_size == PER_TOKEN else group_size
    groups = 1 if group_size == PER_TOKEN else hidden // group_size
    q = torch.empty((tokens, hidden), dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty((tokens, groups), dtype=torch.float32, device=x.device)
    if x.numel():
        _fused_add_rms_norm_quant_fp8_kernel[(tokens,)](
            q, scale, x, residual, weight, x.stride(0), 0 if residual is None else residual.stride(0), hidden, eps,
            groups, **limits(q.dtype, scale_ue8m0), GROUP=group, BLOCK=block,
            num_warps=num_warps(block * x.element_size() // 64))
    return q, scale
