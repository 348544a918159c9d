"""SwiGLU: gate and up of the same columns meet in registers, so no intermediate is written.

Bound by memory: 2 d elements of a row in, d out.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import silu_and_mul
from wave64.triton_ops.gated import launch as launch_gated
from wave64.triton_ops.gated import load_gate_and_up, logistic


@triton.jit
def _silu_and_mul_kernel(y_ptr, x_ptr, x_stride, d, BLOCK: tl.constexpr):
    gate, up, offs, mask = load_gate_and_up(x_ptr, x_stride, d, BLOCK)
    y = gate * logistic(gate) * up
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@silu_and_mul.backend("triton")
def launch(x: Tensor) -> Tensor:
    return launch_gated(_silu_and_mul_kernel, x)
