"""Grouped GEMMs of the mixture of experts: gathered rows of tokens times the weights of their experts.

The trick: one program computes gate and up of the same columns, so that the activation happens in registers and only
its result is stored, quantized if the program has whole groups. Programs that read the same weights run at the same
time on one chiplet. Few tokens are not sorted: each (token, expert) pair is a tile, and a tile of the second product
has rows of all experts of a token, so that their sum stays in registers.
Bound by reading weights while an expert has few tokens, by the matrix cores beyond.
"""

import triton
import triton.language as tl

from wave64.triton_ops.attention import INTERPRETED
from wave64.triton_ops.gated import logistic
from wave64.triton_ops.gelu_and_mul import _erfc
from wave64.triton_ops.quant import scales

#: Scales of the weights: none; per row, applied after the loop; per block.
UNSCALED, PER_ROW, PER_BLOCK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Arguments that change from call to call.
NOT_SPECIALIZED = ["pairs", "routed", "experts", "blocks"]


@triton.jit
def local_expert(expert, map_ptr, routed, experts):
    """The local expert of a router's id; -1: none."""
    is_known = (expert >= 0) & (expert < routed)
    if map_ptr is not None:
        expert = tl.load(map_ptr + tl.where(is_known, expert, 0), mask=is_known, other=-1)
        is_known = (expert >= 0) & (expert < experts)
    return tl.where(is_known, expert, -1)


@triton.jit
def tile_of_program(tiles, GROUP_M: tl.constexpr, XCDS: tl.constexpr):
    """(block of pairs, tile of columns) of a program. A group of GROUP_M blocks, most likely of one expert, iterates
    over the tiles of its weights together. Programs are assigned to chiplets round robin; those of a group are
    mapped to one chiplet and its L2."""
    item = tl.program_id(0)
    item_of_xcd = item // XCDS
    group = item_of_xcd // (GROUP_M * tiles) * XCDS + item % XCDS
    position = item_of_xcd % (GROUP_M * tiles)
    return group * GROUP_M + position % GROUP_M, position // GROUP_M


@triton.jit
def product(a, b, FP8: tl.constexpr):
    """a @ b [K, N] in fp32. FP8: limited to BLOCK_K products, since Hopper accumulates FP8 with 14 bits."""
    if INTERPRETED:  # the interpreter would multiply the bits of bf16 as integers
        d = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif FP8:
        d = tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    else:
        d = tl.dot(a, b, input_precision="ieee")
    return d


@triton.jit
def row_amax(x, RIGHT: tl.constexpr):
    """The amax of each row of x (RIGHT: of each column)."""
    return tl.max(tl.abs(x), 0 if RIGHT else 1)


