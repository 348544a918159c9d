"""Quantizes activations to FP8 in groups of columns, each with a scale of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

#: What two right evaluations of x * inverse in fp32 may differ by, relative: each of three roundings is 2^-24.
SLACK = 2.0**-22


def awkward(columns: int) -> Tensor:
    """A row of zeros, of subnormal, of equal and of the largest numbers, and numbers of all sizes."""
    rows = torch.randn(6, columns) * torch.logspace(-12, 12, columns)
    rows[0] = 0.0
    rows[1] = 1e-39
    rows[2] = -3.0
    rows[3, 0] = torch.finfo(torch.float32).max
    return rows


def with_nan(columns: int) -> Tensor:
    rows = torch.randn(3, columns, dtype=torch.bfloat16)
    rows[1, columns // 2] = float("nan")
    return rows


def inputs():
    """(id, function that draws x) the inputs that every quantizer is tested with."""
    for tokens, columns in [(1, 256), (5, 384), (3, 97), (0, 128), (2, 1)]:
        for dtype in DTYPES:
            yield f"{tokens}x{columns}-{dtype}", lambda t=tokens, n=columns, d=dtype: torch.randn(t, n).mul_(3).to(d)
    yield "strided", lambda: torch.randn(6, 900, dtype=torch.bfloat16)[:, 3:515]
    yield "awkward", lambda: awkward(256)
    yield "nan", lambda: with_nan(256)


def cases():
    for name, draw in inputs():
        yield Case(name, lambda draw=draw: dict(x=draw(), group_size=128))
    for group_size in (1, 32, 64, 256, 1024):
        yield Case(f"group-{group_size}", lambda g=group_size: dict(x=torch.randn(3, 320), group_size=g))
    yield Case("ue8m0", lambda: dict(x=torch.randn(5, 320), group_size=64, scale_ue8m0=True))
    yield Case("ue8m0-awkward", lambda: dict(x=awkward(256), group_size=128, scale_ue8m0=True))
    for tokens in (1, 128, 4096):
        yield Case(f"{tokens}x7168", lambda t=tokens: dict(x=torch.randn(t, 7168, dtype=torch.bfloat16),
                                                           group_size=128), large=True)


def check_x(x):
    """Shared by the quantizers."""
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1 and x.shape[1] > 1:
        raise BadArgument("x", "[num_tokens, columns], at least one, with a contiguous last dimension", x)
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)


def check_group_size(group_size):
    if not 1 <= group_size <= 1024 or group_size & group_size - 1:
        raise BadArgument("group_size", "a power of two, at most 1024", group_size)


def check(x, group_size, scale_ue8m0=False):
    check_x(x)
    check_group_size(group_size)


def agrees(x: Tensor, result: tuple[Tensor, Tensor], exact: list[Tensor], block_shape: list[int] | None,
           slack: float = SLACK) -> None:
    """Raises AssertionError unless scales are those of `exact` within `slack`, and each number is what x / scale is
    rounded to, where rounding may go either way if that is within `slack` of a midpoint. x is in fp64."""
    (q, scale), (exact_q, exact_scale) = result, exact
    if q.shape != exact_q.shape or q.dtype != exact_q.dtype:
        raise AssertionError(f"q: expected {exact_q.dtype} {list(exact_q.shape)}, got {q.dtype} {list(q.shape)}")
    if scale.shape != exact_scale.shape or scale.dtype != torch.float32:
        raise AssertionError(f"scale: expected fp32 {list(exact_scale.shape)}, got {scale.dtype} {list(scale.shape)}")
    torch.testing.assert_close(scale.double(), exact_scale.double(), rtol=slack, atol=0.0)
    unit = quant.dequantize(torch.ones_like(x), exact_scale, block_shape, torch.float64)
    limit = quant.limit(q.dtype)
    want, got, near = (x / unit).clamp(-limit, limit), q.double(), exact_q.double()
    allowed = (near - want).abs() + slack * (1 + want.abs())
    wrong = ~((got - want).abs() <= allowed) & ~(got.isnan() & want.isnan())
    if wrong.any():
        raise AssertionError(f"{int(wrong.sum())} of {q.numel()} numbers: expected {near[wrong][:4].tolist()} or, next "
                             f"to a midpoint, a neighbor, got {got[wrong][:4].tolist()}")


def agree(args, result, exact) -> None:
    agrees(args["x"], result, exact, [1, args["group_size"]])


def cost(x, group_size, scale_ue8m0=False) -> Cost:
    return Cost(bytes=x.nbytes + x.numel() + 4 * x.shape[0] * -(-x.shape[1] // group_size))


def grouped(x: Tensor, group_size: int, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """(q [T, K], scale [T, ceil(K / group_size)]) of x [T, K] in fp32 or wider."""
    columns = x.shape[1]
    q, scale = quant.quantize(F.pad(x, (0, -columns % group_size)).unflatten(1, (-1, group_size)), -1, ue8m0=ue8m0)
    return q.flatten(1)[:, :columns].contiguous(), scale.squeeze(-1)


@op(cases=cases, check=check, cost=cost, agree=agree)
def per_token_group_quant_fp8(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize groups of columns to FP8: q[t, i] = x[t, i] / scale[t, i // group_size], rounded to nearest even. The
    scale of a group is max(amax, 1e-10) / limit, limit the largest value of the FP8 dtype (computed as wave64/quant.py
    says).   (DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2)

    x           [num_tokens, columns]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    group_size  a power of two up to 1024; the last group of a row may be shorter
    scale_ue8m0 round scales up to powers of two, stored as fp32 (DeepSeek-V3.1)
    returns     q [num_tokens, columns]  the architecture's FP8, contiguous, and
                scale [num_tokens, ceil(columns / group_size)]  fp32, contiguous
    raises      BadArgument (a ValueError) for other shapes, dtypes or group sizes

    |q * scale - x| <= 2^-4 |x| + 2^-10 scale (e4m3fnuz: 2^-11 scale), plus 2^-21 |x|: half a step of the 3 fraction
    bits, or half the smallest step. No finite value becomes NaN. NaN stays NaN and does not affect the rest of its
    group. A group with an infinity has an infinite scale and meaningless values.
    """
    return grouped(x, group_size, scale_ue8m0)
