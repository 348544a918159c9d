"""Parts of an operator that are of interest by themselves, because other projects time them, to be timed next to it.

What they compute is judged as part of the whole operator: a case whose result is wrong has no stages either.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from wave64.op import Cost
from wave64.triton_ops import fused_moe


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    call: Callable[[], Any]
    cost: Cost


def stages(op: str, args: dict[str, Any]) -> Iterator[Stage]:
    if op == "fused_moe":
        yield from moe_products(**args)


def moe_products(x, w13, w2, topk_weights, topk_ids, w13_scale=None, w2_scale=None, block_shape=None, activation="silu",
                 **others) -> Iterator[Stage]:
    """The two products alone, on what the stages before them leave: x quantized and pairs sorted beforehand, where the
    operator does so. The first includes the activation and, in blocks, its quantization."""
    if others.get("expert_map") is not None or others.get("apply_router_weight_on_input"):
        return
    config = fused_moe.TUNING.choose(
        **fused_moe.key(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, block_shape))
    routing = fused_moe.route(topk_ids, None, w13.shape[0], 0 if config.few else config.block_m)
    q, q_scale = x, None
    if w13_scale is not None and not (config.late and block_shape):
        q, q_scale = fused_moe.quantize(x, block_shape)

    def first():
        return fused_moe.first_product(q, q_scale, x.dtype, w13, w13_scale, None, routing, block_shape, activation,
                                       config)

    h, h_scale = first()
    out = torch.empty_like(x)
    if config.few:
        def second():
            fused_moe.second_product_of_few(out, h, w2, w2_scale, topk_weights, routing, block_shape, config)
    else:
        if w2_scale is not None and not block_shape:
            h, h_scale = fused_moe.quantize(h, None)

        def second():
            fused_moe.second_product(h, h_scale, x.dtype, w2, w2_scale, topk_weights, routing, block_shape, config)

    chosen, pairs = len(topk_ids.unique()), topk_ids.numel()
    (rows, hidden), inter = w13.shape[1:], w2.shape[2]
    flops = 2 * pairs * rows * hidden
    yield Stage("w13 alone", first, Cost(chosen * rows * hidden * w13.itemsize + q.nbytes + h.nbytes, flops))
    yield Stage("w2 alone", second, Cost(chosen * hidden * inter * w2.itemsize + h.nbytes + x.nbytes, flops // 2))
