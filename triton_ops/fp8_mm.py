"""What the FP8 GEMMs share: tiles and their order, the loop over K, split K and its merge, and the launch.

Both operands are contiguous along K, as the matrix cores need them, and stay FP8: the loop has no conversion. Few
tokens make few tiles, so K is split among programs until the GPU is full, and a second launch adds the partial sums,
always in the same order. Bound by reading the weights up to about 64 tokens, by the matrix cores from a few hundred on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from wave64 import platform
from wave64.arch import Arch
from wave64.triton_ops.attention import dot, is_wide
from wave64.triton_ops.geometry import matrix_options, num_stages, num_warps
from wave64.triton_ops.splits import overlaps
from wave64.tuning import Tuning

#: Elements per program of the merge.
MERGED = 1024


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr, XCDS: tl.constexpr):
    """(row, column) of a program's tile. Programs are assigned to chiplets round robin; each chiplet gets a range of
    tiles, ordered in groups of GROUP_M rows, column by column, so that programs that run together read the same rows of
    both operands."""
    item = tl.program_id(0)
    if XCDS > 1:
        xcd, steps_per_split, more = item % XCDS, tiles_m * tiles_n // XCDS, tiles_m * tiles_n % XCDS
        item = xcd * steps_per_split + tl.minimum(xcd, more) + item // XCDS
    first = item // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    position = item % (GROUP_M * tiles_n)
    return first + position % rows, position // rows


@triton.jit
def load_steps(ptr, offs, first, K, EVEN: tl.constexpr, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load columns `first` to first + BLOCK_K of the rows at ptr + offs, as [rows, BLOCK_K]; 0 from column K on. RIGHT:
    [BLOCK_K, rows], the right operand of a dot. Triton does not swizzle a tile in LDS that passes through tl.trans, and
    its rows of 128 bytes would conflict in the same banks."""
    offs_k = tl.expand_dims(tl.arange(0, BLOCK_K), 1 if RIGHT else 0)
    offs = tl.expand_dims(offs, 0 if RIGHT else 1)
    if EVEN:
        x = tl.load(ptr + first + offs + offs_k)
    else:
        x = tl.load(ptr + first + offs + offs_k, mask=offs_k < K - first, other=0.0)
    return x


