import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, constants, launch
from wave64.ops.moe_align_block_size import num_blocks, outputs

CONSTANTS = constants("moe_align_block_size")
#: For more ids than these, a first launch counts them in parts.
MAX_IDS_OF_ONE_LAUNCH = 8192


def supports(topk_ids: Tensor, block_size: int, num_experts: int) -> str | None:
    if num_experts > CONSTANTS.MAX_EXPERTS:
        return f"{num_experts} experts, the kernel counts at most {CONSTANTS.MAX_EXPERTS}"
    if topk_ids.numel() > 2**28 or num_blocks(topk_ids.numel(), block_size, num_experts) * block_size > 2**31 - 2**15:
        return f"{topk_ids.numel()} ids in blocks of {block_size}, the kernel counts in 32 bits"
    return None


@bind(ops.moe_align_block_size, supports=supports)
def moe_align_block_size(topk_ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = topk_ids.numel()
    sorted_token_ids, expert_ids, num_padded = outputs(topk_ids, block_size, num_experts)
    if n:
        counts = None
        if n > MAX_IDS_OF_ONE_LAUNCH:
            counts = torch.empty((CONSTANTS.MAX_PARTS, num_experts), dtype=torch.int32, device=topk_ids.device)
        launch("moe_align_block_size", ids=topk_ids, sorted_ids=sorted_token_ids, expert_ids=expert_ids,
               num_padded=num_padded, counts=counts, num_ids=n, num_experts=num_experts, block_size=block_size,
               num_blocks=expert_ids.shape[0])
    return sorted_token_ids, expert_ids, num_padded
