"""prefill_attention's kernel for Hopper, in Gluon: a wave that copies, two teams of four waves that attend.

The trick: one wave copies pages of keys and values to shared memory (TMA), two blocks ahead and across tiles. Each team
has 64 queries; it starts the product of the next keys, then that of the last weights and values, and makes weights of
the next scores while the second runs. Programs are persistent, and take tiles of one sequence from the longest on, in a
snake. That teams take turns at starting products was tried and left: they fall into step by themselves.
Bound by: the matrix units.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wave64 import platform
from wave64.ops import prefill_attention
from wave64.triton_ops.hopper.fp8_block_scaled_mm import start_load
from wave64.triton_ops.hopper.fused_moe import PUBLIC
from wave64.triton_ops.hopper.mla_decode import LN_2, LOG2_E, LOWEST, barrier

TEAM = gl.constexpr(64)  # queries of a team
KEYS = gl.constexpr(128)  # of a block
DIM = gl.constexpr(128)  # of a head
HALF = gl.constexpr(64)  # columns of a copy: 128 bytes, which shared memory swizzles
STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory
LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _as_tiles(lds, TILES: gl.constexpr, ROWS: gl.constexpr):
    """Copied pieces of HALF columns as tiles [ROWS, DIM], whose left half lies before the right one."""
    if PUBLIC:
        tiles = lds.reinterpret(lds.dtype, [TILES, ROWS, DIM], LAYOUT)
    else:
        tiles = lds._reinterpret(lds.dtype, [TILES, ROWS, DIM], LAYOUT)
    return tiles


@gluon.jit
def _rounds(total):
    """How many of `total` tiles this program takes."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    last = total // programs
    index = program if last % 2 == 0 else programs - 1 - program
    return last + (index < total % programs).to(gl.int32)


@gluon.jit
def _tile(number, new, before, length, heads, CAUSAL: gl.constexpr):
    """(first row, head, blocks of keys) of the tile that this program takes in round `number`."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    index = number * programs + (program if number % 2 == 0 else programs - 1 - program)
    row = (gl.cdiv(new, 2 * TEAM) - 1 - index // heads) * (2 * TEAM)
    keys = gl.minimum(length, before + row + 2 * TEAM) if CAUSAL else length
    return row, index % heads, gl.maximum(gl.cdiv(keys, KEYS), 1)


@gluon.jit
def _sequence(starts_ptr, seq_lens_ptr, capacity):
    """(first row, new tokens, length) of this program's sequence."""
    seq = gl.program_id(1)
    start = gl.load(starts_ptr + seq)
    return start, gl.load(starts_ptr + seq + 1) - start, gl.minimum(gl.load(seq_lens_ptr + seq), capacity)


