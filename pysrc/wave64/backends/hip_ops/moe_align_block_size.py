import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch, workspace
from wave64.ops.moe_align_block_size import num_blocks

#: More ids than these are counted by a launch of its own, in up to PARTS parts (abi.h).
MOST_IDS = 8192
PARTS = 64
#: Experts that there is room for in LDS.
MOST_EXPERTS = 1024


def unsupported(topk_ids: Tensor, block_size: int, num_experts: int) -> str | None:
    if num_experts > MOST_EXPERTS:
        return f"{num_experts} experts, the kernel counts at most {MOST_EXPERTS}"
    if topk_ids.numel() > 2**28 or num_blocks(topk_ids.numel(), block_size, num_experts) * block_size > 2**31 - 2**15:
        return f"{topk_ids.numel()} ids in blocks of {block_size}, the kernel counts in 32 bits"
    return None


@bind(ops.moe_align_block_size, supports=unsupported)
def moe_align_block_size(topk_ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n, device = topk_ids.numel(), topk_ids.device
    blocks = num_blocks(n, block_size, num_experts)
    sorted_token_ids = torch.empty(blocks * block_size, dtype=torch.int32, device=device)
    expert_ids = torch.empty(blocks, dtype=torch.int32, device=device)
    if n == 0:
        return sorted_token_ids, expert_ids, torch.zeros(1, dtype=torch.int32, device=device)
    total = torch.empty(1, dtype=torch.int32, device=device)
    counts = workspace(PARTS, num_experts, dtype=torch.int32, device=device) if n > MOST_IDS else None
    launch("moe_align_block_size", topk_ids, topk_ids.data_ptr(), sorted_token_ids.data_ptr(), expert_ids.data_ptr(),
           total.data_ptr(), 0 if counts is None else counts.data_ptr(), n, num_experts, block_size, blocks)
    return sorted_token_ids, expert_ids, total
