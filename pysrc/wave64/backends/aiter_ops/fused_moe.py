import torch
from torch import Tensor

from wave64 import layouts, ops
from wave64.backends.aiter import HALVES, bind, call, member
from wave64.backends.hip import other_fp8
from wave64.ops.fused_moe import granularity, local_ids

GIVEN = ("hidden_states", "w1", "w2", "topk_weight", "topk_ids", "expert_mask", "activation", "quant_type", "w1_scale",
         "w2_scale")
ON_INPUT = ("hidden_states", "w1", "w2", "topk_weight", "topk_ids", "fc1_scale", "fc2_scale", "expert_mask",
            "activation")
BLOCK = 128
#: The largest block of rows that AITER pads an expert's tokens to is of 128; its ids are tokens in 24 bits.
MAX_TOKENS = 1 << 24
QUANTIZED = {"": "No", "channel": "per_Token", "block": "per_128x128"}


def supports(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
             w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
             activation: str = "silu", apply_router_weight_on_input: bool = False,
             expert_map: Tensor | None = None, scale_ue8m0: bool = False) -> str | None:
    kind = granularity(w13_scale, block_shape)
    if x.dtype not in HALVES or kind and x.dtype != torch.bfloat16:
        return f"takes bf16{'' if kind else ' and fp16'}, not {x.dtype}"
    if kind == "tensor":
        return "takes FP8 weights with a scale a channel or a block, these have one an expert"
    if kind == "block" and (block_shape != [BLOCK, BLOCK] or w13.shape[1] % (2 * BLOCK) or w13.shape[2] % BLOCK):
        return f"takes whole blocks of {BLOCK} x {BLOCK}, these are {block_shape} of weights {list(w13.shape)}"
    if scale_ue8m0:
        return "has no scales that are powers of two"
    if activation != "silu":
        return f"takes silu, not {activation}: its gelu is not said to be which"
    if apply_router_weight_on_input and kind != "channel":
        return "multiplies the input by the router's weight with FP8 weights that have a scale a channel alone"
    if w13.shape[1] % (2 * BLOCK) or w13.shape[2] % BLOCK:
        return f"takes sizes that are a multiple of {BLOCK}, these are {list(w13.shape)}"
    if x.shape[0] >= MAX_TOKENS:
        return f"takes less than {MAX_TOKENS} tokens, these are {x.shape[0]}"
    if why := other_fp8(w13.dtype):
        return why
    if x.is_cuda and torch.cuda.is_current_stream_capturing() and not (layouts.is_kept(w13) and layouts.is_kept(w2)):
        return "lays weights out at their first call, which may not be a graph's: call once before the capture"
    return None


@bind(ops.fused_moe, {"fused_moe.fused_moe": GIVEN, "fused_moe_bf16_asm.asm_moe_tkw1": ON_INPUT}, supports=supports,
      tiles=True)
def fused_moe(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
              w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
              activation: str = "silu", apply_router_weight_on_input: bool = False,
              expert_map: Tensor | None = None, scale_ue8m0: bool = False) -> Tensor:
    experts, kind = w13.shape[0], granularity(w13_scale, block_shape)
    # Its kernels read beyond their arrays for an id of -1. Such ids are those of an expert more, which is masked out.
    ids = local_ids(topk_ids, experts, expert_map)
    ids = torch.where(ids < 0, experts, ids).int()
    mask = torch.arange(experts + 1, dtype=torch.int32, device=x.device).lt(experts).int()
    given = dict(hidden_states=x.contiguous(), w1=layouts.in_tiles(w13), w2=layouts.in_tiles(w2),
                 topk_weight=topk_weights, topk_ids=ids, expert_mask=mask, activation=member("ActivationType.Silu"))
    if kind == "channel":
        w13_scale, w2_scale = (None if scale is None else scale.view(experts, -1, 1) for scale in (w13_scale, w2_scale))
    if apply_router_weight_on_input:
        return call("fused_moe_bf16_asm.asm_moe_tkw1", fc1_scale=w13_scale, fc2_scale=w2_scale, **given)
    return call("fused_moe.fused_moe", w1_scale=w13_scale, w2_scale=w2_scale,
                quant_type=member(f"QuantType.{QUANTIZED[kind]}"), **given)