@triton.jit
def quantized(x, amax, LIMIT: tl.constexpr, BELOW: tl.constexpr, RIGHT: tl.constexpr, dtype: tl.constexpr):
    """(q, scale) of the rows (RIGHT: columns) of x, which is fp32, from their amax."""
    scale, inverse = scales(amax, LIMIT, BELOW)
    return (x * tl.expand_dims(inverse, 0 if RIGHT else 1)).to(dtype), scale


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up, where act(gate) = gate * factor."""
    if ACTIVATION == "silu":
        factor = logistic(gate)
    elif ACTIVATION == "gelu":
        tail = 0.5 * _erfc(tl.abs(gate) * 0.7071067811865476)
        factor = tl.where(gate > 0, 1.0 - tail, tail)
    else:
        factor = logistic(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return gate * factor * up


@triton.jit
def load_steps(ptr, offs, first, K, mask, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load columns `first` to first + BLOCK_K of the rows at ptr + offs. Columns from K on (None: no limit), and rows
    where mask [rows] (None: all) is false, are 0. RIGHT: [BLOCK_K, rows], the right operand of a dot, which has no bank
    conflicts in LDS if it is loaded this way and not transposed later."""
    offs_k = tl.expand_dims(tl.arange(0, BLOCK_K), 1 if RIGHT else 0)
    offs = tl.expand_dims(offs, 0 if RIGHT else 1)
    if mask is not None:
        mask = tl.expand_dims(mask, 0 if RIGHT else 1)
    if K is not None:
        mask = offs_k < K - first if mask is None else mask & (offs_k < K - first)
    return tl.load(ptr + first + offs + offs_k, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def block_scale(ptr, offs_n, first, stride, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr):
    """Scales of the blocks of rows offs_n (one number if all are in one block) and column `first`."""
    return tl.load(ptr + offs_n // GROUP_N * stride + first // GROUP_K)


@triton.jit
def scaled(d, a_scale, b_scale, ONE: tl.constexpr):
    """d [M, N] times a_scale [M] and b_scale [N]; ONE: b_scale is one number."""
    if ONE:
        d *= (a_scale * b_scale)[:, None]
    else:
        d *= a_scale[:, None] * b_scale[None, :]
    return d


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _moe_gate_up_kernel(h_ptr, h_scale_ptr, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, weights_ptr, expert_ptr, sorted_ptr,
                        end_ptr, map_ptr, pairs, routed, experts, blocks, stride_x, stride_we, stride_wn, stride_se,
                        stride_sn, N, K, TOP_K: tl.constexpr, SCALED: tl.constexpr, ACTIVATION: tl.constexpr,
                        DTYPE: tl.constexpr, LIMIT: tl.constexpr, BELOW: tl.constexpr, GROUP_N: tl.constexpr,
                        GROUP_K: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
                        SWAP: tl.constexpr, UNROLL: tl.constexpr, GROUP_M: tl.constexpr, XCDS: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """h [pairs, N] = act(gate) * up for BLOCK_M pairs of one expert and BLOCK_N columns, rounded to DTYPE. x is
    quantized here if the weights are scaled per block and x_scale_ptr is None, h if h_scale_ptr is not None."""
    block, tile = tile_of_program(tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    if block >= blocks:
        return
    offs_m = tl.arange(0, BLOCK_M)
    if sorted_ptr is None:  # a block has one pair
        pair = tl.where(offs_m == 0, block, pairs)
    else:
        if block * BLOCK_M >= tl.load(end_ptr):
            return
        pair = tl.load(sorted_ptr + block * BLOCK_M + offs_m)
    expert = local_expert(tl.load(expert_ptr + block), map_ptr, routed, experts)
    if expert < 0:
        return
    mask_m = pair < pairs
    pair = tl.minimum(pair, pairs - 1)
    token = pair // TOP_K
    offs_a = (token.to(tl.int64) if WIDE else token) * stride_x
    # In small blocks most rows may be padding, which is then not read; in large ones a mask would cost registers.
    mask_a = mask_m if BLOCK_M <= 32 else None

    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = columns < N
    offs_n = tl.minimum(columns, N - 1)  # readable; stores use `columns`, which are known to be contiguous
    w_ptr += expert.to(tl.int64) * stride_we
    edge = None if EVEN else K
    if SCALED != UNSCALED:
        w_scale_ptr += expert.to(tl.int64) * stride_se
    if SWAP:  # rows of gate, then rows of up, are the left operand
        half = tl.arange(0, 2 * BLOCK_N)
        row = tl.minimum(tile * BLOCK_N + half % BLOCK_N, N - 1) + half // BLOCK_N * N
        both = tl.zeros([2 * BLOCK_N, BLOCK_M], tl.float32)
    else:
        row = tile * BLOCK_N if ONE else offs_n
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_w = (row if SWAP else offs_n) * stride_wn
    up_ptr = w_ptr + N * stride_wn

    for first in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        a = load_steps(x_ptr, offs_a, first, edge, mask_a, SWAP, BLOCK_K)
        b = load_steps(w_ptr, offs_w, first, edge, None, not SWAP, BLOCK_K)
        if SCALED == PER_BLOCK:
            if x_scale_ptr is None:
                wide = a.to(tl.float32)
                a, a_scale = quantized(wide, row_amax(wide, SWAP), LIMIT, BELOW, SWAP, b.dtype)
            else:
                a_scale = tl.load(x_scale_ptr + token * tl.cdiv(K, GROUP_K) + first // GROUP_K)
            b_scale = block_scale(w_scale_ptr, row, first, stride_sn, GROUP_N, GROUP_K)
        if SWAP:
            d = product(b, a, SCALED != UNSCALED)
            both += scaled(d, b_scale, a_scale, False) if SCALED == PER_BLOCK else d
        else:
            c = load_steps(up_ptr, offs_w, first, edge, None, True, BLOCK_K)
            d = product(a, b, SCALED != UNSCALED)
            e = product(a, c, SCALED != UNSCALED)
            if SCALED == PER_BLOCK:
                c_scale = block_scale(w_scale_ptr, row + N, first, stride_sn, GROUP_N, GROUP_K)
                d = scaled(d, a_scale, b_scale, ONE)
                e = scaled(e, a_scale, c_scale, ONE)
            gate += d
            up += e
    if SWAP:
        gate, up = tl.split(tl.permute(tl.reshape(both, (2, BLOCK_N, BLOCK_M)), (2, 1, 0)))
    if SCALED == PER_ROW:
        a_scale = tl.load(x_scale_ptr + token)
        gate = scaled(gate, a_scale, tl.load(w_scale_ptr + offs_n * stride_sn), False)
        up = scaled(up, a_scale, tl.load(w_scale_ptr + (offs_n + N) * stride_sn), False)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pair)[:, None]
        gate *= weight
        up *= weight
    h = activated(gate, up, ACTIVATION)
    mask = mask_m[:, None] & mask_n[None, :]
    offs_h = pair.to(tl.int64)[:, None] * N + columns[None, :]
    if h_scale_ptr is None:
        tl.store(h_ptr + offs_h, h.to(h_ptr.dtype.element_ty), mask=mask)
    else:  # a tile is one group wide
        h = tl.where(mask_n[None, :], h.to(DTYPE).to(tl.float32), 0.0)
        q, scale = quantized(h, row_amax(h, False), LIMIT, BELOW, False, h_ptr.dtype.element_ty)
        tl.store(h_ptr + offs_h, q, mask=mask)
        tl.store(h_scale_ptr + pair * tl.cdiv(N, BLOCK_N) + tile, scale, mask=mask_m)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _moe_down_kernel(y_ptr, h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, weights_ptr, expert_ptr, sorted_ptr, end_ptr,
                     map_ptr, pairs, routed, experts, blocks, stride_we, stride_wn, stride_se, stride_sn, N, K,
                     SCALED: tl.constexpr, LIMIT: tl.constexpr, BELOW: tl.constexpr, GROUP_N: tl.constexpr,
                     GROUP_K: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
                     SWAP: tl.constexpr, GROUP_M: tl.constexpr, XCDS: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [pairs, N] = weight * h w^T for BLOCK_M pairs of one expert and BLOCK_N columns. h is quantized here if the
    weights are scaled per block and h_scale_ptr is None."""
    block, tile = tile_of_program(tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    if block >= blocks:
        return
    if block * BLOCK_M >= tl.load(end_ptr):
        return
    expert = local_expert(tl.load(expert_ptr + block), map_ptr, routed, experts)
    if expert < 0:
        return
    pair = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    mask_m = pair < pairs
    pair = tl.minimum(pair, pairs - 1)
    offs_a = (pair.to(tl.int64) if WIDE else pair) * K
    mask_a = mask_m if BLOCK_M <= 32 else None

    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = columns < N
    offs_n = tl.minimum(columns, N - 1)  # readable; stores use `columns`, which are known to be contiguous
    offs_w = offs_n * stride_wn
    w_ptr += expert.to(tl.int64) * stride_we
    edge = None if EVEN else K
    if SCALED != UNSCALED:
        w_scale_ptr += expert.to(tl.int64) * stride_se
    row = tile * BLOCK_N if ONE and not SWAP else offs_n

    y = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = load_steps(h_ptr, offs_a, first, edge, mask_a, SWAP, BLOCK_K)
        b = load_steps(w_ptr, offs_w, first, edge, None, not SWAP, BLOCK_K)
        if SCALED == PER_BLOCK:
            if h_scale_ptr is None:
                wide = a.to(tl.float32)
                a, a_scale = quantized(wide, row_amax(wide, SWAP), LIMIT, BELOW, SWAP, b.dtype)
            else:
                a_scale = tl.load(h_scale_ptr + pair * tl.cdiv(K, GROUP_K) + first // GROUP_K)
            b_scale = block_scale(w_scale_ptr, row, first, stride_sn, GROUP_N, GROUP_K)
        d = product(b, a, SCALED != UNSCALED) if SWAP else product(a, b, SCALED != UNSCALED)
        if SCALED == PER_BLOCK:
            d = scaled(d, b_scale, a_scale, False) if SWAP else scaled(d, a_scale, b_scale, ONE)
        y += d
    if SWAP:
        y = tl.trans(y)
    if SCALED == PER_ROW:
        y = scaled(y, tl.load(h_scale_ptr + pair), tl.load(w_scale_ptr + offs_n * stride_sn), False)
    if weights_ptr is not None:
        y *= tl.load(weights_ptr + pair)[:, None]
    offs_y = pair.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["routed", "experts"])
def _moe_combine_kernel(out_ptr, y_ptr, ids_ptr, map_ptr, routed, experts, N, TOP_K: tl.constexpr,
                        BLOCK: tl.constexpr):
    """out [tokens, N]: for each token the sum of its pairs' rows of y, in order. Rows of pairs without a local expert
    are not initialized, and not read."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        expert = local_expert(tl.load(ids_ptr + token * TOP_K + j), map_ptr, routed, experts)
        columns = tl.where(expert >= 0, N, 0)
        acc += tl.load(y_ptr + (token * TOP_K + j) * N + offs, mask=offs < columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < N)


@triton.jit(do_not_specialize=["routed", "experts"])
def _moe_down_few_kernel(out_ptr, h_ptr, w_ptr, w_scale_ptr, weights_ptr, ids_ptr, map_ptr, routed, experts, stride_we,
                         stride_wn, stride_se, stride_sn, N, K, TOP_K: tl.constexpr, SCALED: tl.constexpr,
                         LIMIT: tl.constexpr, BELOW: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
                         EVEN: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_K: tl.constexpr):
    """out [tokens, N] for one token and BLOCK_N columns. The left operand has rows (j, n) of the weights of the token's
    BLOCK_J experts, the right one the rows of h of its pairs. Only products of a pair with its own expert are used. The
    others are free, since a matrix instruction has 16 columns anyway, and no load waits for another expert's sum."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK_J * BLOCK_N)
    offs_j = rows // BLOCK_N
    offs_n = tl.minimum(tl.program_id(0) * BLOCK_N + rows % BLOCK_N, N - 1)
    ids_ptr += token * TOP_K
    expert = local_expert(tl.load(ids_ptr + offs_j, mask=offs_j < TOP_K, other=-1), map_ptr, routed, experts)
    is_local = expert >= 0
    expert = tl.maximum(expert, 0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    column = local_expert(tl.load(ids_ptr + offs_c, mask=offs_c < TOP_K, other=-1), map_ptr, routed, experts) >= 0
    offs_h = offs_c * K
    h_ptr += token * TOP_K * K
    offs_w = expert * stride_we + offs_n * stride_wn
    edge = None if EVEN else K
    if SCALED != UNSCALED:
        w_scale_ptr += expert * stride_se
    if SCALED == PER_ROW:
        amax = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, K, BLOCK_K):
            h = load_steps(h_ptr, offs_h, first, edge, column, True, BLOCK_K)
            amax = tl.maximum(amax, row_amax(h.to(tl.float32), True))

    y = tl.zeros([BLOCK_J * BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, K, BLOCK_K):
        w = load_steps(w_ptr, offs_w, first, edge, is_local, False, BLOCK_K)
        h = load_steps(h_ptr, offs_h, first, edge, column, True, BLOCK_K)
        if SCALED == UNSCALED:
            y += product(w, h, False)
        else:
            wide = h.to(tl.float32)
            h, h_scale = quantized(wide, row_amax(wide, True) if SCALED == PER_BLOCK else amax, LIMIT, BELOW, True,
                                   w.dtype)
            d = product(w, h, True)
            if SCALED == PER_BLOCK:
                d = scaled(d, block_scale(w_scale_ptr, offs_n, first, stride_sn, GROUP_N, GROUP_K), h_scale, False)
            y += d
    if SCALED == PER_ROW:
        y = scaled(y, tl.load(w_scale_ptr + offs_n * stride_sn), scales(amax, LIMIT, BELOW)[0], False)
    if weights_ptr is not None:
        y *= tl.load(weights_ptr + token * TOP_K + offs_c, mask=offs_c < TOP_K, other=0.0)[None, :]
    y = tl.where(is_local[:, None] & (offs_j[:, None] == offs_c[None, :]), y, 0.0)
    acc = tl.sum(tl.reshape(tl.sum(y, 1), (BLOCK_J, BLOCK_N)), 0)
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + token * N + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < N)
