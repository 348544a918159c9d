"""Matrix products on a CPU: weights laid out once in the blocks oneDNN reads, instead of anew in every product.

What it gains, measured with one thread of an AVX-512 Xeon on [4096, 768]: fp32 with 8 tokens 18 ms instead of 39 for
twelve of them, bf16 with 1 to 8 tokens 8.5 instead of 14. The blocked layout replaces the plain one, so the memory is
the same. These are the operators torch's own compiler calls on a CPU.
"""

import torch
from torch import Tensor, nn

from wave64.serve.layers import Embedding, Linear


def pack(model: nn.Module) -> str:
    """Repacks the weights of every Linear in `model`, which is on the CPU; a weight that an Embedding shares stays
    plain, because rows are looked up in it. Returns in words what was done, or why nothing was."""
    reason = _why_not(next(model.parameters()).dtype)
    if reason:
        return f"not packed for oneDNN: {reason}"
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    for linear in model.modules():
        if isinstance(linear, Linear):
            linear.product = _product
            if id(linear.weight) not in looked_up:
                packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, TYPICAL_TOKENS)
                linear.weight = nn.Parameter(packed, requires_grad=False)
    return "packed for oneDNN"


TYPICAL_TOKENS = 8  # rows of x that oneDNN is told to choose the layout for


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _why_not(dtype: torch.dtype) -> str | None:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch was built without it"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions it could use"
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this CPU has no float16 instructions it could use"
    return None
