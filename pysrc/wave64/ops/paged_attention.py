"""Decode attention: one new token per sequence against its keys and values in a paged cache."""

import torch
from torch import Tensor

from wave64 import platform, pools
from wave64.op import BadArgument, Case, Cost, op
from wave64.quant import FP8, fp8_dtype


def make_cache(seq_lens: list[int], page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
               kv_dtype: torch.dtype | None = None, window: int = -1) -> dict[str, Tensor]:
    """A cache as a server leaves it: pages in any order; NaN in each row that no query may read, and out-of-range
    numbers in the table wherever no page is needed."""
    pages = [-(-n // page_size) for n in seq_lens]
    order = torch.randperm(sum(pages) + 2).to(torch.int32)
    table = torch.full((len(seq_lens), max(pages, default=0) + 1), 2147480000, dtype=torch.int32)
    pool = torch.full((2, len(order) * page_size, kv_heads, head_dim), float("nan"), dtype=dtype)
    taken = 0
    for i, (n, used) in enumerate(zip(seq_lens, pages, strict=True)):
        first = max(0, n - window) if window > 0 else 0
        table[i, first // page_size: used] = order[taken + first // page_size: taken + used]
        slots = (order[taken: taken + used, None].long() * page_size + torch.arange(page_size)).flatten()[first:n]
        pool[:, slots] = torch.randn(2, n - first, kv_heads, head_dim, dtype=dtype)
        taken += used
    key_cache, value_cache = pool.to(kv_dtype or dtype).unflatten(1, (-1, page_size))
    return dict(key_cache=key_cache, value_cache=value_cache, page_table=table,
                seq_lens=torch.tensor(seq_lens, dtype=torch.int32))


def make_case(seq_lens: list[int], heads: int = 4, kv_heads: int = 2, head_dim: int = 64, page_size: int = 16,
              dtype: torch.dtype = torch.bfloat16, fp8: bool = False, sinks: bool = False, per_head: bool = False,
              **options) -> dict:
    kv_dtype = fp8_dtype() if fp8 else dtype
    cache = make_cache(seq_lens, page_size, kv_heads, head_dim, dtype, kv_dtype, options.get("sliding_window", -1))
    if fp8:
        scales = kv_heads if per_head else 1
        options.update(k_scale=torch.rand(scales) + 0.5, v_scale=torch.rand(scales) + 0.5)
    if sinks:
        options.update(sinks=torch.randn(heads))
    query = torch.randn(len(seq_lens), heads, head_dim, dtype=dtype)
    return dict(query=query, **cache, scale=head_dim**-0.5, **options)


def cases():
    half, full = torch.float16, torch.float32
    drawn = {
        "one-token": dict(seq_lens=[1]),
        "batch": dict(seq_lens=[37, 1, 0, 130]),
        "fp16": dict(seq_lens=[19, 64, 300], dtype=half),
        "fp32": dict(seq_lens=[19, 65], dtype=full),
        "dim-128": dict(seq_lens=[300, 17], head_dim=128),
        "mha": dict(seq_lens=[33, 5], heads=3, kv_heads=3),
        "mqa": dict(seq_lens=[33, 5], heads=20, kv_heads=1),
        "gqa-3": dict(seq_lens=[33, 5], heads=9, kv_heads=3),
        "page-1": dict(seq_lens=[23, 7], page_size=1),
        "page-5": dict(seq_lens=[23, 7], page_size=5),
        "page-64": dict(seq_lens=[65, 128], page_size=64),
        "page-128": dict(seq_lens=[140], page_size=128),
        "dim-24": dict(seq_lens=[20, 3], head_dim=24, dtype=full),
        "dim-33": dict(seq_lens=[20, 3], head_dim=33),
        "dim-80": dict(seq_lens=[20, 3], head_dim=80),
        "dim-120": dict(seq_lens=[20, 3], head_dim=120),
        "dim-128-fp16": dict(seq_lens=[300, 17], head_dim=128, dtype=half),
        "dim-128-fp8": dict(seq_lens=[150, 9], head_dim=128, fp8=True),
        "dim-128-fp16-fp8": dict(seq_lens=[150, 9], head_dim=128, dtype=half, fp8=True),
        "dim-192": dict(seq_lens=[20, 3], head_dim=192),
        "dim-256": dict(seq_lens=[20, 3], head_dim=256),
        "window": dict(seq_lens=[70, 9, 0, 40], sliding_window=13),
        "window-1": dict(seq_lens=[70, 9], sliding_window=1),
        "cap": dict(seq_lens=[70, 9], logit_cap=5.0),
        "sinks": dict(seq_lens=[70, 0, 9], sinks=True),
        "fp8": dict(seq_lens=[70, 9], fp8=True),
        "fp16-fp8": dict(seq_lens=[70, 9], dtype=half, fp8=True),
        "fp8-per-head": dict(seq_lens=[300, 9], head_dim=128, fp8=True, per_head=True),
        "all": dict(seq_lens=[70, 9, 33], fp8=True, sinks=True, logit_cap=8.0, sliding_window=20),
        "no-sequences": dict(seq_lens=[]),
        "all-empty": dict(seq_lens=[0, 0]),
    }
    for name, options in drawn.items():
        yield Case(name, lambda options=options: make_case(**options))
    yield Case("strided", lambda: _strided(make_case([37, 4])))
    yield from pools.cases(lambda **options: make_case([3 * options["page_size"] + 3, 2], **options),
                           ("key_cache", "value_cache"), tables=["page_table"])
    for batch, length in [(1, 4096), (8, 4096), (32, 4096), (128, 4096), (256, 1024), (32, 16384)]:
        yield Case(f"{batch}x{length}", lambda b=batch, n=length: make_case(
            [n] * b, heads=32, kv_heads=8, head_dim=128), large=True)
    yield Case("ragged", lambda: make_case(
        [1 + 97 * i * i % 8192 for i in range(64)], heads=32, kv_heads=8, head_dim=128), large=True)
    yield Case("1x131072", lambda: make_case([131072], heads=64, kv_heads=8, head_dim=128), large=True)


def _strided(args: dict) -> dict:
    """Keys and values as halves of one pool, queries as a slice of a fused projection: what models really pass."""
    pool = torch.stack([args["key_cache"], args["value_cache"]], 1)
    fused = torch.cat([args["query"], args["query"]], 1)
    heads = args["query"].shape[1]
    return {**args, "key_cache": pool[:, 0], "value_cache": pool[:, 1], "query": fused[:, :heads]}


def check_kv(query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale) -> None:
    """Checks that all operators on a paged cache of keys and values share."""
    if query.ndim != 3 or query.stride(2) != 1 and query.shape[2] > 1:
        raise BadArgument("query", "[tokens, num_heads, head_dim] with a contiguous last dimension", query)
    if not query.dtype.is_floating_point or query.element_size() == 1:
        raise BadArgument("query", "bf16, fp16 or fp32", query)
    heads, head_dim = query.shape[1:]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.ndim != 4 or cache.shape[3] != head_dim or cache.stride(3) != 1 and head_dim > 1:
            expected = f"[num_pages, page_size, num_kv_heads, {head_dim}] with a contiguous last dimension"
            raise BadArgument(name, expected, cache)
        if cache.dtype != query.dtype and cache.dtype not in FP8.values():
            raise BadArgument(name, f"dtype {query.dtype}, that of query, or FP8", cache)
        arch = platform.arch() if platform.on_gpu(cache) else None
        if cache.dtype != query.dtype and arch and arch.fp8 and cache.dtype != FP8[arch.fp8]:
            raise BadArgument(name, f"{FP8[arch.fp8]}, the FP8 type of {arch.name}", cache, "requantize the cache")
    if key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype:
        raise BadArgument("value_cache", f"{key_cache.dtype} {list(key_cache.shape)}, as key_cache", value_cache)
    num_pages, page_size, kv_heads, _ = key_cache.shape
    if not kv_heads or heads % kv_heads:
        raise BadArgument("query", f"a multiple of key_cache's {kv_heads} heads", query)
    if seq_lens.ndim != 1 or seq_lens.dtype != torch.int32 or not seq_lens.is_contiguous():
        raise BadArgument("seq_lens", "contiguous int32 [num_seqs]", seq_lens)
    num_seqs = seq_lens.shape[0]
    if page_table.ndim != 2 or page_table.dtype != torch.int32 or page_table.shape[0] != num_seqs \
            or page_table.stride(1) != 1 and page_table.shape[1] > 1:
        expected = f"int32 [{num_seqs}, max_pages] with a contiguous last dimension"
        raise BadArgument("page_table", expected, page_table)
    if num_seqs and not platform.on_gpu(seq_lens):  # there this would synchronize
        longest, capacity = int(seq_lens.max()), page_table.shape[1] * page_size
        if longest > capacity or longest > 0 and not num_pages:
            got = f"{list(page_table.shape)}, capacity {capacity} tokens, in {num_pages} pages of {page_size}"
            expected = f"capacity for {longest} tokens, as seq_lens says"
            raise BadArgument("page_table", expected, got, "pass a wider table")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise BadArgument("sinks", f"contiguous [{heads}], one logit per head", sinks)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and (scale.shape not in ((), (1,), (kv_heads,)) or not scale.is_contiguous()
                                  or not scale.dtype.is_floating_point):
            raise BadArgument(name, f"fp32, one number, [] or [1], or contiguous, one per head, [{kv_heads}]", scale)


def check(query, key_cache, value_cache, page_table, seq_lens, scale, sliding_window=-1, logit_cap=0.0, sinks=None,
          k_scale=None, v_scale=None):
    check_kv(query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale)
    if query.shape[0] != seq_lens.shape[0]:
        raise BadArgument("query", f"[{seq_lens.shape[0]}, num_heads, head_dim], one token per sequence", query)


def cost(query, key_cache, value_cache, page_table, seq_lens, scale, sliding_window=-1, logit_cap=0.0, sinks=None,
         k_scale=None, v_scale=None) -> Cost:
    lengths = seq_lens.clamp(max=sliding_window) if sliding_window > 0 else seq_lens
    tokens = int(lengths.sum())
    _, _, kv_heads, head_dim = key_cache.shape
    return Cost(bytes=2 * tokens * kv_heads * head_dim * key_cache.element_size() + 2 * query.nbytes,
                flops=4 * tokens * query.shape[1] * head_dim)


def read_positions(cache: Tensor, pages: Tensor, position: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The keys or values at `position` [S] of the sequence that has `pages`, dequantized: [S, num_kv_heads, head_dim].
    A page that the pool does not have reads another one."""
    page = pages[position // cache.shape[1]].long().clamp(0, cache.shape[0] - 1)
    rows = cache[page, position % cache.shape[1]].to(dtype)
    return rows if scale is None else rows * scale.to(dtype).view(-1, 1)


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, logit_cap: float = 0.0,
           sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of one sequence in the dtype given, one for all: query [N, num_heads, D], keys [S, num_kv_heads, D],
    values [S, num_kv_heads, Dv], seen [N, S] -> out [N, num_heads, Dv] and lse [N, num_heads]; 0 and -inf where nothing
    is seen."""
    grouped = query.unflatten(1, (keys.shape[1], -1))  # so that keys are never expanded to the queries' heads
    logits = torch.einsum("nhgd,shd->nhgs", grouped, keys) * scale
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(keys.shape[1], -1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()[..., :len(keys)]
    return torch.einsum("nhgs,shd->nhgd", weights, values).flatten(1, 2), lse.flatten(1)


def fake(query, *args, **kwargs):
    return query.new_empty(query.shape)


@op(cases=cases, check=check, cost=cost, fake=fake)
def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
                    scale: float, sliding_window: int = -1, logit_cap: float = 0.0, sinks: Tensor | None = None,
                    k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    """Decode attention over a paged KV cache: one new token per sequence attends to all keys of its sequence, its own
    key included.

        out[b] = softmax(cap(scale * query[b] @ K[b].T)) @ V[b],  cap(x) = logit_cap * tanh(x / logit_cap)

    The key at position p of sequence b is cache[page_table[b, p // page_size], p % page_size]. Softmax is computed in
    fp32; products take the inputs' dtype and accumulate in fp32; the result is rounded once.
    (Vaswani et al. 2017; pages: Kwon et al. 2023; grouped-query attention: Ainslie et al. 2023)

    query           [num_seqs, num_heads, head_dim]  bf16, fp16 or fp32; last dim contiguous
    key_cache       [num_pages, page_size, num_kv_heads, head_dim]  dtype of query, or the architecture's FP8. Any
                    page_size; num_heads is a multiple of num_kv_heads; last dim contiguous, the others may be strided
    value_cache     shape and dtype of key_cache
    page_table      [num_seqs, max_pages]  int32; entries of pages that are not read are ignored
    seq_lens        [num_seqs]  int32; length including the new token; the result for length 0 is 0
    scale           factor on the logits, usually head_dim ** -0.5
    sliding_window  w > 0: only the last w keys, the query's own included; -1: all keys
    logit_cap       cap on the logits; 0: no cap
    sinks           [num_heads]  a logit per head that takes part in the softmax and adds no value
    k_scale         fp32, one number, [] or [1], or one per head, [num_kv_heads]: key = stored * k_scale
    v_scale         as k_scale: value = stored * v_scale
    returns         [num_seqs, num_heads, head_dim]  dtype of query, contiguous
    raises          BadArgument (a ValueError) for other dtypes, shapes or strides; on a CPU also if page_table is too
                    narrow for seq_lens
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(query.shape)
    position = torch.arange(page_table.shape[1] * key_cache.shape[1] if len(key_cache) else 0, device=query.device)
    for b in range(len(query)):  # lengths stay on the device
        length = seq_lens[b]
        seen = (position < length) & (position >= (length - sliding_window if sliding_window > 0 else 0))
        # What is not seen may hold anything: the newest key is read in its stead, with weight 0.
        read = torch.where(seen, position, length - 1)
        keys = read_positions(key_cache, page_table[b], read, k_scale, wide)
        values = read_positions(value_cache, page_table[b], read, v_scale, wide)
        result, _ = attend(query[b, None].to(wide), keys, values, seen[None], scale, logit_cap, sinks)
        out[b] = result[0].masked_fill(length == 0, 0)
    return out
