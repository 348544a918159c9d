import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.hip import bind, launch
from wave64.backends.hip_ops.topk_softmax import CONSTANTS


def supports(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
             scoring_func: str = "softmax", correction_bias: Tensor | None = None,
             routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> str | None:
    arch = platform.arch()
    assert arch is not None, "there is a GPU, or a target"
    lanes, groups = arch.wave_size, num_expert_group if topk_group < num_expert_group else 1
    if groups > lanes:
        return f"{groups} groups, a wave ranks at most {lanes}"
    capacity = (1 << (lanes // groups).bit_length() - 1) * CONSTANTS.MAX_SLOTS
    if gating.shape[1] > capacity * groups:
        return f"{gating.shape[1]} experts in {groups} groups, a wave holds {capacity} of each"
    if top_k + num_fused_shared_experts > lanes:
        return f"{top_k + num_fused_shared_experts} experts a token, a wave chooses at most {lanes}"
    return None


@bind(ops.grouped_topk, supports=supports)
def grouped_topk(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
                 scoring_func: str = "softmax", correction_bias: Tensor | None = None,
                 routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    shape = gating.shape[0], top_k + num_fused_shared_experts
    weights = torch.empty(shape, dtype=torch.float32, device=gating.device)
    ids = torch.empty(shape, dtype=torch.int32, device=gating.device)
    launch("grouped_topk", gating=gating, bias=correction_bias, weights=weights, ids=ids,
           gating_stride=gating.stride(0), num_tokens=gating.shape[0], num_experts=gating.shape[1], top_k=top_k,
           num_groups=num_expert_group, topk_group=topk_group, num_shared=num_fused_shared_experts,
           renormalize=renormalize, sigmoid=scoring_func == "sigmoid", factor=routed_scaling_factor,
           dtype=gating.dtype)
    return weights, ids
