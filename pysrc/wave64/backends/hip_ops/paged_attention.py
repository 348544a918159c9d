import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.hip import DTYPES, bind, launch, workspace

#: Shares of a batch that a compute unit gets: about two rounds of what runs at once (3 blocks on sm_90, 4 on gfx9), so
#: that the second evens out what the first leaves. The best of 2 to 12 on an H200, for equal and for ragged lengths.
SHARES = 6
#: No sequence is split for fewer keys: kLeastGroups of the kernel.
LEAST = 128
#: Larger batches fill every GPU with whole sequences.
MOST_SPLIT = 1024


def supports(query, key_cache, value_cache, page_table, *args, **kwargs) -> str | None:
    arch = platform.arch()
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies bf16 and fp16, not {query.dtype}"
    if arch and arch.matrix is None:
        return f"knows no matrix instructions of {arch.name}"
    if key_cache.dtype != query.dtype and arch and arch.fp8 is None:
        return f"{arch.name} has no FP8 conversion"
    if query.shape[2] not in (64, 128):
        return f"serves heads of 64 or 128, these have {query.shape[2]}"
    if not key_cache.shape[1] or key_cache.shape[1] % 16:
        return f"page_size must be a multiple of 16, got {key_cache.shape[1]}"
    for tensor in (query, key_cache, value_cache):
        if any(at % 16 for at in (tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:-1]))):
            return "reads 16 bytes at a time, and a head does not begin at a multiple of them"
    return None


def shares_of(num_seqs: int, keys: int, tiles: int) -> int:
    """In how many shares the keys of a batch, at most `keys` of a sequence, are dealt out; a share takes `tiles`
    blocks. 0: no sequence is split."""
    most = max(1, (keys + LEAST // 2) // LEAST)
    if num_seqs > MOST_SPLIT:
        return 0
    return min(num_seqs * (most - 1), max(1, platform.compute_units() * SHARES // tiles))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def as_fp32(x: Tensor | None) -> Tensor | None:
    if x is None or x.dtype == torch.float32:
        return x
    return workspace(*x.shape, dtype=torch.float32, device=x.device).copy_(x)


@bind(ops.paged_attention, supports=supports)
def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
                    scale: float, sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None,
                    k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    num_seqs, heads, head_dim = query.shape
    num_pages, page_size, kv_heads, _ = key_cache.shape
    max_pages = page_table.shape[1] if num_pages else 0
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    keys = max_pages * page_size
    window = min(sliding_window, keys)
    arch = platform.arch()
    tile_heads = 8 if arch and arch.vendor == "nvidia" else 16  # kTileHeads of the kernel
    tiles = kv_heads * -(-heads // kv_heads // tile_heads)
    shares = shares_of(num_seqs, window if window > 0 else keys, tiles)
    device, parts = query.device, num_seqs + shares
    spaces = [workspace(parts, heads, head_dim, dtype=torch.float32, device=device),
              workspace(parts, heads, 2, dtype=torch.float32, device=device),
              workspace(num_seqs, 2, dtype=torch.int32, device=device)] if shares else [None] * 3
    optional = [as_fp32(x) for x in (sinks, k_scale, v_scale)]
    launch("paged_attention", query, query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
           page_table.data_ptr(), seq_lens.data_ptr(), *map(address, optional), out.data_ptr(), *map(address, spaces),
           *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], page_table.stride(0), num_seqs,
           heads, kv_heads, head_dim, page_size, max_pages, window, shares, scale, logit_cap,
           DTYPES[query.dtype], DTYPES[key_cache.dtype])
    return out
