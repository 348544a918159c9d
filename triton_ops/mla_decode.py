"""MLA decode: attention over a paged latent cache, split along the keys. mla_decode_rope launches the same kernels.

Planning and dispatch. The kernels are in mla_decode_cdna.py and mla_decode_portable.py; merge_splits.py runs after
either where sequences can have several splits. The kernels take new tokens from registers, so no program waits until
they are in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import mla_decode
from wave64.quant import FP8
from wave64.triton_ops import merge_splits
from wave64.triton_ops.geometry import matrix_options
from wave64.triton_ops.mla_decode_cdna import _mla_decode_cdna_kernel
from wave64.triton_ops.mla_decode_common import MAX_NEW, Cache, Call, Outputs, Queries, arguments
from wave64.triton_ops.mla_decode_portable import _mla_decode_portable_kernel
from wave64.triton_ops.splits import plan_splits
from wave64.tuning import Tuning

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Config:
    """How the kernels are launched."""

    block_h: int        # at most
    block_n: int
    num_warps: int
    num_stages: int
    programs: int       # per compute unit at a time
    min_keys: int       # per split, at least
    swap: bool = False  # portable kernel: keys, not heads, are the rows of the matrix products
    bands: int = 0      # CDNA's kernel: bands of latent columns, one per wave; 0: the portable kernel
    half_up: bool = False  # see attention.round_weights
    xcds: int = 1       # CDNA's kernel: chiplets, each with an L2, that programs are assigned to round robin
    block_b: int = 0    # lengths read at a time; 0: chosen by batch size
    options: dict = field(default_factory=dict)


def key_of(q_nope: Tensor, kv_cache: Tensor) -> dict[str, int | bool]:
    """The tuning key of queries [B, Q, H, ...]."""
    num_seqs, new, heads, _ = q_nope.shape
    return {"rows": new * heads, "fp32": q_nope.dtype == torch.float32, "fp8": kv_cache.dtype.itemsize == 1,
            "num_seqs": num_seqs}


def key(q: Tensor, kv_cache: Tensor, **others) -> dict[str, int | bool]:
    """The tuning key of a call."""
    return key_of(with_queries(q, 4), kv_cache)


def work(config: Config, rows: int, **others) -> int:
    """(row, key) pairs that a block processes at a time, without rows beyond the last."""
    return min(config.block_h, rows) * config.block_n


def candidates(arch: Arch, rows: int, fp32: bool, **others) -> Iterator[Config]:
    """What the tuner tries."""
    block_h = 32 if rows <= 32 else 64  # a launch uses at most the number of rows
    if arch.matrix == "mfma":
        converts = arch.name == "gfx950"  # has conversions to bf16, and LDS reads that transpose
        for cdna_h in (16,) if rows <= 16 else (32, 16):
            for waves, block_n, stages in ((4, 16, 2), (4, 32, 2), (4, 16, 1), (4, 32, 1), (4, 64, 1), (8, 16, 2),
                                           (8, 32, 2), (8, 32, 1), (8, 64, 1), (2, 16, 1)):
                yield Config(cdna_h, block_n, waves, stages, programs=2, min_keys=64, bands=waves, half_up=not converts,
                             xcds=arch.xcds, options=matrix_options(arch, 16))
        return
    if arch.matrix == "wgmma" and not fp32:
        shapes = [(64, 4, 3), (64, 4, 2), (64, 8, 2), (32, 4, 3), (32, 4, 4), (32, 8, 4)]
        for block_n, waves, stages in shapes:
            yield Config(32, block_n, waves, stages, programs=2 if block_n * stages <= 96 else 1, min_keys=64,
                         swap=True)
        for block_n, waves, stages in ((64, 8, 2), (32, 8, 3), (32, 4, 3)) if rows > 32 else ():
            yield Config(64, block_n, waves, stages, programs=1, min_keys=64)
        return
    for block_n, waves in ((16, 4), (32, 4), (32, 8), (64, 8)):
        for swap in (False, True):
            yield Config(block_h, block_n, waves, 1, programs=1, min_keys=64, swap=swap)


#: mla_decode_rope uses this table, too. With few sequences all are split, hence the bucket of num_seqs.
TUNING = Tuning("mla_decode", config=Config, key=key, buckets={"rows": (16, 32, 64), "num_seqs": (16,)},
                candidates=candidates, work=work)


def unsupported(q: Tensor, kv_cache: Tensor, rank: int, new: int = 0) -> str | None:
    """The reason why the Triton kernels do not support these arguments, or None. new: tokens to append per sequence."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no {q.dtype} attention"
    if rank > 512:
        return f"keeps latents of at most 512 in registers, these have {rank}"
    if new > MAX_NEW.value:
        return f"takes at most {MAX_NEW.value} new tokens per sequence at a time, these are {new}"
    arch = platform.arch()
    if kv_cache.dtype in FP8.values() and arch and arch.fp8 is None:
        return f"{arch.name} has no FP8 conversion"
    return None


