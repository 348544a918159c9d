"""Merge the partial results of a sequence's splits: the second launch of decode attention.

The trick: as many programs as the GPU holds at a time, each of which merges several pieces of rows. All of them are
resident before the splits are done (on Hopper they are launched early and wait), and a batch without splits costs one
read of its lengths.
Bound by: reading the partial results, from L2.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from wave64 import platform
from wave64.triton_ops.attention import LN_2, LOWEST, add_sink
from wave64.triton_ops.splits import SPLIT, Split, keys_of, length_blocks, splits_of


@triton.jit(do_not_specialize=[*SPLIT, "rows", "pieces"])
def _merge_splits_kernel(out_ptr, lse_ptr, partial_ptr, stats_ptr, seq_lens_ptr, sinks_ptr, num_seqs, capacity,
                         window, programs, min_keys, rows, pieces, UNSPLIT: tl.constexpr, WIDTH: tl.constexpr,
                         OVERLAP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: every num_programs-th piece, which is BLOCK_D columns of one row of one sequence. UNSPLIT: newest
    tokens of a sequence that are not among the keys that were split."""
    offs_b = tl.arange(0, BLOCK_B)
    total_keys, before_seq, first_item = 0, 0, 0
    for start in range(0, num_seqs, BLOCK_B):
        total_keys += tl.sum(keys_of(seq_lens_ptr, start + offs_b, num_seqs, capacity, window, UNSPLIT))
    keys_per_split = tl.maximum(min_keys, tl.cdiv(total_keys, programs))
    if OVERLAP:
        gdc_wait()
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    for piece in range(tl.program_id(0), num_seqs * pieces, tl.num_programs(0)):
        seq, row = piece // pieces, piece % pieces // columns
        offs_d = piece % columns * BLOCK_D + tl.arange(0, BLOCK_D)
        num_splits = splits_of(keys_of(seq_lens_ptr, seq, num_seqs, capacity, window, UNSPLIT), keys_per_split)
        if num_splits > 1:
            for start in range(before_seq // BLOCK_B * BLOCK_B, seq, BLOCK_B):  # splits of those in between
                skipped = (start + offs_b >= before_seq) & (start + offs_b < seq)
                keys = keys_of(seq_lens_ptr, start + offs_b, num_seqs, capacity, window, UNSPLIT)
                first_item += tl.sum(tl.where(skipped, splits_of(keys, keys_per_split), 0))
            before_seq = seq
            mask_d = offs_d < WIDTH
            row_max, row_sum = tl.full([], LOWEST, tl.float32), 0.0
            acc = tl.zeros([BLOCK_D], tl.float32)
            for first in range(0, num_splits, BLOCK_S):
                offs_s = first + tl.arange(0, BLOCK_S)
                mask_s = offs_s < num_splits
                item = (first_item + offs_s).to(tl.int64) * rows + row
                maxima = tl.load(stats_ptr + item * 2, mask=mask_s, other=float("-inf"))
                sums = tl.load(stats_ptr + item * 2 + 1, mask=mask_s, other=0.0)
                partial = tl.load(partial_ptr + item[:, None] * WIDTH + offs_d, mask=mask_s[:, None] & mask_d,
                                  other=0.0)
                old_max, row_max = row_max, tl.maximum(row_max, tl.max(maxima, 0))
                weights = tl.exp2(maxima - row_max)
                rescale = tl.exp2(old_max - row_max)
                row_sum = row_sum * rescale + tl.sum(weights * sums, 0)
                acc = acc * rescale + tl.sum(weights[:, None] * partial, 0)
            if sinks_ptr is not None:
                row_max, row_sum, rescale = add_sink(tl.load(sinks_ptr + row), row_max, row_sum)
                acc *= rescale
            divisor = tl.where(row_sum > 0, row_sum, 1.0)
            offs_row = seq.to(tl.int64) * rows + row
            tl.store(out_ptr + offs_row * WIDTH + offs_d, (acc / divisor).to(out_ptr.dtype.element_ty), mask=mask_d)
            if lse_ptr is not None:
                if piece % columns == 0:
                    lse = tl.where(row_sum > 0, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
                    tl.store(lse_ptr + offs_row, lse)


def launch(out: Tensor, lse: Tensor | None, partial: Tensor, stats: Tensor, seq_lens: Tensor, sinks: Tensor | None,
           split: Split, unsplit: int) -> None:
    """Merge partial [items, rows, width] and stats [items, rows, 2] (row_max in base 2, row_sum), one item per split,
    into out [num_seqs, rows, width] and lse [num_seqs, rows]. Sequences with one split do not change.

    unsplit: newest tokens of a sequence that are not among the keys that were split.
    """
    _, rows, width = partial.shape
    # Splits read at a time: the average number per sequence, which is optimal where all lengths are equal.
    average = split.programs // split.num_seqs + 1
    block_s = max(2, min(64, triton.next_power_of_2(min(split.max_splits, average))))
    block_d = min(triton.next_power_of_2(width), max(16, 2048 // block_s))
    pieces = rows * triton.cdiv(width, block_d)
    grid = min(split.num_seqs * pieces, 32 * platform.compute_units())
    _merge_splits_kernel[grid,](
        out, lse, partial, stats, seq_lens, sinks, *split, rows, pieces, UNSPLIT=unsplit, WIDTH=width,
        OVERLAP=split.overlap, BLOCK_B=length_blocks(split.num_seqs).BLOCK_B, BLOCK_S=block_s, BLOCK_D=block_d,
        num_warps=2, **({"launch_pdl": True} if split.overlap else {}))  # only NVIDIA's compiler has this option
