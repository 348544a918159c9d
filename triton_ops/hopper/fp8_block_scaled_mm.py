"""fp8_block_scaled_mm's kernel for Hopper, in Gluon: producer and consumer waves, persistent programs.

The trick: one wave only copies tiles of both operands to shared memory (TMA), several blocks of K ahead, across tiles
of the result; two teams of four waves multiply half of the rows each. A team has two blocks of K in flight, and scales
and adds one while the other is multiplied. Programs are persistent and iterate over tiles.
Bound by: the matrix units, and the L2 cache, from which tiles of 128 x 128 read 7 TB/s.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import fp8_block_scaled_mm
from wave64.tuning import Tuning

# Renamed after Triton 3.6.
start_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
TEAM = gl.constexpr(64)  # rows of a matrix instruction, and of a team
COLUMNS = gl.constexpr(128)  # of a tile
#: Blocks of K in shared memory.
STAGES = 4


@gluon.jit
def _tile_origin(tile, m, n, GROUP_M: gl.constexpr):
    """(first row, first column) of a tile. Tiles are ordered in groups of GROUP_M rows, column by column, so that the
    tiles that run at a time read from L2."""
    rows, columns = gl.cdiv(m, 2 * TEAM), gl.cdiv(n, COLUMNS)
    group = tile // (GROUP_M * columns)
    height = gl.minimum(rows - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * columns)
    return (group * GROUP_M + within % height) * (2 * TEAM), within // height * COLUMNS


@gluon.jit
def _tiles(m, n):
    return gl.cdiv(m, 2 * TEAM) * gl.cdiv(n, COLUMNS)


@gluon.jit
def _copy(a_desc, b_desc, a_lds, b_lds, full, empty, m, n, k, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
          GROUP_M: gl.constexpr):
    """The producer wave. A stage is full when its bytes have arrived, and empty when both teams have read it."""
    step = 0
    for tile in range(gl.program_id(0), _tiles(m, n), gl.num_programs(0)):
        row, column = _tile_origin(tile, m, n, GROUP_M)
        for block in range(0, k, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            barrier = full.index(stage)
            mbarrier.expect(barrier, (2 * TEAM + COLUMNS) * BLOCK_K)
            start_load(a_desc, [row, block], barrier, a_lds.index(2 * stage))
            start_load(a_desc, [row + TEAM, block], barrier, a_lds.index(2 * stage + 1))
            start_load(b_desc, [column, block], barrier, b_lds.index(stage))
            step += 1


@gluon.jit
def _start_product(a_lds, b_lds, full, step, zeros, TEAM_ID: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of a block of K, asynchronously."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    return warpgroup_mma(a_lds.index(2 * stage + TEAM_ID), b_lds.index(stage).permute((1, 0)), zeros, use_acc=False,
                         is_async=True)


@gluon.jit
def add_scaled(acc, partial, scales):
    """acc + partial * scales, one scale per row."""
    return gl.fma(partial, gl.expand_dims(scales, 1) + gl.zeros_like(acc), acc)


@gluon.jit
def _multiply(TEAM_ID: gl.constexpr, c_ptr, a_scale_ptr, b_scale_ptr, a_lds, b_lds, full, empty, m, n, k, stride_c,
              stride_am, stride_ak, stride_bn, stride_bk, SCALED_N: gl.constexpr, BLOCK_K: gl.constexpr,
              STAGES: gl.constexpr, GROUP_M: gl.constexpr):
    """A consumer team: 64 rows of each tile. It takes two blocks of K per iteration and loads scales two ahead."""
    mma_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                         instr_shape=[16, COLUMNS, 32])
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    zeros = gl.zeros([TEAM, COLUMNS], gl.float32, mma_layout)
    blocks = gl.cdiv(k, BLOCK_K)
    step = 0
    for tile in range(gl.program_id(0), _tiles(m, n), gl.num_programs(0)):
        row, column = _tile_origin(tile, m, n, GROUP_M)
        row += TEAM_ID * TEAM
        rows = gl.minimum(row + gl.arange(0, TEAM, gl.SliceLayout(1, mma_layout)), m - 1)
        a_scales = a_scale_ptr + rows.to(gl.int64) * stride_am
        b_scales = b_scale_ptr + column // SCALED_N * stride_bn
        second = gl.minimum(1, blocks - 1)
        a_scale, b_scale = gl.load(a_scales), gl.load(b_scales)
        a_scale2, b_scale2 = gl.load(a_scales + second * stride_ak), gl.load(b_scales + second * stride_bk)
        acc = zeros
        for block in range(0, blocks - 1, 2):
            partial = _start_product(a_lds, b_lds, full, step, zeros, TEAM_ID, STAGES)
            partial2 = _start_product(a_lds, b_lds, full, step + 1, zeros, TEAM_ID, STAGES)
            scales, scales2 = a_scale * b_scale, a_scale2 * b_scale2
            first, second = gl.minimum(block + 2, blocks - 1), gl.minimum(block + 3, blocks - 1)
            a_scale, b_scale = gl.load(a_scales + first * stride_ak), gl.load(b_scales + first * stride_bk)
            a_scale2, b_scale2 = gl.load(a_scales + second * stride_ak), gl.load(b_scales + second * stride_bk)
            partial = warpgroup_mma_wait(1, deps=[partial])
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            acc = add_scaled(acc, partial, scales)
            partial2 = warpgroup_mma_wait(0, deps=[partial2])
            mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
            acc = add_scaled(acc, partial2, scales2)
            step += 2
        if blocks % 2 == 1:
            partial = _start_product(a_lds, b_lds, full, step, zeros, TEAM_ID, STAGES)
            partial = warpgroup_mma_wait(0, deps=[partial])
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            acc = add_scaled(acc, partial, a_scale * b_scale)
            step += 1
        out = gl.convert_layout(acc.to(c_ptr.dtype.element_ty), store_layout)
        rows_out = row + gl.arange(0, TEAM, gl.SliceLayout(1, store_layout))
        columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, store_layout))
        offs = gl.expand_dims(rows_out.to(gl.int64) * stride_c, 1) + gl.expand_dims(columns, 0)
        gl.store(c_ptr + offs, out, mask=gl.expand_dims(rows_out < m, 1) & gl.expand_dims(columns < n, 0))


@gluon.jit(do_not_specialize=["m", "stride_am", "stride_ak", "stride_bn", "stride_bk"])
def _fp8_block_scaled_mm_hopper_kernel(c_ptr, a_desc, b_desc, a_scale_ptr, b_scale_ptr, m, n, k, stride_c, stride_am,
                                       stride_ak, stride_bn, stride_bk, SCALED_N: gl.constexpr, BLOCK_K: gl.constexpr,
                                       STAGES: gl.constexpr, GROUP_M: gl.constexpr):
    """One program: every num_programs-th tile of 128 rows and 128 columns."""
    a_lds = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, TEAM, BLOCK_K], a_desc.layout)
    b_lds = gl.allocate_shared_memory(b_desc.dtype, [STAGES, COLUMNS, BLOCK_K], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [(_multiply, (0, c_ptr, a_scale_ptr, b_scale_ptr, a_lds, b_lds, full, empty, m, n, k, stride_c, stride_am,
                      stride_ak, stride_bn, stride_bk, SCALED_N, BLOCK_K, STAGES, GROUP_M)),
         (_multiply, (1, c_ptr, a_scale_ptr, b_scale_ptr, a_lds, b_lds, full, empty, m, n, k, stride_c, stride_am,
                      stride_ak, stride_bn, stride_bk, SCALED_N, BLOCK_K, STAGES, GROUP_M)),
         (_copy, (a_desc, b_desc, a_lds, b_lds, full, empty, m, n, k, BLOCK_K, STAGES, GROUP_M))],
        [4, 1], [232, 24])


@dataclass(frozen=True)
class Config:
    """How the kernel is launched; tiles are 128 x 128."""

    group_m: int = 8    # rows of tiles in a group, see _tile_origin


def candidates(arch: Arch, **others) -> list[Config]:
    """What the tuner tries."""
    return [Config(group_m) for group_m in (2, 4, 8, 16)]


def work(config: Config, **others) -> int:
    """Products that a block computes at a time, in thousands."""
    return 128 * 128 * 128 // 1024


def key(a: Tensor, b: Tensor, **others) -> dict[str, int]:
    """The tuning key of a call."""
    return {"m": a.shape[0], "n": b.shape[0], "k": a.shape[1]}


TUNING = Tuning("fp8_block_scaled_mm", config=Config, key=key, buckets={"m": (2048,), "n": (2048,), "k": (1024,)},
                candidates=candidates, work=work, backend="hopper")
#: With fewer rows the portable kernel is faster, as measured on an H200: its tiles are smaller.
MIN_ROWS = 257


def unsupported(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
                out_dtype: torch.dtype) -> str | None:
    """The reason why this kernel does not support these operands, or None. A tile lies in one block of b, and TMA
    copies its rows."""
    if a.shape[0] < MIN_ROWS:
        return f"is slower than triton below {MIN_ROWS} rows"
    if block_shape[1] != 128 or block_shape[0] % COLUMNS.value:
        return f"takes blocks of a multiple of 128 rows and of 128 columns, not {block_shape}"
    if out_dtype not in (torch.bfloat16, torch.float16):
        return f"gives bf16 or fp16, not {out_dtype}"
    if b.shape[0] % 8 or not b.numel():
        return "takes a multiple of 8 columns of the result, and at least one of the factors"
    if any(x.data_ptr() % 16 or x.stride(0) % 16 for x in (a, b)):
        return "copies rows 16 bytes at a time, these are not aligned to that"
    return None


@fp8_block_scaled_mm.backend("hopper", tuning=TUNING, supports=unsupported)
def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
        out_dtype: torch.dtype) -> Tensor:
    out = torch.empty((len(a), len(b)), dtype=out_dtype, device=a.device)
    launch(out, a, b, a_scale, b_scale, block_shape, TUNING.choose(**key(a, b)).group_m)
    return out


def launch(out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
           group_m: int) -> None:
    """out [M, N] = a [M, K] @ b [N, K].T, scaled per block."""
    (m, k), n, block_k = a.shape, b.shape[0], block_shape[1]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    descriptors = (TensorDescriptor.from_tensor(a, [TEAM.value, block_k], layout),
                   TensorDescriptor.from_tensor(b, [COLUMNS.value, block_k], layout))
    grid = min(platform.compute_units(), triton.cdiv(m, 2 * TEAM.value) * triton.cdiv(n, COLUMNS.value))
    _fp8_block_scaled_mm_hopper_kernel[grid,](
        out, *descriptors, a_scale, b_scale, m, n, k, out.stride(0), *a_scale.stride(), *b_scale.stride(),
        SCALED_N=block_shape[0], BLOCK_K=block_k, STAGES=STAGES, GROUP_M=group_m, num_warps=4)
