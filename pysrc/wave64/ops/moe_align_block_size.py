"""Sorts pairs of tokens and experts by expert, in whole blocks: what a block of a grouped GEMM works on."""

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op

#: More than any model has; counts of all of them are held.
MAX_EXPERTS = 1 << 16


def _draw(tokens, top_k, experts, block_size, dropped=0.0):
    """Distinct experts per token, as a gate chooses them; a fraction of ids -1 or out of range."""
    ids = torch.rand(tokens, experts).topk(top_k).indices
    outside = torch.tensor([-1, experts, -2**31, 2**31 - 1])[torch.randint(4, ids.shape)]
    ids = torch.where(torch.rand(ids.shape) < dropped, outside, ids)
    return dict(topk_ids=ids.to(torch.int32), block_size=block_size, num_experts=experts)


def cases():
    drawn = [(1, 8, 64, 16), (7, 6, 60, 16), (16, 8, 40, 64), (33, 2, 8, 128), (5, 1, 1, 16), (0, 2, 8, 16),
             (3, 4, 72, 1), (9, 3, 5, 7), (300, 2, 3, 32)]
    for tokens, top_k, experts, block_size in drawn:
        yield Case(f"{tokens}x{top_k}-of-{experts}-by-{block_size}",
                   lambda t=tokens, k=top_k, e=experts, b=block_size: _draw(t, k, e, b))
    yield Case("dropped", lambda: _draw(40, 4, 20, 8, dropped=0.5))
    yield Case("all-dropped", lambda: _draw(9, 4, 20, 8, dropped=1.0))
    yield Case("no-columns", lambda: _draw(4, 0, 8, 16))
    yield Case("one-expert-takes-all", lambda: _draw(70, 1, 9, 16) | dict(
        topk_ids=torch.full((70, 1), 5, dtype=torch.int32)))
    yield Case("whole-blocks", lambda: dict(topk_ids=torch.arange(4, dtype=torch.int32).repeat(16, 1), block_size=16,
                                            num_experts=4))
    yield Case("several-launches", lambda: _draw(33000, 1, 2, 64))
    for tokens in (1, 16, 64, 256, 1024, 4096):
        for block_size in (16, 64, 128):
            yield Case(f"{tokens}x8-of-256-by-{block_size}", lambda t=tokens, b=block_size: _draw(t, 8, 256, b),
                       large=True)
    yield Case("32768x8-of-256-by-128", lambda: _draw(32768, 8, 256, 128), large=True)
    yield Case("4096x2-of-8-by-128", lambda: _draw(4096, 2, 8, 128), large=True)


def check(topk_ids, block_size, num_experts):
    if topk_ids.ndim != 2 or topk_ids.dtype != torch.int32 or not topk_ids.is_contiguous():
        raise BadArgument("topk_ids", "contiguous int32 [num_tokens, top_k]", topk_ids)
    if block_size < 1:
        raise BadArgument("block_size", "at least 1", block_size)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise BadArgument("num_experts", f"1 to {MAX_EXPERTS}", num_experts)
    if num_blocks(topk_ids.numel(), block_size, num_experts) * block_size >= 2**31:
        raise BadArgument("block_size", f"{topk_ids.numel()} ids padded to fewer than 2^31", block_size)


def num_blocks(num_ids: int, block_size: int, num_experts: int) -> int:
    """The maximum number of blocks for so many ids: every expert that occurs has one id in its last block."""
    return -(-(num_ids + min(num_ids, num_experts) * (block_size - 1)) // block_size)


def outputs(topk_ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three results, allocated for a kernel to write; of no ids, nothing is left to write."""
    blocks, device = num_blocks(topk_ids.numel(), block_size, num_experts), topk_ids.device
    empty = torch.empty if topk_ids.numel() else torch.zeros
    return (torch.empty(blocks * block_size, dtype=torch.int32, device=device),
            torch.empty(blocks, dtype=torch.int32, device=device), empty(1, dtype=torch.int32, device=device))


def cost(topk_ids, block_size, num_experts) -> Cost:
    blocks = num_blocks(topk_ids.numel(), block_size, num_experts)
    return Cost(bytes=topk_ids.nbytes + 4 * (blocks * block_size + blocks + 1))


@op(cases=cases, check=check, cost=cost)
def moe_align_block_size(topk_ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, expert) pairs by expert, and pad the run of each expert to whole blocks. A pair is an index into
    the flattened topk_ids; pairs of an expert keep their order. Padding, also after the last run, is the invalid index
    num_tokens * top_k. An expert without tokens has no block. Ids outside [0, num_experts), such as those of another
    rank's experts, are left out.   (vLLM's and SGLang's operator of this name; Gale et al. 2022)

    topk_ids     [num_tokens, top_k]  int32, contiguous
    block_size   at least 1
    num_experts  at least 1
    returns      sorted_token_ids int32 [blocks * block_size], blocks = ceil((n + min(n, num_experts) *
                 (block_size - 1)) / block_size) of n = num_tokens * top_k; expert_ids int32 [blocks], each block's
                 expert, -1 after the last; num_tokens_post_padded int32 [1], the length of all runs with padding
    raises       BadArgument (a ValueError) for other arguments
    """
    ids, n = topk_ids.flatten(), topk_ids.numel()
    blocks = num_blocks(n, block_size, num_experts)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long()
    expert, order = ids.sort(stable=True)
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, ids.new_ones(n))
    taken = -(-count // block_size) * block_size
    taken[num_experts] = 0
    end = taken.cumsum(0)
    shift = end - taken - (count.cumsum(0) - count)
    # those left out go to one element behind the last, which is cut off
    target = torch.where(expert < num_experts, torch.arange(n, device=ids.device) + shift[expert], blocks * block_size)
    padded = torch.full((blocks * block_size + 1,), n, dtype=torch.int32, device=ids.device)
    sorted_token_ids = padded.scatter_(0, target, order.to(torch.int32))[:-1].clone()
    starts = torch.arange(blocks, device=ids.device) * block_size
    of_block = torch.searchsorted(end[:num_experts], starts, right=True)
    expert_ids = torch.where(of_block < num_experts, of_block, -1).to(torch.int32)
    return sorted_token_ids, expert_ids, end[num_experts:].to(torch.int32)
