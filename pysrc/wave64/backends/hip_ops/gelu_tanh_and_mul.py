from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, floats_only
from wave64.backends.hip_ops.gated import launch_gated


@bind(ops.gelu_tanh_and_mul, supports=floats_only)
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    return launch_gated("gelu_tanh_and_mul", x)
