import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.arch import Arch
from wave64.backends.hip import bind, constants, launch, no_product, other_fp8, unaligned
from wave64.backends.hip_ops.paged_attention import num_splits

CONSTANTS = constants("mla_decode")
#: Up to MAX_NARROW_ROWS rows (heads of new tokens) of a sequence are served in tiles of 16, each of which reads the
#: latents and transposes them anew: from a batch of MANY_SEQS on only one tile is. Of two tiles for 512 sequences of
#: 1024 keys, the decode alone is predicted (testing/predict.py) to take 1.25 times as long as Triton's, whose blocks
#: have 32 rows, and with the merge, which a batch that needs no splits does not have, 0.95 times.
MANY_SEQS = 64


def absent(arch: Arch) -> str | None:
    return None if arch.matrix == "mfma" else f"made for CDNA's matrix instructions, which {arch.name} does not have"


def unsupported(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, tensors: tuple[Tensor, ...] = ()) -> str | None:
    """The reason why the kernels do not serve these queries [..., heads, width] and this cache, or None. tensors:
    others whose rows must be aligned."""
    rank, rope = q_nope.shape[-1], q_pe.shape[-1]
    if why := no_product(q_nope.dtype):
        return why
    if (rank, rope) != (CONSTANTS.RANK, CONSTANTS.ROPE):
        return f"serves latents of {CONSTANTS.RANK} + {CONSTANTS.ROPE}, these are {rank} + {rope}"
    rows = q_nope.shape[-2] * (q_nope.shape[1] if q_nope.ndim == 4 else 1)
    if CONSTANTS.TILE_ROWS < rows <= CONSTANTS.MAX_NARROW_ROWS and len(q_nope) >= MANY_SEQS:
        return (f"does not serve {CONSTANTS.TILE_ROWS + 1} to {CONSTANTS.MAX_NARROW_ROWS} rows (heads of new tokens) "
                f"per sequence from {MANY_SEQS} sequences on, these are {rows}")
    return unaligned(q_nope, q_pe, kv_cache, *tensors) or other_fp8(kv_cache.dtype)


def planned_splits(num_seqs: int, max_keys: int, rows: int) -> int:
    """Into how many splits the keys of a batch are cut; 0: no sequence is split."""
    narrow = rows <= CONSTANTS.MAX_NARROW_ROWS
    block_rows = CONSTANTS.TILE_ROWS if narrow else CONSTANTS.MAX_WIDE_ROWS
    min_keys = CONSTANTS.MIN_SPLIT_KEYS if narrow else CONSTANTS.MIN_WIDE_SPLIT_KEYS
    # A block takes a compute unit, so what counts are whole rounds of blocks: as few as sequences leave splits to even
    # out, and full ones, since sequences get up to half a split more than their part of the plan. Half a split exactly
    # has to be more, not less: hence the one that is not taken off.
    tiles, units = -(-rows // block_rows), platform.compute_units()
    rounds = -(-2 * num_seqs * tiles // units)
    splits = num_splits(num_seqs, max_keys, tiles, min_keys, rounds)
    return max(0, min(splits, rounds * units // tiles - max(1, (num_seqs + 1) // 2 - 1)))


def fields(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
           kv_scale: Tensor | None) -> dict:
    """What both operators launch with: of queries [num_seqs, new, heads, width], `out` included."""
    num_seqs, new, heads, rank = q_nope.shape
    num_pages, page_size, _ = kv_cache.shape
    max_pages, device = page_table.shape[1] if num_pages else 0, q_nope.device
    splits = planned_splits(num_seqs, max_pages * page_size, new * heads)
    partial = stats = plan = None
    if splits:
        partial = torch.empty((num_seqs + splits, new * heads, rank), dtype=torch.float32, device=device)
        stats = torch.empty((num_seqs + splits, new * heads, 2), dtype=torch.float32, device=device)
        plan = torch.empty((num_seqs, 2), dtype=torch.int32, device=device)
    q_nope_stride, q_nope_token_stride, q_nope_head_stride, _ = q_nope.stride()
    q_pe_stride, q_pe_token_stride, q_pe_head_stride, _ = q_pe.stride()
    return dict(q_nope=q_nope, q_pe=q_pe, kv_cache=kv_cache, page_table=page_table, seq_lens=seq_lens,
                kv_scale=kv_scale, out=torch.empty(q_nope.shape, dtype=q_nope.dtype, device=device),
                partial=partial, stats=stats, plan=plan, q_nope_stride=q_nope_stride,
                q_nope_token_stride=q_nope_token_stride, q_nope_head_stride=q_nope_head_stride,
                q_pe_stride=q_pe_stride, q_pe_token_stride=q_pe_token_stride, q_pe_head_stride=q_pe_head_stride,
                page_stride=kv_cache.stride(0), row_stride=kv_cache.stride(1), table_stride=page_table.stride(0),
                num_seqs=num_seqs, new_tokens=new, num_heads=heads, page_size=page_size, max_pages=max_pages,
                num_splits=splits, scale=scale, dtype=q_nope.dtype, cache_dtype=kv_cache.dtype)


def with_tokens(x: Tensor, ndim: int) -> Tensor:
    """x with a dimension of new tokens after the first; added here if x has fewer than `ndim` dimensions."""
    return x if x.ndim == ndim else x.unsqueeze(1)


def supports(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale=None) -> str | None:
    return unsupported(q[..., :kv_lora_rank], q[..., kv_lora_rank:], kv_cache)


@bind(ops.mla_decode, supports=supports, absent=absent)
def mla_decode(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
               kv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    q = with_tokens(q, 4)
    given = fields(q[..., :kv_lora_rank], q[..., kv_lora_rank:], kv_cache, page_table, seq_lens, scale, kv_scale)
    if given["out"].numel():
        launch("mla_decode", **given, lse=lse)
    return given["out"].view(*lse.shape, kv_lora_rank), lse
