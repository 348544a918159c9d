"""Quantizes activations to FP8 with one scale, given or found."""

import torch
from torch import Tensor

from wave64 import quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.per_token_group_quant_fp8 import agrees, check_x, inputs


def cases():
    for name, draw in inputs():
        yield Case(name, lambda draw=draw: dict(x=draw()))
        yield Case(f"{name}-static", lambda draw=draw: dict(x=draw(), scale=torch.tensor([1.23])))
    yield Case("many", lambda: dict(x=torch.randn(150, 130)))
    yield Case("scale-0", lambda: dict(x=torch.randn(2, 64), scale=torch.zeros(1)))
    for tokens in (1, 128, 4096):
        yield Case(f"{tokens}x7168", lambda t=tokens: dict(x=torch.randn(t, 7168, dtype=torch.bfloat16)), large=True)
        yield Case(f"{tokens}x7168-static", lambda t=tokens: dict(
            x=torch.randn(t, 7168, dtype=torch.bfloat16), scale=torch.tensor([1.23])), large=True)


def check(x, scale=None):
    check_x(x)
    if scale is not None and (scale.numel() != 1 or scale.ndim > 1 or scale.dtype != torch.float32):
        raise BadArgument("scale", "one fp32 number in a tensor, [] or [1]", scale)


def agree(args, result, exact) -> None:
    agrees(args["x"], result, exact, None)


def cost(x, scale=None) -> Cost:
    return Cost(bytes=x.nbytes + x.numel())


@op(cases=cases, check=check, agree=agree, cost=cost)
def per_tensor_quant_fp8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to FP8 with one scale: q = x / scale, rounded to nearest even and saturated. Without a scale it
    is max(amax, 1e-10) / limit, limit the largest value of the FP8 dtype (computed as wave64/quant.py says).
    (Micikevicius et al. 2022, FP8 formats)

    x        [num_tokens, columns]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    scale    one fp32 value in a tensor, not negative; values below 2^-126 count as 2^-126; x is multiplied by its
             reciprocal
    returns  q [num_tokens, columns]  the architecture's FP8, contiguous, and scale [1]  fp32, computed or copied
    raises   BadArgument (a ValueError) for other shapes or dtypes

    Errors are those of per_token_group_quant_fp8, with the tensor as the group. With a given scale, values beyond
    limit * scale, infinities included, become limit, and NaN stays NaN.
    """
    dtype = quant.fp8_dtype()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        limit = quant.limit(dtype)
        inverse = scale.clamp(min=quant.MIN_SCALE).reciprocal()
        return (wide * inverse).clamp_(-limit, limit).to(dtype).contiguous(), scale.reshape(1).clone()
    # an empty tensor has the minimum amax
    amax = torch.cat([quant.largest(wide, 1)[:, 0], wide.new_full((1,), quant.MIN_AMAX)]).amax(0, keepdim=True)
    found, inverse = quant.scales(amax, dtype)
    return (wide * inverse).to(dtype).contiguous(), found
