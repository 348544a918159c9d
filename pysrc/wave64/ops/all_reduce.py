"""The sum over the ranks of a group."""

import torch
from torch import Tensor

from wave64 import distributed, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

#: Bytes from which `quantize` has an effect. A smaller message takes the time of its trips, which codes do not shorten:
#: at 1 MiB eight ranks send 256 KiB over each link in two trips, some 5 us at 50 GB/s, of which 8-bit codes spare half.
QUANTIZED_FROM = 1 << 20
QUANTIZE = ("none", *quant.CODES)


def _draw(shape, dtype, quantize="none"):
    return dict(x=torch.randn(shape, dtype=dtype), group=distributed.ALONE.name, quantize=quantize)


def cases():
    """Of a rank alone, which any process is. What several ranks exchange is tests/ops/test_emulated_ranks.py's."""
    for shape in [(1, 4096), (3, 97), (5,), (0, 128)]:
        for dtype in DTYPES:
            yield Case(f"{'x'.join(map(str, shape))}-{dtype}", lambda s=shape, d=dtype: _draw(s, d))
    yield Case("on-request", lambda: _draw((64, 8192), torch.bfloat16, "int8"))


def check_group(group: str) -> None:
    """A name that is registered."""
    if group not in (known := distributed.names()):
        raise BadArgument("group", f"a registered name: {', '.join(known)}", repr(group),
                          "wave64.distributed.join() a world or partition() it first")


def check(x, group, quantize):
    if x.dtype not in DTYPES:
        raise BadArgument("x", "bf16, fp16 or fp32", x)
    if not x.is_contiguous():
        raise BadArgument("x", "a contiguous tensor", x, "pass x.contiguous()")
    check_group(group)
    if quantize not in QUANTIZE:
        raise BadArgument("quantize", f"one of {', '.join(QUANTIZE)}", repr(quantize))


def is_quantized(x: Tensor, quantize: str) -> bool:
    """Whether what a rank of several sends of x is codes."""
    return quantize != "none" and x.dtype in (torch.bfloat16, torch.float16) and x.nbytes >= QUANTIZED_FROM


@op(cases=cases, check=check, fake=lambda x, group, quantize="none": x.new_empty(x.shape),
    cost=lambda x, group, quantize="none": Cost(2 * x.nbytes))
def all_reduce(x: Tensor, group: str, quantize: str = "none") -> Tensor:
    """The sum of the ranks' x, added up in the order of the ranks in fp32 and rounded once: the same bits on every rank
    and in every run. (The reference's order is torch.distributed's.) Every rank of the group makes the same calls in
    the same order.

    On request large messages are sent as codes: each rank's x is quantized, the codes are added up in fp32, and the sum
    is quantized again. 32 consecutive elements of x (flattened) have one scale, so that 8-bit codes are 9/16 of the
    bytes of x, 4-bit ones 5/16. The result is deterministic, too. Apart from rounding it is off by at most e(x) of each
    rank, added up, plus e of the sum of their codes; with amax the largest magnitude among an element's 32, e(v) is
        "fp8"   max(|v| / 16, amax / 2^18)   the architecture's e4m3
        "int8"  amax / 251
        "int4"  amax / 13.8
    Zeros stay zeros. NaN stays NaN; a NaN or an infinity makes all of its 32 elements NaN, and no others. Messages of
    less than 1 MiB, fp32 and a rank alone stay exact.

    x         any shape, contiguous, the same on every rank; bf16, fp16 or fp32
    group     a registered name (wave64.distributed)
    quantize  "none", "fp8", "int8" or "int4", the same on every rank
    returns   shape and dtype of x
    raises    BadArgument (a ValueError) for other dtypes, strides or values, or a group that is not registered
    """
    if distributed.member(group).size == 1 or not is_quantized(x, quantize):
        return distributed.all_reduce(x, group)
    sums = distributed.all_reduce(quant.coded(x, quantize), group)
    return quant.coded(sums, quantize).to(x.dtype)
