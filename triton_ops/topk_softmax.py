"""The softmax gate: a wave takes a row of logits.

The trick: experts are chosen by logits, which have the order of the probabilities, so the rounds (topk.py) do not wait
for the softmax; the chosen logits are loaded again, which is faster than to gather them from all lanes.
Bound by latency: two loads, top_k rounds, a store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from wave64.ops import topk_softmax
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.splits import overlaps
from wave64.triton_ops.topk import LOG2_E, MAX_IDS, choose, clean


@triton.jit
def _topk_softmax_kernel(weights_ptr, ids_ptr, gating_ptr, gating_stride, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
                         RENORMALIZE: tl.constexpr, BF16: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_E: tl.constexpr,
                         BLOCK_K: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    gating_ptr += row * gating_stride
    ids = tl.arange(0, BLOCK_E)
    mask = ids < EXPERTS
    x = tl.where(mask, clean(tl.load(gating_ptr + ids, mask=mask, other=0.0)), float("-inf"))
    row_max = tl.max(x, 0)
    chosen = choose(x, ids, TOP_K, BLOCK_K, BF16)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOP_K
    logits = clean(tl.load(gating_ptr + chosen, mask=mask_k, other=float("-inf")))
    weights = tl.where(mask_k, tl.exp2((logits - row_max) * LOG2_E), 0.0)
    if RENORMALIZE:
        weights /= tl.sum(weights, 0)
    else:
        weights /= tl.sum(tl.exp2((x - row_max) * LOG2_E), 0)
    tl.store(weights_ptr + row * TOP_K + offs_k, weights, mask=mask_k)
    tl.store(ids_ptr + row * TOP_K + offs_k, chosen, mask=mask_k)


@topk_softmax.backend("triton")
def launch(gating: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = gating.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=gating.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=gating.device)
    if tokens:
        block_e = triton.next_power_of_2(experts)
        _topk_softmax_kernel[tokens,](
            weights, ids, gating, gating.stride(0), EXPERTS=experts, TOP_K=top_k, RENORMALIZE=renormalize,
            BF16=gating.dtype == torch.bfloat16 and block_e <= MAX_IDS.value, OVERLAP=overlaps(), BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(top_k), num_warps=num_warps(block_e // 16))
    return weights, ids
