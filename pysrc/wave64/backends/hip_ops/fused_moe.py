import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, constants, launch, other_fp8
from wave64.backends.hip_ops import moe_align_block_size, per_token_group_quant_fp8
from wave64.backends.hip_ops.fp8_block_scaled_mm import absent
from wave64.quant import FP8

CONSTANTS = constants("fused_moe")
#: Up to here Triton's kernels serve pairs of a token and an expert: both need the time of reading the weights, and
#: those take three launches instead of five, since they do not sort.
FEW_PAIRS = 32
#: Pairs of a block: the least that holds as many as an expert has on average, or the last.
BLOCK_PAIRS = (CONSTANTS.FEW_PAIRS, 64, 128)


def block_pairs(num_pairs: int, routed: int) -> int:
    return next((block for block in BLOCK_PAIRS if num_pairs <= block * routed), BLOCK_PAIRS[-1])


def supports(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
             w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
             activation: str = "silu", apply_router_weight_on_input: bool = False, expert_map: Tensor | None = None,
             scale_ue8m0: bool = False) -> str | None:
    if w13.dtype not in FP8.values() or block_shape is None or list(block_shape) != [128, 128]:
        return "multiplies FP8 weights in blocks of 128 rows and columns"
    if why := other_fp8(w13.dtype):
        return why
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"quantizes bf16 and fp16, not {x.dtype}"
    if activation != "silu" or scale_ue8m0:
        return "activates by silu, and has no scales of powers of two"
    (_, hidden, inter), routed = w2.shape, len(w13 if expert_map is None else expert_map)
    if hidden % 128 or inter % 128:
        return f"multiplies whole groups of 128 columns, these are {hidden} and {inter}"
    if topk_ids.numel() <= FEW_PAIRS:
        return f"leaves up to {FEW_PAIRS} pairs of a token and an expert to kernels that do not sort them"
    if max(x.numel(), topk_ids.numel() * inter * 2) >= CONSTANTS.MAX_BYTES:
        return "addresses less than 2^30 bytes of x and of h"
    if any(at % 16 for w in (w13, w2) for at in (w.data_ptr(), *w.stride()[:2])):
        return "reads 16 bytes at a time, and rows of weights do not begin at multiples of 16 bytes"
    if max(w13.stride(1), w2.stride(1)) > CONSTANTS.MAX_STRIDE:
        return "reads rows of a tile by offsets of 32 bits, and these are too far from each other"
    return moe_align_block_size.supports(topk_ids, block_pairs(topk_ids.numel(), routed), routed)


@bind(ops.fused_moe, supports=supports, absent=absent)
def fused_moe(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
              w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
              activation: str = "silu", apply_router_weight_on_input: bool = False, expert_map: Tensor | None = None,
              scale_ue8m0: bool = False) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    (num_tokens, hidden), inter, num_pairs = x.shape, w2.shape[2], topk_ids.numel()
    routed = len(w13 if expert_map is None else expert_map)
    block = block_pairs(num_pairs, routed)
    pairs, block_ids, num_padded = moe_align_block_size.moe_align_block_size(topk_ids, block, routed)
    q, scale = per_token_group_quant_fp8.per_token_group_quant_fp8(x, 128)
    few = block == CONSTANTS.FEW_PAIRS
    h = torch.empty((num_pairs, inter), dtype=x.dtype if few else w13.dtype, device=x.device)
    h_scale = None if few else torch.empty((num_pairs, inter // 128), dtype=torch.float32, device=x.device)
    y = torch.empty((num_pairs, hidden), dtype=x.dtype, device=x.device)
    launch("fused_moe", x=q, x_scale=scale, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale,
           topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, block_ids=block_ids, pairs=pairs,
           num_padded=num_padded, h=h, h_scale=h_scale, y=y, out=out, w13_expert_stride=w13.stride(0),
           w13_stride=w13.stride(1), w2_expert_stride=w2.stride(0), w2_stride=w2.stride(1), num_tokens=num_tokens,
           top_k=topk_ids.shape[1], num_experts=w13.shape[0], num_routed=routed, hidden=hidden, inter=inter,
           num_blocks=block_ids.numel(), block_pairs=block, weigh_input=int(apply_router_weight_on_input),
           dtype=x.dtype)
    return out
