"""The gate of a mixture of experts: the likeliest experts of every token, and their weights."""

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

#: Logits beyond it count as it, so that differences of two stay finite. Every dtype but fp16 has it.
LIMIT = 2.0**126


def broken_rows(experts):
    """NaN here and there, NaN everywhere, -inf everywhere, one that is finite, infinities, numbers that overflow, all
    alike, zeros of both signs."""
    gating = torch.randn(9, experts)
    gating[0, ::3] = torch.nan
    gating[1] = torch.nan
    gating[2:4] = -torch.inf
    gating[3, experts // 2] = -7.0
    gating[4, 1] = torch.inf
    gating[5, :3] = torch.tensor([3e38, -3e38, 3.1e38])
    gating[6] = 2.5
    gating[7] = torch.tensor([-0.0, 0.0]).repeat(experts)[:experts]
    gating[8, ::2] = -torch.inf
    return gating


def _case(name, tokens, experts, top_k, renormalize=True, dtype=torch.float32, large=False):
    return Case(name, lambda: dict(gating=torch.randn(tokens, experts).to(dtype), top_k=top_k,
                                   renormalize=renormalize), large)


def cases():
    for dtype in DTYPES:
        yield _case(f"7x60-{dtype}", 7, 60, 4, False, dtype)
        yield _case(f"3x384-{dtype}", 3, 384, 8, True, dtype)
        yield _case(f"19x8-{dtype}", 19, 8, 2, True, dtype)
    for tokens, experts, top_k in [(1, 256, 8), (5, 1, 1), (3, 8, 8), (0, 8, 2), (2, 72, 32), (4, 5, 3)]:
        yield _case(f"{tokens}x{experts}-top-{top_k}", tokens, experts, top_k)
    # more logits a lane, in the HIP kernels: 4, 16
    for dtype in DTYPES:
        yield _case(f"2x200-{dtype}", 2, 200, 6, False, dtype)
        yield _case(f"2x600-{dtype}", 2, 600, 6, True, dtype)
    yield Case("strided", lambda: dict(gating=torch.randn(5, 200)[:, 7:135], top_k=6, renormalize=True))
    # one expert far above the others, in every row another: whoever subtracts less than it overflows
    yield Case("far-above", lambda: dict(gating=100 * torch.eye(40, 60, dtype=torch.bfloat16)[:, torch.randperm(60)],
                                         top_k=1, renormalize=False))
    for renormalize in (True, False):
        yield Case(f"ties-{renormalize}", lambda r=renormalize: dict(
            gating=torch.randint(-2, 3, (6, 40)).half(), top_k=9, renormalize=r))
        yield Case(f"broken-rows-{renormalize}", lambda r=renormalize: dict(
            gating=broken_rows(33), top_k=5, renormalize=r))
    for tokens in (1, 16, 64, 256, 1024, 4096):
        yield _case(f"{tokens}x8-top-2", tokens, 8, 2, dtype=torch.bfloat16, large=True)
        yield _case(f"{tokens}x128-top-8", tokens, 128, 8, dtype=torch.bfloat16, large=True)


def check_gating(gating: Tensor, top_k: int) -> None:
    """Shared by the gates."""
    if gating.ndim != 2 or gating.shape[1] == 0 or gating.stride(1) != 1 and gating.shape[1] > 1:
        raise BadArgument("gating", "[num_tokens, num_experts] with a contiguous last dimension and an expert", gating)
    if gating.dtype not in DTYPES:
        raise BadArgument("gating", "bf16, fp16 or fp32", gating)
    if not 1 <= top_k <= gating.shape[1]:
        raise BadArgument("top_k", f"1 to {gating.shape[1]}, the number of experts", top_k)


def clean(logits: Tensor) -> Tensor:
    """Logits in at least fp32, within the limit, NaN as the lowest. Shared by the gates."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).nan_to_num(-LIMIT).clamp_(-LIMIT, LIMIT)


def largest(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, largest first; of equals the lower index. Shared by the gates."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def cost(gating, top_k, renormalize) -> Cost:
    return Cost(bytes=gating.nbytes + 8 * top_k * gating.shape[0])


@op(cases=cases, check=lambda gating, top_k, renormalize: check_gating(gating, top_k), cost=cost)
def topk_softmax(gating: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the top_k experts of each token by p = softmax(gating[t]): their probabilities, largest first, and their
    ids.
    Of equal logits the lower index comes first.   (Shazeer et al. 2017, Jiang et al. 2024)

    Logits are clamped to [-2^126, 2^126], and NaN counts as -2^126, so a row of NaN gets the first top_k experts with
    equal weights.

    gating       [num_tokens, num_experts]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    top_k        1 to num_experts
    renormalize  divide the weights by their sum
    returns      weights [num_tokens, top_k] fp32, computed in fp32; ids [num_tokens, top_k] int32
    raises       BadArgument (a ValueError) for other shapes, dtypes or strides, or top_k out of range
    """
    logits = clean(gating)
    ids = largest(logits, top_k)
    weights = logits.softmax(-1).gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32, memory_format=torch.contiguous_format)
