import torch
from torch import Tensor

from wave64 import ops, platform, quant
from wave64.backends.hip import bind, constants, launch, no_matrix, no_product, unaligned

CONSTANTS = constants("paged_attention")
#: Splits of a batch for each compute unit: about two rounds of the blocks that run at once (3 on sm_90, 4 on gfx9), so
#: that the second evens out what the first leaves. The best of 2 to 12 on an H200, for equal and for ragged lengths.
SPLITS_PER_UNIT = 6
#: A batch of more sequences fills every GPU without splits.
MAX_SPLIT_SEQS = 1024


def unsupported_pages(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> str | None:
    """The reason why kernels of attention do not serve queries [..., heads, head_dim] on these caches, or None."""
    arch = platform.arch()
    if key_cache.dtype != query.dtype and arch and arch.fp8 is None:
        return f"{arch.name} has no FP8 conversion"
    if query.shape[2] not in (64, 128):
        return f"serves heads of 64 or 128, these have {query.shape[2]}"
    if not key_cache.shape[1] or key_cache.shape[1] % 16:
        return f"page_size must be a multiple of 16, got {key_cache.shape[1]}"
    return no_product(query.dtype) or unaligned(query, key_cache, value_cache)


def supports(query, key_cache, value_cache, page_table, *args, **kwargs) -> str | None:
    return unsupported_pages(query, key_cache, value_cache)


def num_splits(num_seqs: int, max_keys: int, tiles: int, min_keys: int, per_unit: int) -> int:
    """Into how many splits of about min_keys the keys of a batch are cut, at most max_keys a sequence, so that a
    compute unit gets at most per_unit; a split takes `tiles` blocks. 0: no sequence is split."""
    per_seq = max(1, (max_keys + min_keys // 2) // min_keys)
    if num_seqs > MAX_SPLIT_SEQS:
        return 0
    return min(num_seqs * (per_seq - 1), max(1, platform.compute_units() * per_unit // tiles))


def as_fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)


@bind(ops.paged_attention, supports=supports, absent=no_matrix)
def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
                    scale: float, sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None,
                    k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, _ = key_cache.shape
    max_pages = page_table.shape[1] if num_pages else 0
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    max_keys = max_pages * page_size
    window = min(sliding_window, max_keys)
    arch, device = platform.arch(), query.device
    k_scale, v_scale, scale_stride = quant.kv_scales_of(k_scale, v_scale, num_kv_heads)
    tile_heads = CONSTANTS.NVIDIA_TILE_HEADS if arch and arch.vendor == "nvidia" else CONSTANTS.AMD_TILE_HEADS
    tiles = num_kv_heads * -(-num_heads // num_kv_heads // tile_heads)
    splits = num_splits(num_seqs, window if window > 0 else max_keys, tiles, CONSTANTS.MIN_SPLIT_KEYS, SPLITS_PER_UNIT)
    partial = stats = plan = None
    if splits:
        partial = torch.empty((num_seqs + splits, num_heads, head_dim), dtype=torch.float32, device=device)
        stats = torch.empty((num_seqs + splits, num_heads, 2), dtype=torch.float32, device=device)
        plan = torch.empty((num_seqs, 2), dtype=torch.int32, device=device)
    query_stride, query_head_stride, _ = query.stride()
    key_page_stride, key_row_stride, key_head_stride, _ = key_cache.stride()
    value_page_stride, value_row_stride, value_head_stride, _ = value_cache.stride()
    launch("paged_attention", query=query, key_cache=key_cache, value_cache=value_cache, page_table=page_table,
           seq_lens=seq_lens, sinks=as_fp32(sinks), k_scale=as_fp32(k_scale), v_scale=as_fp32(v_scale), out=out,
           partial=partial, stats=stats, plan=plan, query_stride=query_stride, query_head_stride=query_head_stride,
           key_page_stride=key_page_stride, key_row_stride=key_row_stride, key_head_stride=key_head_stride,
           value_page_stride=value_page_stride, value_row_stride=value_row_stride,
           value_head_stride=value_head_stride, table_stride=page_table.stride(0), scale_stride=scale_stride,
           num_seqs=num_seqs, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size,
           max_pages=max_pages, window=window, num_splits=splits, scale=scale, logit_cap=logit_cap,
           dtype=query.dtype, cache_dtype=key_cache.dtype)
    return out
