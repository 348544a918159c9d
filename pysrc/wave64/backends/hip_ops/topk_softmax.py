import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.hip import DTYPES, bind, launch

#: Experts that a lane of the gates' waves holds, at most.
SLOTS = 16


def unsupported(gating: Tensor, top_k: int, renormalize: bool) -> str | None:
    lanes = platform.arch().wave_size
    if gating.shape[1] > SLOTS * lanes:
        return f"{gating.shape[1]} experts, a wave holds {SLOTS * lanes}"
    return f"top_k {top_k}, a wave chooses at most {lanes}" if top_k > lanes else None


@bind(ops.topk_softmax, supports=unsupported)
def topk_softmax(gating: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights = torch.empty((gating.shape[0], top_k), dtype=torch.float32, device=gating.device)
    ids = torch.empty((gating.shape[0], top_k), dtype=torch.int32, device=gating.device)
    launch("topk_softmax", gating, gating.data_ptr(), weights.data_ptr(), ids.data_ptr(), gating.stride(0),
           *gating.shape, top_k, renormalize, DTYPES[gating.dtype])
    return weights, ids
