"""Puts together what the parts of split sequences found: the second launch of the decode attentions.

The trick: as many programs as the GPU holds at a time, each taking several pieces of rows, so that they are all there
before the parts are done (on Hopper they are launched early and wait), and batches that were not split cost a look.
Bound by: reading the parts, from L2.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from wave64 import platform
from wave64.triton_ops.attention import LN_2, LOWEST, add_sink
from wave64.triton_ops.splits import LENGTHS, keys_of, parts_of


@triton.jit(do_not_specialize=[*LENGTHS, "rows", "pieces"])
def _merge_splits_kernel(out_ptr, lse_ptr, partial_ptr, stats_ptr, seq_lens_ptr, sinks_ptr, num_seqs, room, window,
                         programs, least, rows, pieces, HELD_BACK: tl.constexpr, WIDTH: tl.constexpr,
                         OVERLAP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: every num_programs-th piece, which is BLOCK_D columns of one row of one sequence."""
    offs_b = tl.arange(0, BLOCK_B)
    total_keys, before_seq, before = 0, 0, 0
    for start in range(0, num_seqs, BLOCK_B):
        total_keys += tl.sum(keys_of(seq_lens_ptr, start + offs_b, num_seqs, room, window, HELD_BACK))
    share = tl.maximum(least, tl.cdiv(total_keys, programs))
    if OVERLAP:
        gdc_wait()
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    for piece in range(tl.program_id(0), num_seqs * pieces, tl.num_programs(0)):
        seq, row = piece // pieces, piece % pieces // columns
        offs_d = piece % columns * BLOCK_D + tl.arange(0, BLOCK_D)
        parts = parts_of(keys_of(seq_lens_ptr, seq, num_seqs, room, window, HELD_BACK), share)
        if parts > 1:
            for start in range(before_seq // BLOCK_B * BLOCK_B, seq, BLOCK_B):  # parts of the sequences passed since
                passed = (start + offs_b >= before_seq) & (start + offs_b < seq)
                dealt = parts_of(keys_of(seq_lens_ptr, start + offs_b, num_seqs, room, window, HELD_BACK), share)
                before += tl.sum(tl.where(passed, dealt, 0))
            before_seq = seq
            mask_d = offs_d < WIDTH
            peak, total = tl.full([], LOWEST, tl.float32), 0.0
            mixed = tl.zeros([BLOCK_D], tl.float32)
            for part in range(0, parts, BLOCK_P):
                offs_p = part + tl.arange(0, BLOCK_P)
                mask_p = offs_p < parts
                line = (before + offs_p).to(tl.int64) * rows + row
                peaks = tl.load(stats_ptr + line * 2, mask=mask_p, other=float("-inf"))
                totals = tl.load(stats_ptr + line * 2 + 1, mask=mask_p, other=0.0)
                partial = tl.load(partial_ptr + line[:, None] * WIDTH + offs_d, mask=mask_p[:, None] & mask_d,
                                  other=0.0)
                last, peak = peak, tl.maximum(peak, tl.max(peaks, 0))
                weights = tl.exp2(peaks - peak)
                shrink = tl.exp2(last - peak)
                total = total * shrink + tl.sum(weights * totals, 0)
                mixed = mixed * shrink + tl.sum(weights[:, None] * partial, 0)
            if sinks_ptr is not None:
                peak, total, shrink = add_sink(tl.load(sinks_ptr + row), peak, total)
                mixed *= shrink
            divisor = tl.where(total > 0, total, 1.0)
            place = seq.to(tl.int64) * rows + row
            tl.store(out_ptr + place * WIDTH + offs_d, (mixed / divisor).to(out_ptr.dtype.element_ty), mask=mask_d)
            if lse_ptr is not None:
                if piece % columns == 0:
                    lse = tl.where(total > 0, (peak + tl.log2(divisor)) * LN_2, float("-inf"))
                    tl.store(lse_ptr + place, lse)


def launch(out: Tensor, lse: Tensor | None, partial: Tensor, stats: Tensor, seq_lens: Tensor, sinks: Tensor | None,
           lengths: tuple[int, ...], held_back: int, most: int, overlap: bool) -> None:
    """partial [parts, rows, width] and stats [parts, rows, 2] (peak in base 2, total) of sequences dealt by `lengths`,
    `most` parts at most, -> out [num_seqs, rows, width] and lse [num_seqs, rows]. Rows of one part stay as they are."""
    num_seqs, (_, rows, width) = lengths[0], partial.shape
    # Parts looked at at a time: what a sequence has where all are alike, which is a guess only of speed.
    block_p = max(2, min(64, triton.next_power_of_2(min(most, lengths[3] // num_seqs + 1))))
    block_d = min(triton.next_power_of_2(width), max(16, 2048 // block_p))
    pieces = rows * triton.cdiv(width, block_d)
    grid = min(num_seqs * pieces, 32 * platform.compute_units())
    _merge_splits_kernel[grid,](
        out, lse, partial, stats, seq_lens, sinks, *lengths, rows, pieces, HELD_BACK=held_back, WIDTH=width,
        OVERLAP=overlap, BLOCK_B=32 if num_seqs <= 32 else 256, BLOCK_P=block_p, BLOCK_D=block_d, num_warps=2,
        **({"launch_pdl": True} if overlap else {}))  # an option that other compilers do not know
