"""The sum over the ranks of a group, residual add, root mean square normalization and quantization in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import distributed, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.fused_all_reduce_rms_norm import check as check_norm
from wave64.ops.per_token_group_quant_fp8 import grouped

GROUP_SIZES = (32, 64, 128)


def _draw(tokens, hidden, dtype, group_size):
    return dict(x=torch.randn(tokens, hidden, dtype=dtype), residual=torch.randn(tokens, hidden, dtype=dtype),
                weight=torch.randn(hidden, dtype=dtype), eps=1e-5, group_size=group_size, group=distributed.ALONE.name)


def cases():
    """Of a rank alone, which any process is. What several ranks exchange is tests/ops/test_emulated_ranks.py's."""
    for tokens, hidden, dtype, size in [(1, 4096, torch.bfloat16, 128), (5, 96, torch.float16, 32),
                                        (3, 320, torch.float32, 64), (0, 128, torch.bfloat16, 128)]:
        yield Case(f"{tokens}x{hidden}-{dtype}", lambda t=tokens, h=hidden, d=dtype, s=size: _draw(t, h, d, s))


def check(x, residual, weight, eps, group_size, group):
    check_norm(x, residual, weight, eps, group)
    if group_size not in GROUP_SIZES or x.shape[1] % group_size:
        raise BadArgument("group_size", f"32, 64 or 128, a divisor of {x.shape[1]}, the columns of x", group_size)


def agree(args, result, exact) -> None:
    """Each number within the half step of FP8, 2^-4, of the exact one; the residual, and so the norm, may have been
    rounded to x's dtype before, by 2^-8 of bf16 each."""
    (q, scale), size = result, args["group_size"]
    normed = F.rms_norm(args["residual"], args["weight"].shape, args["weight"], args["eps"])
    got = quant.dequantize(q, scale, [1, size], torch.float64)
    amax = normed.abs().unflatten(1, (-1, size)).amax(-1).repeat_interleave(size, 1)
    wrong = ~((got - normed).abs() <= normed.abs() / 16 + amax / 64 + 1e-6)
    if wrong.any():
        raise AssertionError(f"{int(wrong.sum())} of {q.numel()} numbers: expected about {normed[wrong][:4].tolist()}, "
                             f"got {got[wrong][:4].tolist()}")


def fake(x, residual, weight, eps, group_size, group):
    return x.new_empty(x.shape, dtype=quant.fp8_dtype()), x.new_empty(
        x.shape[0], x.shape[1] // group_size, dtype=torch.float32)


@op(cases=cases, check=check, mutates=("residual",), agree=agree, fake=fake,
    cost=lambda x, residual, weight, eps, group_size, group: Cost(
        3 * x.nbytes + x.numel() + 4 * x.numel() // group_size + weight.nbytes))
def fused_all_reduce_rms_norm_quant_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_size: int,
                                        group: str) -> tuple[Tensor, Tensor]:
    """What an FP8 product takes behind a sum over ranks: residual += all_reduce(x), in place, rounded to its dtype;
    returns per_token_group_quant_fp8(rms_norm(residual), group_size), of the norm as it is rounded to the dtype of x:
    the same bits as fused_all_reduce_rms_norm and per_token_group_quant_fp8 one after another. Every rank of the group
    makes the same calls in the same order.

    x           [num_tokens, hidden], contiguous; bf16, fp16 or fp32
    residual    [num_tokens, hidden], contiguous, dtype of x, the same on every rank; written
    weight      [hidden], dtype of x
    group_size  32, 64 or 128; divides hidden
    group       a registered name (wave64.distributed)
    returns     q [num_tokens, hidden]  the architecture's FP8, contiguous, and
                scale [num_tokens, hidden / group_size]  fp32, contiguous
    raises      BadArgument (a ValueError) for other shapes, dtypes or strides, or a group that is not registered
    """
    residual.add_(distributed.all_reduce(x, group))
    normed = F.rms_norm(residual, weight.shape, weight, eps)
    return grouped(normed.to(torch.promote_types(x.dtype, torch.float32)), group_size)
