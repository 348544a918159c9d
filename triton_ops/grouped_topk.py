"""DeepSeek's gate: a wave takes one row, laid out as [groups, experts of a group], each padded to a power of two.

The rank of a group is the number of better groups, computed for all pairs at once. Experts are chosen one per round
(topk.py), by their logits if there is no bias; the chosen logits are loaded again, which is faster than to gather them
from all lanes.
Bound by latency: two loads, the scores, two steps for the groups, top_k rounds, a store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from wave64.ops import grouped_topk
from wave64.triton_ops.gated import logistic
from wave64.triton_ops.geometry import num_warps
from wave64.triton_ops.splits import overlaps
from wave64.triton_ops.topk import LOG2_E, MAX_IDS, choose, clean

#: The comparisons of all pairs of groups fit into the registers of one wave up to this number.
MAX_GROUPS = 64


@triton.jit
def _score(x, row_max, inverse_sum, SIGMOID: tl.constexpr):
    """The softmax score exp(x - row_max) * inverse_sum, or the sigmoid of x."""
    if SIGMOID:
        score = logistic(x)
    else:
        score = tl.exp2((x - row_max) * LOG2_E) * inverse_sum
    return score


@triton.jit
def _larger_two(a, a_next, b, b_next):
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a_next, b_next))


@triton.jit
def _best_groups(choice, TOPK_GROUP: tl.constexpr, BY_TWO: tl.constexpr, BLOCK_G: tl.constexpr):
    """Mask [BLOCK_G] of the TOPK_GROUP best groups of choice [BLOCK_G, experts of a group]. BY_TWO: rank groups by the
    sum of their two best experts, else by the best."""
    if BY_TWO:
        best, second = tl.reduce((choice, tl.full(choice.shape, float("-inf"), tl.float32)), 1, _larger_two)
        best += second
    else:
        best = tl.max(choice, 1)
    offs_g = tl.arange(0, BLOCK_G)
    is_earlier = offs_g[None, :] < offs_g[:, None]
    is_better = (best[None, :] > best[:, None]) | ((best[None, :] == best[:, None]) & is_earlier)
    return tl.sum(is_better.to(tl.int32), 1) < TOPK_GROUP


@triton.jit
def _grouped_topk_kernel(weights_ptr, ids_ptr, gating_ptr, bias_ptr, gating_stride, factor, GROUPS: tl.constexpr,
                         IN_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
                         RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, BF16: tl.constexpr, OVERLAP: tl.constexpr,
                         BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    gating_ptr += row * gating_stride
    ids = tl.arange(0, BLOCK_G * BLOCK_P)
    mask = (ids // BLOCK_P < GROUPS) & (ids % BLOCK_P < IN_GROUP)
    if IN_GROUP < BLOCK_P:
        ids = ids // BLOCK_P * IN_GROUP + ids % BLOCK_P
    x = tl.where(mask, clean(tl.load(gating_ptr + ids, mask=mask, other=0.0)), float("-inf"))
    if SIGMOID:
        row_max, inverse_sum = 0.0, 1.0
    else:
        row_max = tl.max(x, 0)
        inverse_sum = 1.0 / tl.sum(tl.exp2((x - row_max) * LOG2_E), 0)
    choice = x
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + ids, mask=mask, other=0.0)
        choice = tl.where(mask, clean(_score(x, row_max, inverse_sum, SIGMOID) + bias), float("-inf"))
    if TOPK_GROUP < GROUPS:
        grouped = tl.reshape(choice, (BLOCK_G, BLOCK_P))
        is_best = _best_groups(grouped, TOPK_GROUP, bias_ptr is not None, BLOCK_G)
        choice = tl.reshape(tl.where(is_best[:, None], grouped, float("-inf")), (BLOCK_G * BLOCK_P,))
    chosen = choose(choice, ids, TOP_K, BLOCK_K, BF16)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOP_K
    logits = clean(tl.load(gating_ptr + chosen, mask=mask_k, other=float("-inf")))
    weights = tl.where(mask_k, _score(logits, row_max, inverse_sum, SIGMOID), 0.0)
    if RENORMALIZE:
        factor /= tl.sum(weights, 0) + 1e-20
    weights *= factor
    if SHARED:
        weights = tl.where(mask_k, weights, 1.0)
        chosen = tl.where(mask_k, chosen, GROUPS * IN_GROUP + offs_k - TOP_K)
    width: tl.constexpr = TOP_K + SHARED
    tl.store(weights_ptr + row * width + offs_k, weights, mask=offs_k < width)
    tl.store(ids_ptr + row * width + offs_k, chosen, mask=offs_k < width)


def unsupported(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
                scoring_func: str = "softmax", correction_bias: Tensor | None = None,
                routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> str | None:
    if topk_group < num_expert_group > MAX_GROUPS:
        return f"{num_expert_group} groups, the kernel ranks at most {MAX_GROUPS}"
    return None


@grouped_topk.backend("triton", supports=unsupported)
def launch(gating: Tensor, top_k: int, num_expert_group: int, topk_group: int, renormalize: bool,
           scoring_func: str = "softmax", correction_bias: Tensor | None = None,
           routed_scaling_factor: float = 1.0, num_fused_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    tokens, experts = gating.shape
    width = top_k + num_fused_shared_experts
    weights = torch.empty((tokens, width), dtype=torch.float32, device=gating.device)
    ids = torch.empty((tokens, width), dtype=torch.int32, device=gating.device)
    if tokens:
        groups = num_expert_group if topk_group < num_expert_group else 1
        block_g, block_p = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
        bf16 = gating.dtype == torch.bfloat16 and correction_bias is None and block_g * block_p <= MAX_IDS.value
        _grouped_topk_kernel[tokens,](
            weights, ids, gating, correction_bias, gating.stride(0), routed_scaling_factor, GROUPS=groups,
            IN_GROUP=experts // groups, TOPK_GROUP=min(topk_group, groups), TOP_K=top_k,
            SHARED=num_fused_shared_experts, RENORMALIZE=renormalize, SIGMOID=scoring_func == "sigmoid", BF16=bf16,
            OVERLAP=overlaps(), BLOCK_G=block_g, BLOCK_P=block_p, BLOCK_K=triton.next_power_of_2(width),
            num_warps=num_warps(block_g * block_p // 16))
    return weights, ids
