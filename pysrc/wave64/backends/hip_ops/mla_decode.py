import torch
from torch import Tensor

from wave64 import ops
from wave64.arch import Arch
from wave64.backends.hip import bind, constants, launch, no_product, other_fp8, unaligned
from wave64.backends.hip_ops.paged_attention import num_splits

CONSTANTS = constants("mla_decode")
#: Splits of a batch for each compute unit, which runs one block at a time: the second round evens out the first.
SPLITS_PER_UNIT = 2
#: Rows (heads of new tokens) of a sequence that are served, and the batch from which on only one tile of them is. Each
#: tile reads the latents and transposes them anew, where a block of Triton's kernel has 32 rows: of two tiles for 512
#: sequences of 1024 keys, the decode alone is predicted (testing/predict.py) to take 1.25 times as long as Triton's,
#: and with the merge, which a batch that needs no splits does not have, 0.95 times.
MAX_ROWS, MANY_SEQS = 32, 64


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
    if rows > MAX_ROWS:
        return f"serves up to {MAX_ROWS} rows (heads of new tokens) per sequence, these are {rows}"
    if rows > CONSTANTS.TILE_ROWS and len(q_nope) >= MANY_SEQS:
        return (f"serves up to {CONSTANTS.TILE_ROWS} rows (heads of new tokens) per sequence from {MANY_SEQS} "
                f"sequences on, these are {rows}")
    return unaligned(q_nope, q_pe, kv_cache, *tensors) or other_fp8(kv_cache.dtype)


def fields(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
           kv_scale: Tensor | None) -> dict:
    """What both operators launch with: of queries [num_seqs, new, heads, width], `out` included."""
    num_seqs, new, heads, rank = q_nope.shape
    num_pages, page_size, _ = kv_cache.shape
    max_pages, device = page_table.shape[1] if num_pages else 0, q_nope.device
    tiles = -(-new * heads // CONSTANTS.TILE_ROWS)
    splits = num_splits(num_seqs, max_pages * page_size, tiles, CONSTANTS.MIN_SPLIT_KEYS, SPLITS_PER_UNIT)
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
