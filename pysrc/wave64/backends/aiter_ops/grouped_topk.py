import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.aiter import bind, call

COUNTS = (1, 2, 4, 8)  # of groups of experts, that it has kernels for
#: Beyond so many tokens a compute unit, scores with a bias are another kernel's, which renormalizes always.
MANY = 212
GROUPS = ("topk_weights", "topk_ids", "num_expert_group", "topk_group", "need_renorm", "routed_scaling_factor")


def supports(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
             scoring_func: str = "softmax", correction_bias: Tensor | None = None, routed_scaling_factor: float = 1.0,
             num_fused_shared_experts: int = 0) -> str | None:
    if not gating.is_contiguous():
        return "takes contiguous logits"
    if num_expert_group not in COUNTS:
        return f"takes 1, 2, 4 or 8 groups of experts, these are {num_expert_group}"
    if num_fused_shared_experts:
        return "appends no shared experts"
    if correction_bias is not None and (scoring_func != "sigmoid" or correction_bias.dtype != gating.dtype):
        return "takes a bias of the logits' dtype, and with scores by sigmoid alone"
    if correction_bias is not None and not renormalize and gating.shape[0] > MANY * platform.compute_units():
        return f"renormalizes where there is a bias and more than {MANY} tokens a compute unit"
    return None


@bind(ops.grouped_topk, {"grouped_topk": ("gating_output", "is_softmax", *GROUPS),
                         "biased_grouped_topk": ("gating_output", "correction_bias", *GROUPS)}, supports=supports)
def grouped_topk(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
                 scoring_func: str = "softmax", correction_bias: Tensor | None = None,
                 routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    shape = gating.shape[0], top_k
    weights = torch.empty(shape, dtype=torch.float32, device=gating.device)
    ids = torch.empty(shape, dtype=torch.int32, device=gating.device)
    given = dict(gating_output=gating, topk_weights=weights, topk_ids=ids, num_expert_group=num_expert_group,
                 topk_group=topk_group, need_renorm=renormalize, routed_scaling_factor=routed_scaling_factor)
    if correction_bias is None:
        call("grouped_topk", is_softmax=scoring_func == "softmax", **given)
    else:
        call("biased_grouped_topk", correction_bias=correction_bias, **given)
    return weights, ids
