import torch
from torch import Tensor

from wave64 import ops, quant
from wave64.backends.aiter import bind, call, halves_in_rows


def supports(x: Tensor) -> str | None:
    if x.shape[-1] % 16:
        return f"takes a multiple of 16 columns, these are {x.shape[-1]}"
    return halves_in_rows(x)


# In some versions the scales of rows of 32, 64 or 128 numbers are shuffled unless it is said that they are not.
@bind(ops.per_token_quant_fp8, {"dynamic_per_token_scaled_quant": ("out", "input", "scales", "shuffle_scale?")},
      supports=supports)
def per_token_quant_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=quant.fp8_dtype(), device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    call("dynamic_per_token_scaled_quant", out=q, input=x, scales=scale, shuffle_scale=False)
    return q, scale
