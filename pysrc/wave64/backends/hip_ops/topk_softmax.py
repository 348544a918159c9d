import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.hip import bind, constants, launch

CONSTANTS = constants("topk_softmax")


def supports(gating: Tensor, top_k: int, renormalize: bool) -> str | None:
    arch = platform.arch()
    assert arch is not None, "there is a GPU, or a target"
    lanes = arch.wave_size
    if gating.shape[1] > CONSTANTS.MAX_SLOTS * lanes:
        return f"{gating.shape[1]} experts, a wave holds {CONSTANTS.MAX_SLOTS * lanes}"
    return f"top_k {top_k}, a wave chooses at most {lanes}" if top_k > lanes else None


@bind(ops.topk_softmax, supports=supports)
def topk_softmax(gating: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = gating.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=gating.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=gating.device)
    launch("topk_softmax", gating=gating, weights=weights, ids=ids, gating_stride=gating.stride(0),
           num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, renormalize=renormalize, dtype=gating.dtype)
    return weights, ids