@triton.jit
def products(a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, tile_m, tile_n, M, N, K, stride_a, stride_b, stride_am, stride_ak,
             stride_bn, stride_bk, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, SHORT: tl.constexpr,
             SWAP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):
    """The tile [BLOCK_M, BLOCK_N] of a b^T over this program's split of K. Rows beyond the last repeat the last.

    GROUP_K > 0: scaled per block of GROUP_N rows of b and GROUP_K columns; scales are loaded a step ahead.
    SHORT: each step's sum is added in fp32 outside of the matrix cores, since Hopper's accumulate with 14 bits. (With
    max_num_imprecise_acc, Triton 3.6 uses the sums before it has waited for them.)
    SWAP: computed as b a^T, so that weights, not few tokens, are the rows of matrix instructions.
    """
    offs_m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    offs_n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    offs_a = (offs_m.to(tl.int64) if WIDE else offs_m) * stride_a
    offs_b = (offs_n.to(tl.int64) if WIDE else offs_n) * stride_b
    steps = tl.cdiv(K, BLOCK_K)
    steps_per_split = tl.cdiv(steps, tl.num_programs(1))
    begin = tl.program_id(1) * steps_per_split * BLOCK_K
    end = tl.minimum(begin + steps_per_split * BLOCK_K, steps * BLOCK_K)
    ONE_SCALE: tl.constexpr = GROUP_K > 0 and GROUP_N % BLOCK_N == 0  # block that the tile lies in
    if GROUP_K > 0:
        a_scale_ptr += offs_m * stride_am
        b_scale_ptr += (tile_n * BLOCK_N // GROUP_N if ONE_SCALE else offs_n // GROUP_N) * stride_bn
        a_scale = tl.load(a_scale_ptr + begin // GROUP_K * stride_ak)
        b_scale = tl.load(b_scale_ptr + begin // GROUP_K * stride_bk)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_K):
        a = load_steps(a_ptr, offs_a, first, K, EVEN, SWAP, BLOCK_K)
        b = load_steps(b_ptr, offs_b, first, K, EVEN, not SWAP, BLOCK_K)
        left, right = (b, a) if SWAP else (a, b)
        if GROUP_K > 0:
            d = dot(left, right)
            if ONE_SCALE:
                scale = a_scale * b_scale
                acc += d * (scale[None, :] if SWAP else scale[:, None])
            elif SWAP:
                acc += d * (b_scale[:, None] * a_scale[None, :])
            else:
                acc += d * (a_scale[:, None] * b_scale[None, :])
            group = tl.minimum(first + BLOCK_K, end - BLOCK_K) // GROUP_K
            a_scale = tl.load(a_scale_ptr + group * stride_ak)
            b_scale = tl.load(b_scale_ptr + group * stride_bk)
        elif SHORT:
            acc += dot(left, right)
        else:
            acc = dot(left, right, acc)
    return tl.trans(acc) if SWAP else acc


@triton.jit
def store_tile(y_ptr, acc, tile_m, tile_n, M, N, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the tile to y [M, N], or to [splits, M, N] if K is split."""
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * M + offs_m
    offs = (rows.to(tl.int64) if WIDE else rows)[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["M", "splits"])
def _fp8_mm_merge_kernel(y_ptr, partial_ptr, bias_ptr, M, N, splits, OVERLAP: tl.constexpr, WIDE: tl.constexpr,
                         BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N] = bias + the sum of the partial sums [splits, M, N]. BLOCK_S: splits, padded to a power of two."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_s = tl.arange(0, BLOCK_S)[:, None]
    mask = offs < M * N
    offs_p = (offs_s.to(tl.int64) if WIDE else offs_s) * (M * N) + offs[None, :]
    if OVERLAP:
        gdc_wait()
    y = tl.sum(tl.load(partial_ptr + offs_p, mask=(offs_s < splits) & mask[None, :], other=0.0), 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def launch_merge_early(OVERLAP: tl.constexpr):
    """Allow the merge to be launched now; it waits for the partial sums in gdc_wait."""
    if OVERLAP:
        gdc_launch_dependents()


@dataclass(frozen=True)
class Config:
    """How the kernels are launched."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1   # per compute unit at a time; K is split to reach this number
    min_columns: int = 1024  # per split, at least
    group_m: int = 8
    xcds: int = 1       # chiplets, each with an L2, that programs are assigned to round robin
    swap: bool = False  # weights are the rows of matrix instructions
    options: dict = field(default_factory=dict)


BUCKETS = {"m": (16, 64, 256, 2048), "n": (2048,), "k": (1024,)}


def key_of(a: Tensor, b: Tensor, group_k: int) -> dict[str, int | bool]:
    """The tuning key of a product. even: tiles of 128 columns are whole, within one group and aligned to 16 bytes;
    otherwise Triton 3.6 computes wrong products on Hopper."""
    (m, k), n = a.shape, b.shape[0]
    strides = a.stride(0) | b.stride(0) | a.data_ptr() | b.data_ptr()
    return {"m": m, "n": n, "k": k, "even": k % 128 == 0 and group_k % 128 == 0 and strides % 16 == 0}


def work(config: Config, m: int, **others) -> int:
    """Products that a block computes at a time, in thousands, without rows beyond the last."""
    return max(1, min(config.block_m, m)) * config.block_n * config.block_k // 1024


def candidates(arch: Arch, m: int, k: int, even: bool, **others) -> Iterator[Config]:
    """What the tuner tries."""
    few = 16 if m <= 16 else 64
    if arch.matrix == "mfma":
        if m <= 256:
            shapes = [(few, n, waves, stages, 16) for n in (32, 64, 128) for waves in (2, 4) for stages in (1, 2)]
        else:
            # gfx950's FP8 instructions with 32 rows take 16 passes, and reading their result needs 20 wait states. LLVM
            # looks back 19 only (its MaxWaitStates), and may leave out the last one.
            sizes = (16,) if arch.name == "gfx950" else (16, 32)
            shapes = [(*tile, waves, stages, size)
                      for tile, waves in (((128, 128), 4), ((128, 128), 8), ((128, 256), 8), ((256, 128), 8),
                                          ((256, 256), 8)) for stages in (1, 2) for size in sizes]
        for block_m, block_n, waves, stages, size in shapes:
            yield Config(block_m, block_n, 128, waves, stages, 2, 512 if m <= 16 else 1024, xcds=arch.xcds,
                         options=matrix_options(arch, size))
    elif arch.matrix == "wgmma" and even and m <= 64:
        for block_n, stages in ((64, 4), (64, 6), (128, 3), (128, 5)):
            for programs in (1, 2, 3):
                yield Config(few, block_n, 128, 4, stages, programs, 512, swap=True)
    elif arch.matrix == "wgmma" and even:
        # a short K ends before many stages are filled; smaller blocks run several at a time, which hides their ends
        for block_m, block_n, waves in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (64, 256, 8), (128, 128, 8)):
            for stages in (2, 3) if k <= 1024 else (3, 4):
                for swap in (False, True):
                    yield Config(block_m, block_n, 128, waves, stages, swap=swap)
        for block_m, block_n, waves in ((64, 256, 4), (128, 128, 4), (128, 256, 8)):
            yield Config(block_m, block_n, 128, waves, 2 if k <= 1024 else 3)
    else:
        for block_n, waves, stages in ((32, 2, 2), (64, 4, 1), (64, 4, 2), (128, 4, 1), (128, 8, 2), (128, 8, 3)):
            yield Config(min(few, 32), block_n, 128, waves, stages, 2)


def tuning_of(op: str, key: Callable[..., dict[str, int | bool]]) -> Tuning[Config]:
    return Tuning(op, config=Config, key=key, buckets=BUCKETS, candidates=candidates, work=work)


def unsupported(a: Tensor, group_k: int = 128) -> str | None:
    """The reason why Triton does not support these operands, or None."""
    arch = platform.arch()
    fp8_type = str(a.dtype).removeprefix("torch.float8_")
    if arch is not None and arch.fp8 != fp8_type:
        own = f"its FP8 type is {arch.fp8}" if arch.fp8 else "nor any FP8"
        return f"{arch.name} does not multiply {fp8_type}, {own}"
    return None if group_k % 32 == 0 else f"multiplies 32 columns at a time, a group has {group_k}"


def launch(kernel, a: Tensor, b: Tensor, scales: tuple, group_k: int, out_dtype: torch.dtype, bias: Tensor | None,
           config: Config, **constants) -> Tensor:
    """Launch kernel(y_ptr, a_ptr, b_ptr, *scales, bias_ptr, M, N, K, stride_a, stride_b, ...) for all tiles and splits,
    then the merge if there is more than one split. group_k: a multiple of BLOCK_K; 0: any BLOCK_K."""
    (m, k), n, arch = a.shape, b.shape[0], platform.arch()
    y = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if y.numel() == 0:
        return y
    block_k = min(config.block_k, max(32, triton.next_power_of_2(k)), group_k & -group_k or config.block_k)
    tiles, steps = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), triton.cdiv(k, block_k)
    splits = max(1, min(platform.compute_units() * config.programs // tiles, k // config.min_columns))
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    out, overlap, wide = y, splits > 1 and overlaps(), m * n * splits * 4 >= 2**31
    if splits > 1:
        out = torch.empty((splits, m, n), dtype=torch.float32, device=a.device)
    short = arch is not None and arch.matrix == "wgmma"
    kernel[tiles, splits](
        out, a, b, *scales, None if splits > 1 else bias, m, n, k, a.stride(0), b.stride(0), **constants, SHORT=short,
        SWAP=config.swap, EVEN=k % block_k == 0, WIDE=is_wide(a, b) or wide, OVERLAP=overlap, GROUP_M=config.group_m,
        XCDS=config.xcds, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, num_warps=config.num_warps,
        num_stages=num_stages(config.num_stages, config.num_warps, block_k, (a, config.block_m), (b, config.block_n)),
        **config.options)
    if splits > 1:
        _fp8_mm_merge_kernel[triton.cdiv(m * n, MERGED),](
            y, out, bias, m, n, splits, OVERLAP=overlap, WIDE=wide, BLOCK_S=triton.next_power_of_2(splits),
            BLOCK=MERGED, num_warps=num_warps(MERGED // 4), **({"launch_pdl": True} if overlap else {}))
    return y
