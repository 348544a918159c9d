"""fused_moe's products for Hopper and many tokens, in Gluon: producer and consumer waves, persistent programs.

The trick: four waves only copy to shared memory, gathered rows of x or h and tiles of weights (TMA), several blocks of
K ahead, across tiles of the result. Two teams of four waves multiply 64 pairs each; a team whose pairs are all padding
leaves the matrix unit to the other. A tile of the first product has the rows of gate next to those of up, so that one
lane has both of a column in registers for the activation.
Bound by: the matrix units; the second product by writing its result.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wave64 import platform
from wave64.ops import fused_moe
from wave64.triton_ops.fused_moe import combine, quantize, route
from wave64.triton_ops.hopper.fp8_block_scaled_mm import add_scaled, start_load
from wave64.triton_ops.hopper.mla_decode import start_copy

TEAM = gl.constexpr(64)  # rows of a matrix instruction, and of a team
ROWS = gl.constexpr(128)  # of weights in a tile; in the first product half are gate's, half are up's
COPIERS = gl.constexpr(4)  # waves
# Renamed after Triton 3.6.
PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
#: Blocks of K in shared memory.
STAGES = 6


@gluon.jit
def _copy_rows(lds, ptrs, barrier, copy: gl.constexpr):
    """Start to copy 64 rows at ptrs to `lds`; padding becomes zeros."""
    offs_k = gl.arange(0, lds.shape[1], gl.SliceLayout(0, copy))
    ptrs_2d = gl.expand_dims(ptrs, 1) + gl.expand_dims(offs_k, 0)
    start_copy(lds, gl.max_contiguous(gl.multiple_of(ptrs_2d, [1, 16]), [1, 16]), mask=gl.expand_dims(barrier, 1))


@gluon.jit
def _copy(x_ptr, w_desc, sorted_ptr, expert_ptr, a_lds, b_lds, full, empty, items, tiles, pairs, k, stride_x,
          TOP_K: gl.constexpr, PARTS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """The producer waves. A stage is full when every lane's copies and TMA's bytes have arrived, and empty when both
    teams have read it."""
    lanes: gl.constexpr = BLOCK_K * x_ptr.dtype.element_ty.primitive_bitwidth // 128  # per row, with 16 bytes each
    copy: gl.constexpr = gl.BlockedLayout([1, BLOCK_K // lanes], [32 // lanes, lanes], [COPIERS, 1], [1, 0])
    row = gl.arange(0, TEAM, gl.SliceLayout(1, copy))
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, tile = item // tiles, item % tiles
        expert = gl.load(expert_ptr + block)
        pair = gl.load(sorted_ptr + block * (2 * TEAM) + row)
        pair2 = gl.load(sorted_ptr + block * (2 * TEAM) + TEAM + row)
        rows = x_ptr + gl.minimum(pair, pairs - 1).to(gl.int64) // TOP_K * stride_x
        rows2 = x_ptr + gl.minimum(pair2, pairs - 1).to(gl.int64) // TOP_K * stride_x
        for first in range(0, k, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            barrier = full.index(stage)
            mbarrier.expect(barrier, ROWS * BLOCK_K * (x_ptr.dtype.element_ty.primitive_bitwidth // 8))
            start_load(w_desc, [expert * PARTS, tile * (ROWS // PARTS), first], barrier, b_lds.index(stage))
            _copy_rows(a_lds.index(2 * stage), rows + first, pair < pairs, copy)
            _copy_rows(a_lds.index(2 * stage + 1), rows2 + first, pair2 < pairs, copy)
            async_copy.mbarrier_arrive(barrier, increment_count=False)
            step += 1


@gluon.jit
def _start_product(a_lds, b_lds, full, step, acc, ADD: gl.constexpr, TEAM_ID: gl.constexpr, BLOCK_K: gl.constexpr,
                   STAGES: gl.constexpr):
    """Start the product of a block of K, asynchronously; added to `acc` if ADD."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    fence_async_shared()
    a = a_lds.index(2 * stage + TEAM_ID)
    b = b_lds.index(stage)  # [PARTS, ROWS / PARTS, BLOCK_K], contiguous, so that it can be one tile
    if PUBLIC:
        b = b.reinterpret(a.dtype, [ROWS, BLOCK_K], a.layout)
    else:
        b = b._reinterpret(a.dtype, [ROWS, BLOCK_K], a.layout)
    return warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=ADD, is_async=True)


