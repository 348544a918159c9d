import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.hip import DTYPES, bind, launch
from wave64.backends.hip_ops.topk_softmax import SLOTS


def unsupported(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
                scoring_func: str = "softmax", correction_bias: Tensor | None = None,
                routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> str | None:
    lanes, groups = platform.arch().wave_size, num_expert_group if topk_group < num_expert_group else 1
    if groups > lanes:
        return f"{groups} groups, a wave ranks at most {lanes}"
    held = (1 << (lanes // groups).bit_length() - 1) * SLOTS
    if gating.shape[1] > held * groups:
        return f"{gating.shape[1]} experts in {groups} groups, a wave holds {held} of each"
    if top_k + num_fused_shared_experts > lanes:
        return f"{top_k + num_fused_shared_experts} experts a token, a wave chooses at most {lanes}"
    return None


@bind(ops.grouped_topk, supports=unsupported)
def grouped_topk(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
                 scoring_func: str = "softmax", correction_bias: Tensor | None = None,
                 routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    shape = gating.shape[0], top_k + num_fused_shared_experts
    weights = torch.empty(shape, dtype=torch.float32, device=gating.device)
    ids = torch.empty(shape, dtype=torch.int32, device=gating.device)
    launch("grouped_topk", gating, gating.data_ptr(), 0 if correction_bias is None else correction_bias.data_ptr(),
           weights.data_ptr(), ids.data_ptr(), gating.stride(0), *gating.shape, top_k, num_expert_group, topk_group,
           num_fused_shared_experts, renormalize, scoring_func == "sigmoid", routed_scaling_factor,
           DTYPES[gating.dtype])
    return weights, ids
