from torch import Tensor

from wave64 import ops
from wave64.backends.aiter import bind, call, halves_in_rows


@bind(ops.rms_norm, {"rms_norm": ("input", "weight", "epsilon")},
      supports=lambda x, weight, eps=1e-6: halves_in_rows(x, weight))
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return call("rms_norm", input=x, weight=weight, epsilon=eps)