@gluon.jit
def _halves(both):
    """(gate, up) of a tile [64, 128]: views of the same registers."""
    return gl.split(gl.permute(gl.reshape(both, [TEAM, 2, ROWS // 2]), [0, 2, 1]))


@gluon.jit
def _add_halves(gate, up, partial, a_scale, gate_scale, up_scale):
    d, e = _halves(partial)
    return add_scaled(gate, d, a_scale * gate_scale), add_scaled(up, e, a_scale * up_scale)


@gluon.jit
def _multiply(TEAM_ID: gl.constexpr, y_ptr, x_scale_ptr, w_scale_ptr, weights_ptr, sorted_ptr, expert_ptr, a_lds,
              b_lds, full, empty, items, tiles, pairs, n, k, stride_xs, stride_se, stride_sn, TOP_K: gl.constexpr,
              PARTS: gl.constexpr, GROUP_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """A consumer team: 64 pairs of each tile. It takes two blocks of K per iteration, of which one is added while the
    other is multiplied, and loads scales two blocks ahead. The number of blocks is even."""
    size: gl.constexpr = a_lds.dtype.primitive_bitwidth
    width: gl.constexpr = ROWS // PARTS
    product: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                      instr_shape=[16, ROWS, 256 // size])
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    zeros = gl.zeros([TEAM, ROWS], gl.float32, product)
    no_gate, no_up = _halves(zeros)
    S_M: gl.constexpr = gl.SliceLayout(1, no_gate.type.layout if PARTS == 2 else product)
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, tile = item // tiles, item % tiles
        first_pair = sorted_ptr + block * (2 * TEAM) + TEAM_ID * TEAM
        acc, gate, up = zeros, no_gate, no_up
        if gl.load(first_pair) < pairs:
            if x_scale_ptr is not None:
                pair = gl.minimum(gl.load(first_pair + gl.arange(0, TEAM, S_M)), pairs - 1)
                a_scales = x_scale_ptr + pair.to(gl.int64) // TOP_K * stride_xs
                gates = w_scale_ptr + gl.load(expert_ptr + block).to(gl.int64) * stride_se
                ups = gates + (n + tile * width) // GROUP_N * stride_sn if PARTS == 2 else gates
                gates += tile * width // GROUP_N * stride_sn
                a_scale, a_scale2 = gl.load(a_scales), gl.load(a_scales + 1)
                gate_scale, gate_scale2 = gl.load(gates), gl.load(gates + 1)
                up_scale, up_scale2 = gl.load(ups), gl.load(ups + 1)
                blocks = k // BLOCK_K
                for first_block in range(0, blocks, 2):
                    partial = _start_product(a_lds, b_lds, full, step, zeros, False, TEAM_ID, BLOCK_K, STAGES)
                    partial2 = _start_product(a_lds, b_lds, full, step + 1, zeros, False, TEAM_ID, BLOCK_K, STAGES)
                    a, g, u, a2, g2, u2 = a_scale, gate_scale, up_scale, a_scale2, gate_scale2, up_scale2
                    ahead = gl.minimum(first_block + 2, blocks - 2)
                    a_scale, a_scale2 = gl.load(a_scales + ahead), gl.load(a_scales + ahead + 1)
                    gate_scale, gate_scale2 = gl.load(gates + ahead), gl.load(gates + ahead + 1)
                    up_scale, up_scale2 = gl.load(ups + ahead), gl.load(ups + ahead + 1)
                    partial = warpgroup_mma_wait(1, deps=[partial])
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    if PARTS == 2:
                        gate, up = _add_halves(gate, up, partial, a, g, u)
                    else:
                        acc = add_scaled(acc, partial, a * g)
                    partial2 = warpgroup_mma_wait(0, deps=[partial2])
                    mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
                    if PARTS == 2:
                        gate, up = _add_halves(gate, up, partial2, a2, g2, u2)
                    else:
                        acc = add_scaled(acc, partial2, a2 * g2)
                    step += 2
            else:
                for _pair in range(0, k, 2 * BLOCK_K):
                    acc = _start_product(a_lds, b_lds, full, step, acc, True, TEAM_ID, BLOCK_K, STAGES)
                    acc = _start_product(a_lds, b_lds, full, step + 1, acc, True, TEAM_ID, BLOCK_K, STAGES)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
                    step += 2
                if PARTS == 2:
                    gate, up = _halves(acc)
            if PARTS == 2:
                y = gate * up / (1 + gl.exp2(gate * -1.4426950408889634))
            else:
                y = acc
                if weights_ptr is not None:
                    out_pair = gl.minimum(gl.load(first_pair + gl.arange(0, TEAM, S_M)), pairs - 1)
                    y *= gl.expand_dims(gl.load(weights_ptr + out_pair), 1)
            y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), store_layout)
            out_pair = gl.load(first_pair + gl.arange(0, TEAM, gl.SliceLayout(1, store_layout)))
            columns = tile * width + gl.arange(0, width, gl.SliceLayout(0, store_layout))
            offs = gl.expand_dims(out_pair.to(gl.int64) * n, 1) + gl.expand_dims(columns, 0)
            gl.store(y_ptr + offs, y, mask=gl.expand_dims(out_pair < pairs, 1))
        else:
            for _passed in range(0, k, BLOCK_K):
                mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1


@gluon.jit(do_not_specialize=["pairs"])
def _moe_product_hopper_kernel(y_ptr, x_ptr, x_scale_ptr, w_desc, w_scale_ptr, weights_ptr, sorted_ptr, expert_ptr,
                               end_ptr, pairs, n, k, stride_x, stride_xs, stride_se, stride_sn, TOP_K: gl.constexpr,
                               PARTS: gl.constexpr, GROUP_N: gl.constexpr, BLOCK_K: gl.constexpr,
                               STAGES: gl.constexpr):
    """y [pairs, n] = silu(gate) * up of rows pair / TOP_K of x (PARTS 2), or weight * x w^T (PARTS 1). One program:
    every num_programs-th tile of 128 pairs of one expert and 128 rows of its weights."""
    rows: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128,
                                              element_bitwidth=x_ptr.dtype.element_ty.primitive_bitwidth, rank=2)
    a_lds = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2 * STAGES, TEAM, BLOCK_K], rows)
    b_lds = gl.allocate_shared_memory(w_desc.dtype, [STAGES, PARTS, ROWS // PARTS, BLOCK_K], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=COPIERS * 32 + 1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    tiles = n // (ROWS // PARTS)
    items = gl.load(end_ptr) // (2 * TEAM) * tiles
    gl.warp_specialize(
        [(_multiply, (0, y_ptr, x_scale_ptr, w_scale_ptr, weights_ptr, sorted_ptr, expert_ptr, a_lds, b_lds, full,
                      empty, items, tiles, pairs, n, k, stride_xs, stride_se, stride_sn, TOP_K, PARTS, GROUP_N,
                      BLOCK_K, STAGES)),
         (_multiply, (1, y_ptr, x_scale_ptr, w_scale_ptr, weights_ptr, sorted_ptr, expert_ptr, a_lds, b_lds, full,
                      empty, items, tiles, pairs, n, k, stride_xs, stride_se, stride_sn, TOP_K, PARTS, GROUP_N,
                      BLOCK_K, STAGES)),
         (_copy, (x_ptr, w_desc, sorted_ptr, expert_ptr, a_lds, b_lds, full, empty, items, tiles, pairs, k, stride_x,
                  TOP_K, PARTS, BLOCK_K, STAGES))],
        [4, COPIERS], [216, 80])


def product(y: Tensor, x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, weights: Tensor | None,
            sorted_ids: Tensor, expert_ids: Tensor, end: Tensor, top_k: int, parts: int,
            block_shape: list[int] | None) -> None:
    """y [pairs, n] of pairs sorted in blocks of 128. parts: 2 for w13, 1 for w2, where x has a row per pair."""
    experts, rows, columns = w.shape
    block_k = 128 // w.itemsize
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * w.itemsize, rank=3)
    weight_view = w.as_strided((parts * experts, rows // parts, columns), (rows // parts * w.stride(1), w.stride(1), 1))
    tiles = TensorDescriptor.from_tensor(weight_view, [parts, ROWS.value // parts, block_k], layout)
    strides = (0, 0, 0)
    if x_scale is not None and w_scale is not None:
        strides = (x_scale.stride(0), w_scale.stride(0), w_scale.stride(1))
    _moe_product_hopper_kernel[platform.compute_units(),](
        y, x, x_scale, tiles, w_scale, weights, sorted_ids, expert_ids, end, y.shape[0], rows // parts, columns,
        x.stride(0), *strides, TOP_K=top_k, PARTS=parts, GROUP_N=block_shape[0] if block_shape else 1, BLOCK_K=block_k,
        STAGES=STAGES, num_warps=4)


#: With fewer pairs per expert on average the portable kernels are faster, as measured on an H200: their blocks are
#: smaller. (A launch has no options, hence no tuned table.)
MIN_PAIRS = 17


def unsupported(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
                activation: str = "silu", apply_router_weight_on_input: bool = False, expert_map: Tensor | None = None,
                scale_ue8m0: bool = False) -> str | None:
    """The reason why these kernels do not support these arguments, or None. They take whole tiles, rows aligned to 16
    bytes, and contiguous experts, which TMA needs."""
    (_, rows, hidden), inter, size = w13.shape, w2.shape[2], w13.itemsize
    if topk_ids.numel() <= 32 or triton.cdiv(topk_ids.numel(), w2.shape[0]) < MIN_PAIRS:
        return f"is slower than triton below {MIN_PAIRS} tokens an expert"
    if expert_map is not None or apply_router_weight_on_input or activation != "silu":
        return "has silu, with the router's weights after it, and no expert map"
    if size == 1:
        is_supported = block_shape is not None and block_shape[1] == 128 and block_shape[0] % ROWS.value == 0
        operands = [w13, w2]
    else:
        is_supported, operands = size == 2, [w13, w2, x]
    if not is_supported:
        return f"takes weights of 16 bits, or FP8 in blocks of 128 x 128, not {w13.dtype} in {block_shape}"
    if rows % (2 * ROWS.value) or hidden % ROWS.value or any(k % (256 // size) for k in (hidden, inter)):
        return f"takes whole tiles of 128, not hidden {hidden} and intermediate {inter}"
    if any(w.stride(0) != w.shape[1] * w.stride(1) for w in (w13, w2)):
        return "takes experts that lie one after another in memory"
    if any(t.data_ptr() % 16 or t.stride(-2) * size % 16 for t in operands):
        return "copies rows 16 bytes at a time, these are not aligned to that"
    return None


@fused_moe.backend("hopper", supports=unsupported)
def run(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None, block_shape: list[int] | None = None, activation: str = "silu",
        apply_router_weight_on_input: bool = False, expert_map: Tensor | None = None,
        scale_ue8m0: bool = False) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    routing = route(topk_ids, None, w13.shape[0], 2 * TEAM.value)
    blocks = (routing.pairs, routing.block_ids, routing.end)
    x_scale = h_scale = None
    if w13_scale is not None:
        x, x_scale = quantize(x, block_shape, scale_ue8m0)
    h = torch.empty((topk_ids.numel(), w2.shape[2]), dtype=out.dtype, device=x.device)
    product(h, x, x_scale, w13, w13_scale, None, *blocks, topk_ids.shape[1], 2, block_shape)
    if w13_scale is not None:
        h, h_scale = quantize(h, block_shape, scale_ue8m0)
    y = torch.empty((topk_ids.numel(), out.shape[1]), dtype=out.dtype, device=x.device)
    product(y, h, h_scale, w2, w2_scale, topk_weights, *blocks, 1, 1, block_shape)
    combine(out, y, routing)
    return out
