"""GEGLU with the tanh form of GELU: (1 + tanh(u)) / 2 is the logistic function of 2 u, which takes one exponential.

Bound by memory: 2 d elements of a row in, d out.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import gelu_tanh_and_mul
from wave64.triton_ops.gated import launch as launch_gated
from wave64.triton_ops.gated import load_gate_and_up, logistic


@triton.jit
def _gelu_tanh_and_mul_kernel(y_ptr, x_ptr, x_stride, d, BLOCK: tl.constexpr):
    gate, up, offs, mask = load_gate_and_up(x_ptr, x_stride, d, BLOCK)
    u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    y = gate * logistic(2.0 * u) * up
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@gelu_tanh_and_mul.backend("triton")
def launch(x: Tensor) -> Tensor:
    return launch_gated(_gelu_tanh_and_mul_kernel, x)
