"""GEGLU with the exact GELU: gate and up of the same columns meet in registers.

Bound by memory: 2 d values of a row in, d out; erf is the dearest of the gates, yet below that.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import gelu_and_mul
from wave64.triton_ops.gated import launch as launch_gated
from wave64.triton_ops.gated import load_gate_and_up


@triton.jit
def _gelu_and_mul_kernel(y_ptr, x_ptr, x_stride, d, BLOCK: tl.constexpr):
    gate, up, offs, mask = load_gate_and_up(x_ptr, x_stride, d, BLOCK)
    y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@gelu_and_mul.backend("triton")
def launch(x: Tensor) -> Tensor:
    return launch_gated(_gelu_and_mul_kernel, x)
