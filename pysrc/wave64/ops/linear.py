"""Product of a few tokens with a weight matrix, as a decode step has it."""

import itertools

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

HALVES = (torch.bfloat16, torch.float16)


def make_case(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False, padded: int = 0) -> dict:
    """padded: columns behind those of x and weight, which are views of wider rows."""
    drawn = dict(x=torch.randn(m, k + padded, dtype=dtype)[:, :k],
                 weight=(torch.randn(n, k + padded) * max(k, 1) ** -0.5).to(dtype)[:, :k])
    return drawn | dict(bias=torch.randn(n, dtype=dtype)) if bias else drawn


def _unaligned() -> dict:
    return dict(x=torch.randn(3, 131, dtype=torch.bfloat16)[:, 1:129],
                weight=torch.randn(40, 131, dtype=torch.bfloat16)[:, 3:])


def cases():
    for dtype, (m, bias) in itertools.product(DTYPES, ((1, False), (3, True))):
        yield Case(f"{m}x48x576-{dtype}", lambda m=m, d=dtype, b=bias: make_case(m, 48, 576, d, b))
    for m in (8, 9, 16, 17, 32, 33):
        yield Case(f"{m}-tokens", lambda m=m: make_case(m, 32, 320, HALVES[m % 2]))
    yield Case("edges", lambda: make_case(5, 37, 200, bias=True))
    yield Case("short", lambda: make_case(2, 16, 8))
    yield Case("padded", lambda: make_case(4, 20, 640, padded=24))
    yield Case("odd-columns", lambda: make_case(2, 24, 97, bias=True))
    yield Case("unaligned", _unaligned)
    yield Case("no-columns", lambda: make_case(2, 24, 0, bias=True))
    yield Case("no-rows", lambda: make_case(2, 0, 64))
    yield Case("no-tokens", lambda: make_case(0, 24, 64, bias=True))
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
        for m in (1, 4, 16):
            yield Case(f"{m}x{n}x{k}", lambda m=m, n=n, k=k: make_case(m, n, k), large=True)


def check(x, weight, bias=None):
    for name, tensor, rows in (("x", x, "num_tokens"), ("weight", weight, "out_features")):
        if tensor.ndim != 2 or tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise BadArgument(name, f"[{rows}, in_features] with a contiguous last dimension", tensor)
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if weight.dtype != x.dtype:
        raise BadArgument("weight", f"dtype {x.dtype}, that of x", weight, "convert it once, at load")
    if weight.shape[1] != x.shape[1]:
        raise BadArgument("weight", f"[out_features, {x.shape[1]}], a column per column of x", weight)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise BadArgument("bias", f"contiguous {x.dtype} [{weight.shape[0]}], a number per row of weight", bias)


def cost(x, weight, bias=None) -> Cost:
    (m, k), n = x.shape, weight.shape[0]
    moved = x.numel() + weight.numel() + m * n + (0 if bias is None else n)
    return Cost(bytes=moved * x.element_size(), flops=2 * m * n * k)


@op(cases=cases, check=check, cost=cost)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias: y[t, n] = bias[n] + sum over k of x[t, k] weight[n, k], accumulated in fp32.

    Backends serve the few tokens of a decode step, where reading the weight takes all the time; the reference, which
    serves more, is torch's product.

    x        [num_tokens, in_features]    bf16, fp16 or fp32; last dim contiguous, rows may be strided
    weight   [out_features, in_features]  dtype of x; last dim contiguous, rows may be strided
    bias     [out_features]               dtype of x, or None
    returns  [num_tokens, out_features]   dtype of x, contiguous
    raises   BadArgument (a ValueError) for other dtypes, shapes or strides
    """
    return torch.nn.functional.linear(x, weight, bias)
