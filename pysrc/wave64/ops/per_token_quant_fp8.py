"""Quantizes activations to FP8 with a scale for each token."""

import torch
from torch import Tensor

from wave64 import quant
from wave64.op import Case, Cost, op
from wave64.ops.per_token_group_quant_fp8 import agrees, inputs
from wave64.ops.per_token_group_quant_fp8 import check_x as check


def _amax_anywhere():
    """16 rows, the largest number of each in another sixteenth."""
    x = torch.randn(16, 512, dtype=torch.bfloat16)
    x[torch.arange(16), torch.arange(16) * 32] = 20
    return dict(x=x)


def cases():
    for name, draw in inputs():
        yield Case(name, lambda draw=draw: dict(x=draw()))
    yield Case("amax-anywhere", _amax_anywhere)
    yield Case("long", lambda: dict(x=torch.randn(2, 20011)))
    yield Case("long-bf16", lambda: dict(x=torch.randn(1, 28672, dtype=torch.bfloat16)))
    for tokens in (1, 128, 4096):
        yield Case(f"{tokens}x7168", lambda t=tokens: dict(x=torch.randn(t, 7168, dtype=torch.bfloat16)), large=True)
    yield Case("128x28672", lambda: dict(x=torch.randn(128, 28672, dtype=torch.bfloat16)), large=True)


def agree(args, result, exact) -> None:
    agrees(args["x"], result, exact, None)


@op(cases=cases, check=check, agree=agree, cost=lambda x: Cost(bytes=x.nbytes + x.numel() + 4 * x.shape[0]))
def per_token_quant_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows to FP8: q[t] = x[t] / scale[t], rounded to nearest even. The scale of a row is max(amax, 1e-10) /
    limit, limit the largest value of the FP8 dtype (computed as wave64/quant.py says).   (Micikevicius et al. 2022, FP8
    formats)

    x        [num_tokens, columns]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    returns  q [num_tokens, columns]  the architecture's FP8, contiguous, and scale [num_tokens, 1]  fp32
    raises   BadArgument (a ValueError) for other shapes, dtypes or strides

    Errors, NaN and infinities are those of per_token_group_quant_fp8, with the row as the group.
    """
    return quant.quantize(x, -1)