def _batched(options: dict[str, int]) -> dict[str, int]:
    """The options of a kernel that multiplies batches of matrices (tl.dot of three dimensions). Triton 3.5 to 3.7 give
    wrong numbers for these with kpack 2 on gfx942, as the emulator found; 3.8 and 3.9 right ones."""
    return {**options, "kpack": 1} if "kpack" in options and TRITON < (3, 8) else options


def launch(call: Call, out: Tensor, lse: Tensor | None, config: Config, keys_per_split: int = 0) -> None:
    """Compute out, and lse unless it is None. keys_per_split: see splits.plan_splits."""
    num_seqs, new, heads, rank = call.shape
    if out.numel() == 0:
        return
    rows, cache = new * heads, call.cache
    block_h = max(16, min(config.block_h, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_h)
    split = plan_splits(cache.table_ptr, cache.kv_ptr.shape[1], tiles, config.programs, config.min_keys,
                        keys_per_split=keys_per_split)
    partial, stats = split.partials(rows, rank, out)
    outputs, options = Outputs(out, lse, partial, stats), dict(num_warps=config.num_warps, num_stages=config.num_stages)
    if config.bands:
        xcds = config.xcds if tiles > 1 else 1
        _mla_decode_cdna_kernel[tiles, triton.cdiv(split.num_items, xcds) * xcds](
            *arguments(outputs, call, split, config, block_h, xcds), **options, **_batched(config.options))
    else:
        _mla_decode_portable_kernel[tiles, split.num_items](
            *arguments(outputs, call, split, config, block_h), SWAP=config.swap, **options, **config.options)
    if split.max_splits > 1:
        merge_splits.launch(out.view(num_seqs, rows, rank), lse, partial, stats, cache.seq_lens_ptr, None, split,
                            new if call.new else 0)


def with_queries(x: Tensor, ndim: int) -> Tensor:
    """x with a dimension of new tokens after the first; added here if x has fewer than `ndim` dimensions."""
    return x if x.ndim == ndim else x.unsqueeze(1)


def call_of(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
            kv_scale: Tensor | None = None) -> Call:
    """mla_decode's arguments in the form that the kernels take."""
    q = with_queries(q, 4)
    return Call(Queries(q[..., :kv_lora_rank], q[..., kv_lora_rank:]), Cache(kv_cache, page_table, seq_lens, kv_scale),
                None, scale, False)


def results(q: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor]:
    """Allocate (out, lse) for mla_decode's queries."""
    return (torch.empty((*q.shape[:-1], kv_lora_rank), dtype=q.dtype, device=q.device),
            torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))


@mla_decode.backend("triton", tuning=TUNING, supports=lambda q, kv_cache, page_table, seq_lens, scale, kv_lora_rank,
                    kv_scale=None: unsupported(q, kv_cache, kv_lora_rank))
def run(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
        kv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse = results(q, kv_lora_rank)
    call = call_of(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale)
    launch(call, out, lse, TUNING.choose(**key_of(call.queries.q_ptr, kv_cache)))
    return out, lse
