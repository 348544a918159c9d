import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.aiter import bind, call

GROUPS = ("topk_weights", "topk_ids", "num_expert_group", "topk_group", "need_renorm", "routed_scaling_factor")


def supports(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
             scoring_func: str = "softmax", correction_bias: Tensor | None = None, routed_scaling_factor: float = 1.0,
             num_fused_shared_experts: int = 0) -> str | None:
    if not gating.is_contiguous() or gating.numel() == 0:
        return "takes contiguous logits, of at least one token"
    if num_fused_shared_experts:
        return "appends no shared experts"
    if correction_bias is not None and (scoring_func != "sigmoid" or correction_bias.dtype != gating.dtype):
        return "takes a bias of the logits' dtype, and with scores by sigmoid alone"
    return None


@bind(ops.grouped_topk, supports=supports, grouped_topk=("gating_output", "is_softmax", *GROUPS),
      biased_grouped_topk=("gating_output", "correction_bias", *GROUPS))
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
