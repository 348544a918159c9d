import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.hip import bind, constants, launch, no_matrix, no_product

CONSTANTS = constants("linear")


def supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    arch = platform.arch()
    if why := no_product(x.dtype):
        return why
    max_tokens = CONSTANTS.NVIDIA_MAX_TOKENS if arch and arch.vendor == "nvidia" else CONSTANTS.AMD_MAX_TOKENS
    if arch and arch.name == "gfx1100" and len(x) > max_tokens // 2:
        return f"serves {max_tokens // 2} tokens at most on gfx1100, where more spill registers"
    if len(x) > max_tokens:
        return f"serves {max_tokens} tokens at most"
    if x.shape[1] % 8 or any(tensor.data_ptr() % 16 or tensor.stride(0) % 8 for tensor in (x, weight)):
        return "reads 16 bytes at a time, and the rows do not begin or end at multiples of 16 bytes"
    return None


@bind(ops.linear, supports=supports, absent=no_matrix)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    num_tokens, in_features = x.shape
    out = torch.empty((num_tokens, len(weight)), dtype=x.dtype, device=x.device)
    launch("linear", x=x, weight=weight, bias=bias, out=out, x_stride=x.stride(0), weight_stride=weight.stride(0),
           num_tokens=num_tokens, in_features=in_features, out_features=len(weight), dtype=x.dtype)
    return out
