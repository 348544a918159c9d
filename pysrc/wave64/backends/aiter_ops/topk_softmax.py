import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.aiter import bind, call


def supports(gating: Tensor, top_k: int, renormalize: bool) -> str | None:
    return None if gating.is_contiguous() else "takes contiguous logits"


CALLS = {"topk_softmax": ("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "need_renorm")}


@bind(ops.topk_softmax, CALLS, supports=supports)
def topk_softmax(gating: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    shape = gating.shape[0], top_k
    weights = torch.empty(shape, dtype=torch.float32, device=gating.device)
    ids, sources = (torch.empty(shape, dtype=torch.int32, device=gating.device) for _ in range(2))
    call("topk_softmax", topk_weights=weights, topk_indices=ids, token_expert_indices=sources, gating_output=gating,
         need_renorm=renormalize)
    return weights, ids
