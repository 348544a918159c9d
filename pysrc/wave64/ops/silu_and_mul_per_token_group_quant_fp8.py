"""SwiGLU, its result quantized to FP8 in groups or rows: the input of an FP8 MLP's second product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import quant
from wave64.op import Case, Cost, op
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN
from wave64.ops.per_token_group_quant_fp8 import agrees, check_group_size, grouped
from wave64.ops.rms_norm import DTYPES
from wave64.ops.silu_and_mul import check as check_x
from wave64.ops.silu_and_mul import far_below

#: Relative error of silu in fp32: that of exp, for a rounding of the argument of 2^-24 |x|, at 64.
SLACK = 2.0**-18
#: Columns of y that kernels quantize as one group; models apply the activation alone where rows are longer.
MAX_ROW = 32768


def cases():
    for tokens, d in [(1, 256), (3, 97), (0, 128), (5, 1)]:
        for dtype in DTYPES:
            yield Case(f"{tokens}x{d}-{dtype}", lambda t=tokens, n=d, dt=dtype: dict(
                x=torch.randn(t, 2 * n).mul_(3).to(dt), group_size=128))
    for group_size in (32, 64, 1024):
        yield Case(f"group-{group_size}", lambda g=group_size: dict(x=torch.randn(3, 640), group_size=g))
    yield Case("strided", lambda: dict(x=torch.randn(6, 900, dtype=torch.bfloat16)[:, 3:515], group_size=64))
    yield Case("extremes", lambda: dict(x=torch.tensor([-200.0, -88.0, -9.0, -0.0, 0.0, 9.0, 200.0, 3.0]).repeat(3, 8),
                                        group_size=32))
    yield Case("far-below", lambda: dict(x=far_below(), group_size=32))
    yield Case("ue8m0", lambda: dict(x=torch.randn(3, 256), group_size=64, scale_ue8m0=True))
    for tokens, d in [(1, 256), (3, 97), (2, 1024), (0, 128)]:
        for dtype in DTYPES:
            yield Case(f"{tokens}x{d}-{dtype}-per-token", lambda t=tokens, n=d, dt=dtype: dict(
                x=torch.randn(t, 2 * n).mul_(3).to(dt), group_size=PER_TOKEN))
    yield Case("long-per-token", lambda: dict(x=torch.randn(2, 2 * 14336, dtype=torch.bfloat16), group_size=PER_TOKEN))
    yield Case("far-below-per-token", lambda: dict(x=far_below(), group_size=PER_TOKEN))
    yield Case("ue8m0-per-token", lambda: dict(x=torch.randn(3, 256), group_size=PER_TOKEN, scale_ue8m0=True))
    for tokens in (1, 128, 4096):
        yield Case(f"{tokens}x2048", lambda t=tokens: dict(x=torch.randn(t, 4096, dtype=torch.bfloat16),
                                                           group_size=128), large=True)


def check(x, group_size, scale_ue8m0=False):
    check_x(x)
    if group_size != PER_TOKEN:
        check_group_size(group_size)


def activated(x: Tensor) -> Tensor:
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return F.silu(gate) * up


def agree(args, result, exact) -> None:
    per_token = args["group_size"] == PER_TOKEN
    agrees(activated(args["x"]), result, exact, None if per_token else [1, args["group_size"]], SLACK)


def cost(x, group_size, scale_ue8m0=False) -> Cost:
    tokens, d = x.shape[0], x.shape[1] // 2
    groups = 1 if group_size == PER_TOKEN else -(-d // group_size)
    return Cost(bytes=x.nbytes + tokens * d + 4 * tokens * groups)


@op(cases=cases, check=check, cost=cost, agree=agree)
def silu_and_mul_per_token_group_quant_fp8(x: Tensor, group_size: int,
                                           scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Apply SwiGLU, then quantize the result to FP8 in groups of columns: y = silu(x[:, :d]) * x[:, d:] in fp32, not
    rounded; q[t, i] = y[t, i] / scale[t, i // group_size], rounded to nearest even; scale = max(amax, 1e-10) / limit,
    with the amax of the group and limit the largest value of the FP8 dtype.   (Shazeer 2020; DeepSeek-AI 2024)

    x           [num_tokens, 2 * d]  bf16, fp16 or fp32: gate then up; last dim contiguous, rows may be strided
    group_size  a power of two up to 1024; the last group of a row may be shorter. Or -1: a row is one group, as
                per_token_quant_fp8 has it
    scale_ue8m0 round scales up to powers of two, stored as fp32
    returns     q [num_tokens, d]  the architecture's FP8, contiguous, and
                scale [num_tokens, ceil(d / group_size), or 1]  fp32, contiguous
    raises      BadArgument (a ValueError) for other shapes, dtypes or group sizes

    Errors, NaN and infinities of y are those of per_token_group_quant_fp8.
    """
    y = activated(x)
    return quant.quantize(y, -1, ue8m0=scale_ue8m0) if group_size == PER_TOKEN else grouped(y, group_size, scale_ue8m0)