@gluon.jit
def _copy_block(desc, lds, full, empty, table_ptr, step, block, last, column, PAGE_SIZE: gl.constexpr,
                BOX: gl.constexpr):
    """Start to copy a block of keys or values, whose pages are read up to that of the position `last`."""
    PARTS: gl.constexpr = KEYS // BOX
    stage = step % STAGES
    first = block * KEYS
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    ready = full.index(stage)
    mbarrier.expect(ready, KEYS * DIM * 2)
    for part in gl.static_range(PARTS):
        at = gl.minimum(first + part * BOX, last)
        row = gl.load(table_ptr + at // PAGE_SIZE) * PAGE_SIZE + at % PAGE_SIZE // BOX * BOX
        piece = stage * (2 * PARTS) + part
        start_load(desc, [row, column], ready, lds.index(piece))
        start_load(desc, [row, column + HALF], ready, lds.index(piece + PARTS))


@gluon.jit
def _copy(q_desc, k_desc, v_desc, table_ptr, starts_ptr, seq_lens_ptr, q_lds, k_lds, v_lds, q_full, q_empty, k_full,
          k_empty, v_full, v_empty, capacity, heads, stride_tb, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
          PAGE_SIZE: gl.constexpr, BOX: gl.constexpr):
    """The producer wave. A stage is full when its bytes have arrived, and empty when both teams have read it."""
    start, new, length = _sequence(starts_ptr, seq_lens_ptr, capacity)
    table_ptr += gl.program_id(1).to(gl.int64) * stride_tb
    last = gl.maximum(length - 1, 0)
    step = 0
    for number in range(0, _rounds(gl.cdiv(new, 2 * TEAM) * heads)):
        row, head, blocks = _tile(number, new, length - new, length, heads, CAUSAL)
        mbarrier.wait(q_empty, (number & 1) ^ 1)
        mbarrier.expect(q_full, 2 * TEAM * DIM * 2)
        for team in gl.static_range(2):
            for half in gl.static_range(2):
                start_load(q_desc, [start + row + team * TEAM, head * DIM + half * HALF], q_full,
                           q_lds.index(2 * team + half))
        column = head // GROUP * DIM
        _copy_block(k_desc, k_lds, k_full, k_empty, table_ptr, step, blocks - 1, last, column, PAGE_SIZE, BOX)
        for block in range(blocks - 2, -1, -1):
            _copy_block(k_desc, k_lds, k_full, k_empty, table_ptr, step + 1, block, last, column, PAGE_SIZE, BOX)
            _copy_block(v_desc, v_lds, v_full, v_empty, table_ptr, step, block + 1, last, column, PAGE_SIZE, BOX)
            step += 1
        _copy_block(v_desc, v_lds, v_full, v_empty, table_ptr, step, 0, last, column, PAGE_SIZE, BOX)
        step += 1


@gluon.jit
def _clear(v_lds, stage, valid, BOX: gl.constexpr):
    """Zero the values of a block from the row `valid` on: what lies behind a sequence's end may be NaN."""
    PARTS: gl.constexpr = KEYS // BOX
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, BOX, gl.SliceLayout(1, layout)), 1)
    for part in range(valid // BOX, PARTS):
        for half in gl.static_range(2):
            piece = v_lds.index(stage * (2 * PARTS) + half * PARTS + part)
            values = piece.load(layout)
            barrier()
            piece.store(gl.where(part * BOX + rows < valid, values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _weights(s, row_max, row_sum, first, limit, scale, MASKED: gl.constexpr):
    """(weights, maximum, sum, factor of what was summed before) with the scores of keys from `first` on."""
    layout: gl.constexpr = s.type.layout
    if MASKED:
        keys = first + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        s = gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(limit, 1), s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(new_max, 1))
    rescale = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _step(q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, step, p, acc, row_max, row_sum, first, limit, scale,
          MASKED: gl.constexpr):
    """Scores of a block of keys, and the product of the weights and values of the block before."""
    layout: gl.constexpr = acc.type.layout
    stage, before = step % STAGES, (step - 1) % STAGES
    zeros = gl.zeros([TEAM, KEYS], gl.float32, layout)
    mbarrier.wait(k_full.index(stage), step // STAGES & 1)
    s = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, row_max, row_sum, rescale = _weights(s, row_max, row_sum, first, limit, scale, MASKED)
    weights = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    # What gives back the weights waits for them, and the assembler moves nothing across a loop, even one that ends at
    # once, as this one. Without either the exponentials came behind the wait for the product.
    mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
    acc, p, weights, row_sum = warpgroup_mma_wait(0, deps=[acc, p, weights, row_sum])
    mbarrier.arrive(v_empty.index(before), count=1)
    return weights, acc * gl.expand_dims(rescale, 1), row_max, row_sum


@gluon.jit
def _attend(TEAM_ID: gl.constexpr, out_ptr, lse_ptr, starts_ptr, seq_lens_ptr, q_lds, k_lds, v_lds, q_full, q_empty,
            k_full, k_empty, v_full, v_empty, scale, capacity, heads, CAUSAL: gl.constexpr, BOX: gl.constexpr):
    """A consumer team: 64 queries of each tile, from the last block of keys, which may be masked, to the first."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    dtype: gl.constexpr = q_lds.dtype
    q = _as_tiles(q_lds, 2, TEAM).index(TEAM_ID)
    k_tiles, v_tiles = _as_tiles(k_lds, STAGES, KEYS), _as_tiles(v_lds, STAGES, KEYS)
    start, new, length = _sequence(starts_ptr, seq_lens_ptr, capacity)
    scale *= LOG2_E
    step = 0
    for number in range(0, _rounds(gl.cdiv(new, 2 * TEAM) * heads)):
        row, head, blocks = _tile(number, new, length - new, length, heads, CAUSAL)
        row += TEAM_ID * TEAM
        first = (blocks - 1) * KEYS
        limit = gl.full([TEAM], 0, gl.int32, rows) + length
        if CAUSAL:
            limit = gl.minimum(limit, length - new + row + 1 + gl.arange(0, TEAM, rows))
        mbarrier.wait(q_full, number & 1)
        mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1)
        zeros = gl.zeros([TEAM, KEYS], gl.float32, layout)
        s = warpgroup_mma(q, k_tiles.index(step % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(step % STAGES), count=1)
        row_max = gl.full([TEAM], LOWEST, gl.float32, rows)
        weights, row_max, row_sum, rescale = _weights(s, row_max, gl.zeros([TEAM], gl.float32, rows), first, limit,
                                                      scale, True)
        p = gl.convert_layout(weights.to(dtype), p_layout)
        acc = gl.zeros([TEAM, DIM], gl.float32, layout)
        if first + KEYS > length:
            mbarrier.wait(v_full.index(step % STAGES), step // STAGES & 1)
            _clear(v_lds, step % STAGES, gl.maximum(length - first, 0), BOX)
        unmasked = blocks - 1
        if CAUSAL:  # up to the last block that all of the queries see
            unmasked = gl.minimum(gl.maximum(length - new + row + 1, 0) // KEYS, unmasked)
        for block in range(blocks - 2, unmasked - 1, -1):
            step += 1
            p, acc, row_max, row_sum = _step(q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, step, p, acc,
                                             row_max, row_sum, block * KEYS, limit, scale, True)
        for block in range(unmasked - 1, -1, -1):
            step += 1
            p, acc, row_max, row_sum = _step(q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, step, p, acc,
                                             row_max, row_sum, block * KEYS, limit, scale, False)
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(v_full.index(step % STAGES), step // STAGES & 1)
        acc = warpgroup_mma(p, v_tiles.index(step % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(step % STAGES), count=1)
        step += 1
        none = row_sum == 0.0
        acc = acc * gl.expand_dims(1.0 / gl.where(none, 1.0, row_sum), 1)
        lse = gl.where(none, float("-inf"), row_max * LN_2 + gl.log(gl.where(none, 1.0, row_sum)))
        at = row + gl.arange(0, TEAM, rows)
        gl.store(lse_ptr + (start + at).to(gl.int64) * heads + head, lse, mask=at < new)
        out = gl.convert_layout(acc.to(dtype), store_layout)
        at = row + gl.arange(0, TEAM, gl.SliceLayout(1, store_layout))
        offs = gl.expand_dims(((start + at).to(gl.int64) * heads + head) * DIM, 1)
        columns = gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, store_layout)), 0)
        gl.store(out_ptr + offs + columns, out, mask=gl.expand_dims(at < new, 1) & (columns >= 0))


@gluon.jit(do_not_specialize=["capacity", "stride_tb"])
def _prefill_attention_hopper_kernel(out_ptr, lse_ptr, q_desc, k_desc, v_desc, table_ptr, starts_ptr, seq_lens_ptr,
                                     scale, capacity, heads, stride_tb, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
                                     PAGE_SIZE: gl.constexpr, BOX: gl.constexpr):
    """One program: every num_programs-th tile of 128 queries and a head of one sequence."""
    PIECES: gl.constexpr = STAGES * 2 * (KEYS // BOX)
    q_lds = gl.allocate_shared_memory(q_desc.dtype, [4, TEAM, HALF], LAYOUT)
    k_lds = gl.allocate_shared_memory(k_desc.dtype, [PIECES, BOX, HALF], LAYOUT)
    v_lds = gl.allocate_shared_memory(v_desc.dtype, [PIECES, BOX, HALF], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [(_attend, (0, out_ptr, lse_ptr, starts_ptr, seq_lens_ptr, q_lds, k_lds, v_lds, q_full, q_empty, k_full,
                    k_empty, v_full, v_empty, scale, capacity, heads, CAUSAL, BOX)),
         (_attend, (1, out_ptr, lse_ptr, starts_ptr, seq_lens_ptr, q_lds, k_lds, v_lds, q_full, q_empty, k_full,
                    k_empty, v_full, v_empty, scale, capacity, heads, CAUSAL, BOX)),
         (_copy, (q_desc, k_desc, v_desc, table_ptr, starts_ptr, seq_lens_ptr, q_lds, k_lds, v_lds, q_full, q_empty,
                  k_full, k_empty, v_full, v_empty, capacity, heads, stride_tb, GROUP, CAUSAL, PAGE_SIZE, BOX))],
        [4, 1], [240, 24])


#: With fewer new tokens the portable kernel can be faster, as measured on an H200: its tiles are smaller.
MIN_ROWS = 128


def unsupported(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
                seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
                logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
                v_scale: Tensor | None = None) -> str | None:
    """The reason why this kernel does not support these arguments, or None. TMA copies whole rows of a pool, and pages
    or parts of them make up a block of keys."""
    if max_seqlen_q < MIN_ROWS:
        return f"is slower than triton below {MIN_ROWS} new tokens"
    if query.dtype not in (torch.bfloat16, torch.float16) or key_cache.dtype != query.dtype:
        return f"attends in bf16 or fp16 to a cache of the same dtype, not with {query.dtype} to {key_cache.dtype}"
    if query.shape[2] != DIM.value:
        return f"takes heads of {DIM.value} columns, not {query.shape[2]}"
    if sliding_window > 0 or logit_cap > 0 or sinks is not None or scale <= 0:
        return "has no sliding window, cap or sinks, and takes a scale above 0"
    page_size = key_cache.shape[1]
    if page_size < 8 or page_size & (page_size - 1):
        return f"takes pages of a power of two of tokens, 8 or more, not {page_size}"
    if not key_cache.numel() or not query.numel() or not page_table.numel():
        return "takes at least one query and one page"
    for x in (query[None], key_cache, value_cache):
        if x.data_ptr() % 16 or x.stride(1) % 8 or x.stride(2) != DIM.value or (
                len(x) > 1 and x.stride(0) != x.stride(1) * x.shape[1]):
            return "copies rows of all heads, which lie side by side, aligned to 16 bytes"
    return None


def _rows(x: Tensor, height: int) -> TensorDescriptor:
    """The rows of x [..., heads, DIM], of which pieces of `height` rows and HALF columns are copied."""
    flat = x.as_strided((x.shape[:-2].numel(), x.shape[-2] * DIM.value), (x.stride(-3), 1))
    return TensorDescriptor.from_tensor(flat, [height, HALF.value], LAYOUT.value)


@prefill_attention.backend("hopper", supports=unsupported)
def run(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens_q: Tensor,
        seq_lens: Tensor, max_seqlen_q: int, scale: float, causal: bool = True, sliding_window: int = -1,
        logit_cap: float = 0.0, sinks: Tensor | None = None, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (tokens, heads, _), page_size = query.shape, key_cache.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=query.device)
    box = min(page_size, KEYS.value)
    programs = min(platform.compute_units(), triton.cdiv(max_seqlen_q, 2 * TEAM.value) * heads)
    _prefill_attention_hopper_kernel[programs, len(seq_lens)](
        out, lse, _rows(query, TEAM.value), _rows(key_cache, box), _rows(value_cache, box), page_table, cu_seqlens_q,
        seq_lens, float(scale), page_table.shape[1] * page_size, heads, page_table.stride(0),
        GROUP=heads // key_cache.shape[2], CAUSAL=causal, PAGE_SIZE=page_size, BOX=box, num_warps=4)
    return out, lse
