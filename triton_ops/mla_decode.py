"""MLA decode: attention to a paged latent cache, split along the keys; also the attention of mla_decode_rope.

The trick: a block of latents is loaded once and serves as key and as value, for all heads of a tile. On CDNA each wave
has a band of the latent columns: it adds its part of the scores, and mixes its part of the values. Elsewhere, with few
heads, the operands are swapped (S' = K Q', O' = V' P'), so that keys and latent columns, not 16 heads, are the rows
that waves share out. Either way none repeats another's work. New tokens come from registers, so nobody waits for their
way through the cache.
Bound by: reading the latents up to 16 heads; the matrix units from about 64 on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import mla_decode
from wave64.quant import FP8
from wave64.triton_ops import merge_splits
from wave64.triton_ops.attention import LN_2, LOG2_E, LOWEST, dot, is_wide, load_pages, narrow, tile_width, unit_of
from wave64.triton_ops.geometry import matrix_options, on_hopper
from wave64.triton_ops.splits import (
    LENGTHS,
    deal,
    looks,
    most_parts,
    overlaps,
    page_numbers,
    rows_of,
    settled,
    uniform,
    widened,
)
from wave64.tuning import choose

#: New tokens per sequence that are taken at once: as few as a matrix instruction takes.
MOST_NEW = tl.constexpr(16)
#: Say nothing that UNIT does not: none is worth another compilation.
STRIDES = ["stride_qb", "stride_qt", "stride_qh", "stride_pb", "stride_pt", "stride_ph", "stride_kp", "stride_kn",
           "stride_cb", "stride_ct", "stride_rb", "stride_rt", "stride_tb"]


@triton.jit
def _rotated(x_ptr, offs_r, mask, angles_ptr, mask_angle, NEOX: tl.constexpr, ROPE: tl.constexpr):
    """Columns offs_r of rows at x_ptr, rotated by the angles at angles_ptr, in fp32. Each column reads its partner
    itself, so nothing is exchanged between lanes."""
    half: tl.constexpr = ROPE // 2
    if NEOX:
        partner = tl.where(offs_r < half, offs_r + half, offs_r - half)
        pair = tl.where(offs_r < half, offs_r, offs_r - half)
        first = offs_r < half
    else:
        partner = offs_r ^ 1
        pair = offs_r // 2
        first = offs_r % 2 == 0
    x = tl.load(x_ptr + offs_r, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(angles_ptr + pair, mask=mask_angle, other=0.0).to(tl.float32)
    sin = tl.load(angles_ptr + half + pair, mask=mask_angle, other=0.0).to(tl.float32)
    return x * cos + tl.where(first, -y, y) * sin


@triton.jit
def _column(x, BANDS: tl.constexpr):
    """x [rows] as a column beside offsets of columns, which may lie in bands."""
    return x[None, :, None] if BANDS > 1 else x[:, None]


@triton.jit
def _rounded(x, factor, dtype: tl.constexpr, LIMIT: tl.constexpr):
    """x as the cache stores it: in FP8 (LIMIT, its largest number, > 0) divided by its scale and saturated."""
    if LIMIT > 0:
        x = tl.clamp(x.to(tl.float32) / factor, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _take(q_c, q_r, c, r, seen, EDGE: tl.constexpr, scale, peak, total, mixed, SWAP: tl.constexpr, BANDS: tl.constexpr,
          HALF_UP: tl.constexpr):
    """Takes latents c [N, C] and rotated parts r [N, R] into peak, total and mixed, where `seen`; all of them unless
    EDGE. seen is [N, H] if SWAP, else [H, N], or broadcasts to it; total is of that shape, too, or a row of it: where
    it is, no sum crosses lanes. With BANDS > 1 columns lie in bands: c is [BANDS, N, C / BANDS], mixed [BANDS, H,
    C / BANDS], and so on."""
    if BANDS > 1:
        s = tl.sum(dot(q_c, tl.permute(c, [0, 2, 1]), dot(q_r, tl.permute(r, [0, 2, 1]))), 0) * scale
    elif SWAP:
        s = dot(c, q_c, dot(r, q_r)) * scale
    else:
        s = dot(q_c, tl.trans(c), dot(q_r, tl.trans(r))) * scale
    if EDGE:
        s = tl.where(seen, s, float("-inf"))
    before, peak = peak, tl.maximum(peak, tl.max(s, 0 if SWAP else 1))
    shrink = tl.exp2(before - peak)
    p = tl.exp2(s - (peak[None, :] if SWAP else peak[:, None]))
    shrinks = shrink[None, :] if SWAP else shrink[:, None]
    if len(total.shape) == 2:
        total = total * shrinks + p
    else:
        total = total * shrink + tl.sum(p, 0 if SWAP else 1)
    weights = narrow(p, c.dtype, HALF_UP)
    if BANDS > 1:
        weights = tl.broadcast_to(weights[None], [BANDS, weights.shape[0], weights.shape[1]])
        mixed = dot(weights, c, mixed * shrinks[None])
    elif SWAP:
        mixed = dot(tl.trans(c), weights, mixed * shrinks)
    else:
        mixed = dot(weights, c, mixed * shrinks)
    return peak, total, mixed


@triton.jit
def _latents(kv_ptr, lines, offs_c, offs_r, dtype: tl.constexpr, CDNA: tl.constexpr, HALF_UP: tl.constexpr,
             RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """(c, r): the latents at kv_ptr + lines, without and with rotation, in dtype."""
    if RANK < BLOCK_C:
        c = tl.load(kv_ptr + lines + offs_c, mask=offs_c < RANK, other=0.0)
    else:
        c = tl.load(kv_ptr + lines + offs_c)
    if ROPE < BLOCK_R:
        r = tl.load(kv_ptr + RANK + lines + offs_r, mask=offs_r < ROPE, other=0.0)
    else:
        r = tl.load(kv_ptr + RANK + lines + offs_r)
    if kv_ptr.dtype.element_ty != dtype:
        c, r = settled(widened(c, dtype, HALF_UP), CDNA), settled(widened(r, dtype, HALF_UP), CDNA)
    return c, r


@triton.jit
def _edge(kv_ptr, table_ptr, block, end, limit, stride_kp, stride_kn, offs_c, offs_r, dtype: tl.constexpr,
          CDNA: tl.constexpr, HALF_UP: tl.constexpr, UNIT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
          PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, SWAP: tl.constexpr, BANDS: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """(c, r, seen) of a block of which some keys are beyond `end`, or, if CAUSAL, beyond a row's `limit`."""
    offs_n = block + tl.arange(0, BLOCK_N)
    valid_n = tl.minimum(offs_n, end - 1)
    pages = load_pages(table_ptr, block, valid_n, PAGE_SIZE, BLOCK_N, WIDE)
    lines = (pages * stride_kp + valid_n % PAGE_SIZE * stride_kn) * UNIT
    c, r = _latents(kv_ptr, _column(lines, BANDS), offs_c, offs_r, dtype, CDNA, HALF_UP, RANK, ROPE, BLOCK_C, BLOCK_R)
    seen = (offs_n < end)[:, None] if SWAP else (offs_n < end)[None, :]
    if CAUSAL:
        seen &= offs_n[:, None] < limit[None, :] if SWAP else offs_n[None, :] < limit[:, None]
    return c, r, seen


