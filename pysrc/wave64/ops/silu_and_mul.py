"""SwiGLU: the gated activation of Llama's MLP."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES


def cases():
    """Shared by the gated activations."""
    # A row of one number is judged by that number alone, and far below zero, where it is as good as nothing, a rounding
    # of the exponential's argument shows many times over: such rows stay near zero.
    for (tokens, d, spread), dtype in itertools.product(
            [(1, 14336, 3), (3, 97, 3), (7, 2048, 3), (0, 64, 3), (5, 1, 1)], DTYPES):
        yield Case(f"{tokens}x{d}-{dtype}",
                   lambda t=tokens, n=d, s=spread, dt=dtype: dict(x=torch.randn(t, 2 * n, dtype=dt) * s))
    yield Case("strided", lambda: dict(x=torch.randn(6, 900, dtype=torch.bfloat16)[:, 3:515]))
    yield Case("extremes", lambda: dict(x=torch.tensor([-200.0, -88.0, -9.0, -0.0, 0.0, 9.0, 200.0]).repeat(3, 4)))
    yield Case("far-below", lambda: dict(x=far_below()))
    for tokens, d in [(1, 28672), (64, 14336), (64, 3584), (128, 7168), (4096, 7168), (4096, 14336)]:
        yield Case(f"{tokens}x{d}", lambda t=tokens, n=d: dict(x=torch.randn(t, 2 * n, dtype=DTYPES[0])), large=True)


def far_below():
    """Gates [3, 8] whose activation is 0, however large they are, and their ups."""
    gates = torch.tensor([-90.0, -200.0, -1e4, -1e19, -1e25, -1e37, -1e38, -3e38])
    return torch.cat([gates, torch.tensor([1.0, -2.0]).repeat(4)]).repeat(3, 1)


def check(x):
    """Shared by the gated activations."""
    if x.ndim != 2 or x.shape[1] % 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise BadArgument("x", "[num_tokens, 2 * d] with a contiguous last dimension", x)
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)


def cost(x):
    """Shared by the gated activations."""
    return Cost(bytes=x.nbytes * 3 // 2)


@op(cases=cases, check=check, cost=cost)
def silu_and_mul(x: Tensor) -> Tensor:
    """Apply SwiGLU: y = silu(x[:, :d]) * x[:, d:] with silu(a) = a / (1 + exp(-a)), computed in fp32 and rounded once.
    (Shazeer 2020, GLU variants)

    x        [num_tokens, 2 * d]  bf16, fp16 or fp32: gate then up; last dim contiguous, rows may be strided
    returns  [num_tokens, d]      dtype of x, contiguous
    raises   BadArgument (a ValueError) for other shapes, dtypes or strides
    """
    gate, up = x.chunk(2, -1)
    return F.silu(gate.to(torch.promote_types(x.dtype, torch.float32))).mul_(up).to(x.dtype)