@triton.jit(do_not_specialize=[*LENGTHS, *STRIDES])
def _mla_decode_kernel(out_ptr, lse_ptr, partial_ptr, stats_ptr, q_ptr, q_pe_ptr, kv_ptr, table_ptr, seq_lens_ptr,
                       kv_scale_ptr, kv_c_ptr, k_pe_ptr, slots_ptr, positions_ptr, angles_ptr, scale, num_seqs, room,
                       window, programs, least, stride_qb, stride_qt, stride_qh, stride_pb, stride_pt, stride_ph,
                       stride_kp, stride_kn, stride_cb, stride_ct, stride_rb, stride_rt, stride_tb,
                       UNIT: tl.constexpr, HEADS: tl.constexpr, NEW: tl.constexpr, RANK: tl.constexpr,
                       ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, FUSED: tl.constexpr, NEOX: tl.constexpr,
                       LIMIT: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr, BANDS: tl.constexpr,
                       CDNA: tl.constexpr, HALF_UP: tl.constexpr, XCDS: tl.constexpr, OVERLAP: tl.constexpr,
                       BLOCK_B: tl.constexpr, ONE_LOOK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """One program: BLOCK_H rows (heads of new tokens) of one sequence, one part of its keys.

    FUSED: the NEW newest tokens come as kv_c and k_pe, are rotated with the queries, and are stored by the program of
    the last part; else they are in the cache already.
    """
    HELD_BACK: tl.constexpr = NEW if FUSED else 0
    item, tile = tl.program_id(1), tl.program_id(0)
    if XCDS > 1:  # programs go to chiplets in turn: those of one item to one, in whose cache they meet
        number = item * tl.num_programs(0) + tile
        tile = number // XCDS % tl.num_programs(0)
        item = number // (XCDS * tl.num_programs(0)) * XCDS + number % XCDS
    seq, first_item, keys, parts = deal(item, seq_lens_ptr, num_seqs, room, window, programs, least,
                                        HELD_BACK, BLOCK_B, ONE_LOOK)
    seq, first_item = uniform(seq, CDNA), uniform(first_item, CDNA)
    keys, parts = uniform(keys, CDNA), uniform(parts, CDNA)
    if OVERLAP:
        gdc_launch_dependents()
    if seq >= num_seqs:
        return
    part = item - first_item
    # Whole blocks are dealt out, to the first parts one more each: each lies inside one page where pages hold blocks.
    blocks = tl.cdiv(keys, BLOCK_N)
    start = (part * (blocks // parts) + tl.minimum(part, blocks % parts)) * BLOCK_N
    end = start + (blocks // parts + (part < blocks % parts).to(tl.int32)) * BLOCK_N
    end = tl.minimum(end, keys)

    seq = seq.to(tl.int64)
    table_ptr += seq * stride_tb
    row = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    token, head = row // HEADS, row % HEADS
    mask_h = row < HEADS * NEW
    at_c, at_r = tl.arange(0, BLOCK_C // BANDS), tl.arange(0, BLOCK_R // BANDS)
    if BANDS > 1:  # columns lie along the first and the last dimension, rows along the one between
        band = tl.arange(0, BANDS)[:, None, None]
        offs_c = band * (BLOCK_C // BANDS) + at_c[None, None, :]
        offs_r = band * (BLOCK_R // BANDS) + at_r[None, None, :]
    else:
        offs_c, offs_r = at_c[None, :], at_r[None, :]
    mask_c, mask_r = offs_c < RANK, offs_r < ROPE
    mask_q = _column(mask_h, BANDS)
    q_ptr += _column(seq * stride_qb + token * stride_qt + head * stride_qh, BANDS) * UNIT
    q_pe_ptr += _column(seq * stride_pb + token * stride_pt + head * stride_ph, BANDS) * UNIT
    q_c = tl.load(q_ptr + offs_c, mask=mask_q & mask_c, other=0.0)
    if FUSED:
        at = tl.load(positions_ptr + seq * NEW + token, mask=mask_h, other=0).to(tl.int64)
        q_r = _rotated(q_pe_ptr, offs_r, mask_q & mask_r, angles_ptr + _column(at, BANDS) * ROPE,
                       mask_q & mask_r, NEOX, ROPE).to(q_c.dtype)
    else:
        q_r = tl.load(q_pe_ptr + offs_r, mask=mask_q & mask_r, other=0.0)
    factor = 1.0
    if kv_scale_ptr is not None:
        factor = tl.load(kv_scale_ptr)
    scale *= factor * LOG2_E
    limit = keys - NEW + 1 + token  # keys that a row sees, unless FUSED

    peak = tl.full([BLOCK_H], LOWEST, tl.float32)
    if SWAP:
        q_c, q_r = tl.trans(q_c), tl.trans(q_r)
        totals = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        mixed = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    else:
        totals = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        if BANDS > 1:
            mixed = tl.zeros([BANDS, BLOCK_H, BLOCK_C // BANDS], tl.float32)
        else:
            mixed = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    if CDNA:  # blocks that every row sees whole need neither clamps nor masks
        edge = tl.minimum(end, keys if FUSED else keys - NEW + 1) // BLOCK_N * BLOCK_N
        edge = tl.maximum(edge, start)
        pages = page_numbers(table_ptr, start, edge, PAGE_SIZE, BLOCK_N)
        for block in range(start, edge, BLOCK_N):
            # The next block's pages, so that the loads of latents never wait for them.
            page, following = pages, tl.minimum(block + BLOCK_N, edge - BLOCK_N)
            pages = page_numbers(table_ptr, following, None, PAGE_SIZE, BLOCK_N)
            base, lines = rows_of(kv_ptr, page, block, stride_kp, stride_kn, UNIT, PAGE_SIZE, BLOCK_N, WIDE)
            c, r = _latents(base, _column(lines, BANDS), offs_c, offs_r, q_c.dtype, CDNA, HALF_UP, RANK, ROPE,
                            BLOCK_C, BLOCK_R)
            peak, totals, mixed = _take(q_c, q_r, c, r, True, False, scale, peak, totals, mixed, SWAP, BANDS, HALF_UP)
        for i in tl.static_range((BLOCK_N + (1 if FUSED else NEW) - 2) // BLOCK_N + 1):  # the few that are left
            if edge + i * BLOCK_N < end:
                c, r, seen = _edge(kv_ptr, table_ptr, edge + i * BLOCK_N, end, limit, stride_kp, stride_kn, offs_c,
                                   offs_r, q_c.dtype, CDNA, HALF_UP, UNIT, RANK, ROPE, PAGE_SIZE, WIDE,
                                   not FUSED and NEW > 1, SWAP, BANDS, BLOCK_N, BLOCK_C, BLOCK_R)
                peak, totals, mixed = _take(q_c, q_r, c, r, seen, True, scale, peak, totals, mixed, SWAP, BANDS,
                                            HALF_UP)
    else:
        for block in range(start, end, BLOCK_N):
            c, r, seen = _edge(kv_ptr, table_ptr, block, end, limit, stride_kp, stride_kn, offs_c, offs_r, q_c.dtype,
                               CDNA, HALF_UP, UNIT, RANK, ROPE, PAGE_SIZE, WIDE, not FUSED and NEW > 1, SWAP, BANDS,
                               BLOCK_N, BLOCK_C, BLOCK_R)
            peak, totals, mixed = _take(q_c, q_r, c, r, seen, True, scale, peak, totals, mixed, SWAP, BANDS, HALF_UP)
    total = tl.sum(totals, 0 if SWAP else 1)

    if FUSED:
        if part == parts - 1:
            length = tl.minimum(tl.load(seq_lens_ptr + seq), room)
            offs_t = tl.arange(0, MOST_NEW)
            mask_t = offs_t < NEW
            lines_c = kv_c_ptr + _column(seq * stride_cb + offs_t * stride_ct, BANDS) * UNIT
            lines_r = k_pe_ptr + _column(seq * stride_rb + offs_t * stride_rt, BANDS) * UNIT
            mask_new = _column(mask_t, BANDS)
            place = tl.load(positions_ptr + seq * NEW + offs_t, mask=mask_t, other=0).to(tl.int64)
            new_c = tl.load(lines_c + offs_c, mask=mask_new & mask_c, other=0.0)
            new_r = _rotated(lines_r, offs_r, mask_new & mask_r, angles_ptr + _column(place, BANDS) * ROPE,
                             mask_new & mask_r, NEOX, ROPE).to(q_c.dtype)
            new_c = _rounded(new_c, factor, kv_ptr.dtype.element_ty, LIMIT)
            new_r = _rounded(new_r, factor, kv_ptr.dtype.element_ty, LIMIT)
            slot = tl.load(slots_ptr + seq * NEW + offs_t, mask=mask_t, other=-1)
            kept = _column(tl.where(tile == 0, slot, -1) >= 0, BANDS)
            lines = kv_ptr + _column(slot // PAGE_SIZE * stride_kp + slot % PAGE_SIZE * stride_kn, BANDS) * UNIT
            tl.store(lines + offs_c, new_c, mask=kept & mask_c)
            tl.store(lines + RANK + offs_r, new_r, mask=kept & mask_r)
            there = mask_t & (length - NEW + offs_t >= 0)
            if SWAP:
                seen_t = there[:, None] & (offs_t[:, None] <= token[None, :])
            else:
                seen_t = there[None, :] & (offs_t[None, :] <= token[:, None])
            peak, total, mixed = _take(q_c, q_r, new_c.to(q_c.dtype), new_r.to(q_c.dtype), seen_t, True, scale, peak,
                                       total, mixed, SWAP, BANDS, HALF_UP)
    mixed *= factor

    rows: tl.constexpr = HEADS * NEW
    if parts == 1:
        divisor = tl.where(total > 0, total, 1)
        place = (seq * rows + row) * RANK
        if SWAP:
            tl.store(out_ptr + place[None, :] + at_c[:, None], (mixed / divisor[None, :]).to(out_ptr.dtype.element_ty),
                     mask=mask_h[None, :] & (at_c < RANK)[:, None])
        else:
            tl.store(out_ptr + _column(place, BANDS) + offs_c,
                     (mixed / _column(divisor, BANDS)).to(out_ptr.dtype.element_ty), mask=mask_q & mask_c)
        if lse_ptr is not None:
            lse = tl.where(total > 0, (peak + tl.log2(divisor)) * LN_2, float("-inf"))
            tl.store(lse_ptr + seq * rows + row, lse, mask=mask_h)
    else:
        line = item.to(tl.int64) * rows + row
        if SWAP:
            tl.store(partial_ptr + (line * RANK)[None, :] + at_c[:, None], mixed,
                     mask=mask_h[None, :] & (at_c < RANK)[:, None])
        else:
            tl.store(partial_ptr + _column(line * RANK, BANDS) + offs_c, mixed, mask=mask_q & mask_c)
        tl.store(stats_ptr + line * 2, peak, mask=mask_h)
        tl.store(stats_ptr + line * 2 + 1, total, mask=mask_h)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched."""

    block_h: int        # at most
    block_n: int
    num_warps: int
    num_stages: int
    programs: int       # that a compute unit holds at a time
    least: int          # fewest keys that a sequence is split for
    swap: bool          # keys, not heads, as rows of the matrix products; not with bands
    hopper: bool = False  # the kernel of hopper/mla_decode.py in place of this file's
    bands: int = 1      # that latent columns are dealt to waves in: 1, or as many as waves
    cdna: bool = False  # whole blocks apart, without masks, and scalars kept in scalar registers
    half_up: bool = False  # round weights to bf16 with two instructions, where there is none for it
    xcds: int = 1       # chiplets, each with a cache of its own, that programs are dealt to in turn
    block_b: int = 0    # lengths looked at at a time; 0: as suits the batch
    options: dict = field(default_factory=dict)


#: Bounds of the integer facts that the tuner takes for alike; a few sequences are all split.
BUCKETS = {"rows": (16, 32, 64), "num_seqs": (16,)}


def facts_of(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, kv_c: Tensor | None) -> dict[str, int | bool]:
    """Of these arguments, [B, Q, H, ...] and [B, Q, ...], what the choice of a configuration depends on."""
    num_seqs, new, heads, _ = q_nope.shape
    hopper = on_hopper("mla_decode")
    return {"rows": new * heads, "fp32": q_nope.dtype == torch.float32, "fp8": kv_cache.dtype.itemsize == 1,
            "num_seqs": num_seqs, "hopper": hopper is not None and hopper.serves(q_nope, q_pe, kv_cache, kv_c)}


def facts(q: Tensor, kv_cache: Tensor, kv_lora_rank: int, **others) -> dict[str, int | bool]:
    """The same of a call's arguments, by their names."""
    q = with_queries(q, 4)
    return facts_of(q[..., :kv_lora_rank], q[..., kv_lora_rank:], kv_cache, None)


def pairs(config: Config, rows: int, **others) -> int:
    """Pairs of row and key that a block takes at a time; rows beyond the last do not count."""
    return min(config.block_h, rows) * config.block_n


def candidates(arch: Arch, rows: int, fp32: bool, fp8: bool, hopper: bool, **others) -> Iterator[Config]:
    """What the tuner tries beside the present configuration."""
    most = 32 if rows <= 32 else 64  # of which a launch takes as many as there are rows
    if arch.matrix == "mfma":
        narrows = arch.name == "gfx950"  # has conversions to bf16, and reads from LDS that transpose
        for block_h in (16,) if rows <= 16 else (32, 16):
            for waves, block_n, stages in ((4, 16, 2), (4, 32, 2), (4, 16, 1), (4, 32, 1), (4, 64, 1), (8, 16, 2),
                                           (8, 32, 2), (8, 32, 1), (8, 64, 1), (2, 16, 1)):
                yield Config(block_h, block_n, waves, stages, programs=2, least=64, swap=False, bands=waves, cdna=True,
                             half_up=not narrows, xcds=arch.xcds,
                             options=matrix_options(arch, 16))
        return
    if hopper:  # its two blocks of keys fill the memory on chip, and its layouts are for 64 of them
        for block_h, waves, swap in ((32, 4, True), (32, 8, True), (64, 8, True), (64, 8, False)):
            if block_h <= most:
                for programs, least in ((1, 64), (1, 128), (2, 64)):
                    yield Config(block_h, 64, waves, 2, programs, least, swap, hopper=True)
    if arch.matrix == "wgmma" and not fp32:
        shapes = [(64, 4, 3), (64, 4, 2), (64, 8, 2), (32, 4, 3), (32, 4, 4), (32, 8, 4)]
        for block_n, waves, stages in shapes:
            yield Config(32, block_n, waves, stages, programs=2 if block_n * stages <= 96 else 1, least=64,
                         swap=True)
        for block_n, waves, stages in ((64, 8, 2), (32, 8, 3), (32, 4, 3)) if rows > 32 else ():
            yield Config(64, block_n, waves, stages, programs=1, least=64, swap=False)
        return
    for block_n, waves in ((16, 4), (32, 4), (32, 8), (64, 8)):
        for swap in (False, True):
            yield Config(most, block_n, waves, 1, programs=1, least=64, swap=swap)


def unsupported(q: Tensor, kv_cache: Tensor, rank: int, new: int = 0) -> str | None:
    """Why Triton cannot attend with these, or None; new: tokens per sequence that are appended first."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {q.dtype} attention"
    if rank > 512:
        return f"keeps latents of at most 512 in registers, these have {rank}"
    if new > MOST_NEW.value:
        return f"takes at most {MOST_NEW.value} new tokens per sequence at a time, these are {new}"
    arch = platform.arch()
    if kv_cache.dtype in FP8.values() and arch and arch.fp8 is None:
        return f"{arch.name} has no FP8 conversion"
    return None


def launch(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
           kv_scale: Tensor | None, out: Tensor, lse: Tensor | None, new_tokens: tuple[Tensor, ...] | None,
           is_neox: bool, config: Config, keys_per_program: int = 0) -> None:
    """Writes out, and lse where it is wanted. q_nope, q_pe [B, Q, H, ...]; new_tokens: kv_c and k_pe [B, Q, ...],
    slot_mapping, positions and cos_sin_cache of what is to be appended first.

    keys_per_program > 0 fixes how sequences are split, so that none's result depends on its batch mates."""
    num_seqs, new, heads, rank = q_nope.shape
    if out.numel() == 0:
        return
    rows, page_size = new * heads, kv_cache.shape[1]
    block_h = max(16, min(config.block_h, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_h)
    room = page_table.shape[1] * page_size
    least = keys_per_program or config.least
    # Where shares are fixed, more programs than any batch can use: then `least` decides.
    programs = 2**30 if keys_per_program else max(1, platform.compute_units() * config.programs // tiles)
    most = most_parts(room, least)
    items = min(num_seqs * most, num_seqs + programs)
    partial = stats = out  # unused where no sequence can have a second part
    if most > 1:
        partial = torch.empty((items, rows, rank), dtype=torch.float32, device=out.device)
        stats = torch.empty((items, rows, 2), dtype=torch.float32, device=out.device)
    lengths = (num_seqs, room, -1, programs, least)
    overlap = most > 1 and overlaps()
    if config.hopper:
        on_hopper("mla_decode").launch(q_nope, q_pe, kv_cache, page_table, seq_lens, scale, out, lse, partial, stats,
                                       new_tokens, is_neox, lengths, (tiles, items), config.swap, block_h,
                                       config.num_warps)
        held_back = 0
    else:
        _launch_portable(q_nope, q_pe, kv_cache, page_table, seq_lens, scale, kv_scale, out, lse, partial, stats,
                         new_tokens, is_neox, lengths, (tiles, items), overlap, block_h, config)
        held_back = new if new_tokens else 0
    if most > 1:
        merge_splits.launch(out.view(num_seqs, rows, rank), lse, partial, stats, seq_lens, None, lengths, held_back,
                            most, overlap)


def _launch_portable(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
                     kv_scale: Tensor | None, out: Tensor, lse: Tensor | None, partial: Tensor, stats: Tensor,
                     new_tokens: tuple[Tensor, ...] | None, is_neox: bool, lengths: tuple[int, ...],
                     grid: tuple[int, int], overlap: bool, block_h: int, config: Config) -> None:
    """launch, with what it dealt out and where it wants parts, for this file's kernel."""
    num_seqs, new, heads, rank = q_nope.shape
    rope, (tiles, items) = q_pe.shape[-1], grid
    kv_c, k_pe, slots, positions, angles = new_tokens or (None,) * 5
    strides = (*q_nope.stride()[:3], *q_pe.stride()[:3], *kv_cache.stride()[:2],
               *((*kv_c.stride()[:2], *k_pe.stride()[:2]) if new_tokens else (0, 0, 0, 0)))
    unit = unit_of(rank, *strides)
    limit = torch.finfo(kv_cache.dtype).max if kv_cache.dtype in FP8.values() else 0.0
    xcds = config.xcds if tiles > 1 else 1
    _mla_decode_kernel[tiles, triton.cdiv(items, xcds) * xcds](
        out, lse, partial, stats, q_nope, q_pe, kv_cache, page_table, seq_lens, kv_scale, kv_c, k_pe, slots, positions,
        angles, scale, *lengths, *(s // unit for s in strides), page_table.stride(0), UNIT=unit, HEADS=heads, NEW=new,
        RANK=rank, ROPE=rope, PAGE_SIZE=kv_cache.shape[1], FUSED=new_tokens is not None, NEOX=is_neox, LIMIT=limit,
        WIDE=is_wide(kv_cache), SWAP=config.swap and config.bands == 1, BANDS=config.bands, CDNA=config.cdna,
        HALF_UP=config.half_up, XCDS=xcds, OVERLAP=overlap, BLOCK_H=block_h, BLOCK_N=config.block_n,
        BLOCK_C=max(16 * config.bands, tile_width(rank)),
        BLOCK_R=max(16 * config.bands, tile_width(rope)), **looks(num_seqs, config.block_b),
        num_warps=config.num_warps, num_stages=config.num_stages, **config.options)


def with_queries(x: Tensor, ndim: int) -> Tensor:
    """x with a dimension for new tokens after the first, where it has none."""
    return x if x.ndim == ndim else x.unsqueeze(1)


@mla_decode.backend("triton", supports=lambda q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale=None:
                    unsupported(q, kv_cache, kv_lora_rank))
def run(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
        kv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out = torch.empty((*q.shape[:-1], kv_lora_rank), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    q = with_queries(q, 4)
    launch(q[..., :kv_lora_rank], q[..., kv_lora_rank:], kv_cache, page_table, seq_lens, scale, kv_scale, out, lse,
           None, False, choose("mla_decode", Config,
                               **facts_of(q[..., :kv_lora_rank], q[..., kv_lora_rank:], kv_cache, None)))
    return out, lse
