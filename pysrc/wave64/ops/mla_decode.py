"""MLA decode: queries in latent space against the latent cache of multi-head latent attention."""

import torch
from torch import Tensor

from wave64 import platform, pools
from wave64.op import BadArgument, Case, Cost, op
from wave64.quant import FP8, fp8_dtype

#: The reference's bound on temporary memory: latent elements gathered at a time.
LATENTS_AT_ONCE = 2**22


def make_latents(seq_lens: list[int], page_size: int, width: int, dtype: torch.dtype, fp8: bool = False,
                 written: int = 0) -> dict[str, Tensor]:
    """A latent pool as a server leaves it: pages in any order; NaN wherever no query may read, the last `written`
    rows of each sequence included; out-of-range numbers in the table where no page is needed."""
    pages = [-(-n // page_size) for n in seq_lens]
    order = torch.randperm(sum(pages) + 2).to(torch.int32)
    table = torch.full((len(seq_lens), max(pages, default=0) + 1), 2147480000, dtype=torch.int32)
    pool = torch.full((len(order) * page_size, width), float("nan"), dtype=dtype)
    slots, taken = [], 0
    for i, (n, used) in enumerate(zip(seq_lens, pages, strict=True)):
        table[i, :used] = order[taken: taken + used]
        own = (order[taken: taken + used, None].long() * page_size + torch.arange(page_size)).flatten()[:n]
        filled = own[:max(0, n - written)]
        pool[filled] = torch.randn(len(filled), width, dtype=dtype)
        new = torch.full((written,), -1)
        if n:
            new[-min(n, written):] = own[max(0, n - written):]
        slots.append(new)
        taken += used
    pool = pool.to(fp8_dtype()) if fp8 else pool
    return dict(kv_cache=pool.unflatten(0, (-1, page_size)), page_table=table,
                seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
                slots=torch.stack(slots) if slots else torch.empty(0, written, dtype=torch.int64))


def make_case(seq_lens: list[int], heads: int = 16, queries: int = 0, rank: int = 512, rope: int = 64,
              page_size: int = 16, dtype: torch.dtype = torch.bfloat16, fp8: bool = False) -> dict:
    """queries: new tokens per sequence; 0: one, without a dimension of its own."""
    latents = make_latents(seq_lens, page_size, rank + rope, dtype, fp8)
    del latents["slots"]
    shape = (len(seq_lens), *([queries] if queries else []), heads, rank + rope)
    scale = (128 + rope) ** -0.5  # as DeepSeek's: by the width of a head before its keys are absorbed
    return dict(q=torch.randn(shape, dtype=dtype), **latents, scale=scale * (rank + rope) ** -0.5 * 12,
                kv_lora_rank=rank, kv_scale=torch.rand(1) + 0.5 if fp8 else None)


#: Shapes that both MLA decodes are held to: options of their make_case. Under the interpreter time goes by rows (heads,
#: tokens, sequences) that are put together from parts, so where the point is another there are few of them.
SHAPES = {
    "one-token": dict(seq_lens=[1], heads=16),
    "batch": dict(seq_lens=[37, 1, 0, 130], heads=8, rank=128),
    "16-heads": dict(seq_lens=[70], heads=16),
    "128-heads": dict(seq_lens=[16], heads=128),
    "fp16": dict(seq_lens=[19, 64], heads=4, rank=64, dtype=torch.float16),
    "fp32": dict(seq_lens=[19, 65], heads=3, rank=64, rope=16, dtype=torch.float32),
    "heads-1": dict(seq_lens=[33, 5], heads=1),
    "heads-8": dict(seq_lens=[33, 5], heads=8, rank=128),
    "heads-12": dict(seq_lens=[33], heads=12, rank=128),
    "heads-20": dict(seq_lens=[70], heads=20, rank=128),
    "heads-32": dict(seq_lens=[33], heads=32, rank=128),
    "heads-64": dict(seq_lens=[16], heads=64, rank=128),
    "heads-72": dict(seq_lens=[70], heads=72, rank=64),
    "page-1": dict(seq_lens=[23, 7], page_size=1),
    "page-32": dict(seq_lens=[70, 9], heads=4, rank=64, page_size=32),
    "page-64": dict(seq_lens=[65, 128], heads=4, rank=64, page_size=64),
    "page-128": dict(seq_lens=[140], heads=4, rank=64, page_size=128),
    "rank-256": dict(seq_lens=[40, 9], heads=5, rank=256, rope=32),
    "rank-320": dict(seq_lens=[40, 9], heads=5, rank=320, rope=64),
    "rank-40": dict(seq_lens=[40, 9], heads=5, rank=40, rope=8),
    "queries-1": dict(seq_lens=[40, 9], heads=4, queries=1, rank=128),
    "queries-2": dict(seq_lens=[70, 2, 9], heads=5, queries=2, rank=64),
    "queries-4": dict(seq_lens=[70], heads=16, queries=4, rank=64),
    "queries-in-two-parts": dict(seq_lens=[129, 65], queries=2, page_size=64),
    "queries-3-of-fewer": dict(seq_lens=[2, 0, 1, 40], heads=2, queries=3, rank=64),
    "fp16-rank-512": dict(seq_lens=[129], heads=2, page_size=64, dtype=torch.float16),
    "fp8": dict(seq_lens=[70], heads=8, fp8=True),
    "fp8-fp16": dict(seq_lens=[70], heads=2, dtype=torch.float16, fp8=True),
    "fp8-queries": dict(seq_lens=[70, 9], heads=4, queries=2, rank=64, fp8=True),
    "no-sequences": dict(seq_lens=[]),
    "all-empty": dict(seq_lens=[0, 0], rank=64),
}
#: (heads, batch, length): DeepSeek-V3 on eight ranks and on one.
LARGE = [(16, 1, 4096), (16, 8, 4096), (16, 32, 4096), (16, 128, 4096), (16, 32, 16384), (128, 1, 4096),
         (128, 32, 4096), (128, 128, 4096)]


def large_cases(make):
    for heads, batch, length in LARGE:
        yield Case(f"{heads}h-{batch}x{length}", lambda h=heads, b=batch, n=length: make(
            [n] * b, heads=h, page_size=64), large=True)
    yield Case("16h-ragged", lambda: make([1 + 97 * i * i % 8192 for i in range(64)], page_size=64), large=True)
    yield Case("16h-1x131072", lambda: make([131072], page_size=64), large=True)
    yield Case("16h-32x4096-page1", lambda: make([4096] * 32, page_size=1), large=True)
    yield Case("16h-32x4096-fp8", lambda: make([4096] * 32, page_size=64, fp8=True), large=True)
    yield Case("16h-32x4096-queries2", lambda: make([4096] * 32, page_size=64, queries=2), large=True)


def cases():
    for name, options in SHAPES.items():
        yield Case(name, lambda options=options: make_case(**options))
    yield Case("strided", lambda: _strided(make_case([37, 4], heads=4, rank=128)))
    yield from pools.cases(lambda **options: make_case([3 * options["page_size"] + 3, 2], heads=4,
                                                       rank=128, **options), ("kv_cache",), tables=["page_table"])
    yield from large_cases(make_case)


def _strided(args: dict) -> dict:
    """Queries as a slice of something wider, the pool as every other row of a larger one."""
    pool = torch.stack([args["kv_cache"]] * 2, 2)
    return {**args, "q": torch.cat([args["q"]] * 2, 1)[:, :args["q"].shape[1]], "kv_cache": pool[:, :, 0]}


def check_latents(dtype: torch.dtype, width: int, kv_cache: Tensor, page_table: Tensor,
                  seq_lens: Tensor, num_seqs: int, kv_scale: Tensor | None) -> None:
    """Checks that all operators on a latent cache share."""
    if kv_cache.ndim != 3 or kv_cache.shape[2] != width or kv_cache.stride(2) != 1 and width > 1:
        raise BadArgument("kv_cache", f"[num_pages, page_size, {width}] with a contiguous last dimension", kv_cache)
    if kv_cache.dtype != dtype and kv_cache.dtype not in FP8.values():
        raise BadArgument("kv_cache", f"dtype {dtype}, that of the queries, or FP8", kv_cache)
    arch = platform.arch() if platform.on_gpu(kv_cache) else None
    if kv_cache.dtype != dtype and arch and arch.fp8 and kv_cache.dtype != FP8[arch.fp8]:
        raise BadArgument("kv_cache", f"{FP8[arch.fp8]}, the FP8 type of {arch.name}", kv_cache,
                          "requantize the cache")
    if seq_lens.shape != (num_seqs,) or seq_lens.dtype != torch.int32 or not seq_lens.is_contiguous():
        raise BadArgument("seq_lens", f"contiguous int32 [{num_seqs}]", seq_lens)
    if page_table.ndim != 2 or page_table.dtype != torch.int32 or page_table.shape[0] != num_seqs \
            or page_table.stride(1) != 1 and page_table.shape[1] > 1:
        raise BadArgument("page_table", f"int32 [{num_seqs}, max_pages] with a contiguous last dimension", page_table)
    if num_seqs and not platform.on_gpu(seq_lens):  # there this would synchronize
        longest, capacity = int(seq_lens.max()), page_table.shape[1] * kv_cache.shape[1]
        if longest > capacity or longest > 0 and not kv_cache.shape[0]:
            got = f"{list(page_table.shape)}, capacity {capacity} tokens, in {kv_cache.shape[0]} pages"
            expected = f"capacity for {longest} tokens, as seq_lens says"
            raise BadArgument("page_table", expected, got, "pass a wider table")
    if kv_scale is not None and (kv_scale.numel() != 1 or kv_scale.ndim > 1 or kv_scale.dtype != torch.float32):
        raise BadArgument("kv_scale", "one fp32 number in a tensor, [] or [1]", kv_scale)


def check_queries(name: str, q: Tensor, width: int | None = None) -> None:
    last = "width" if width is None else width
    if q.ndim not in (3, 4) or width not in (None, q.shape[-1]) or q.stride(-1) != 1 and q.shape[-1] > 1:
        raise BadArgument(name, f"[num_seqs, num_heads, {last}] or [num_seqs, new_tokens, num_heads, {last}] with a "
                          "contiguous last dimension", q)
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise BadArgument(name, "bf16, fp16 or fp32", q)
    if not q.shape[-2]:
        raise BadArgument(name, "at least one head", q)


def check(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale=None):
    check_queries("q", q)
    if not 0 < kv_lora_rank <= q.shape[-1]:
        raise BadArgument("kv_lora_rank", f"from 1 to {q.shape[-1]}, the width of q", kv_lora_rank)
    check_latents(q.dtype, q.shape[-1], kv_cache, page_table, seq_lens, q.shape[0], kv_scale)


def cost(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale=None) -> Cost:
    tokens, width = int(seq_lens.sum()), q.shape[-1]
    rows = q[0].numel() // width if len(q) else 0
    results = q.numel() // width * (kv_lora_rank * q.element_size() + 4)
    return Cost(bytes=tokens * width * kv_cache.element_size() + q.nbytes + results,
                flops=2 * tokens * rows * (width + kv_lora_rank))


def fake(q, kv_cache, page_table, seq_lens, scale, kv_lora_rank, kv_scale=None):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-1], kv_lora_rank)), q.new_empty(q.shape[:-1], dtype=wide)


@op(cases=cases, check=check, cost=cost, fake=fake)
def mla_decode(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
               kv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decode attention over a paged latent cache: multi-head latent attention (MLA) with absorbed weights. All heads
    share one key per token, the latent, whose first kv_lora_rank columns are the value.
    (DeepSeek-V2, DeepSeek-AI 2024, section 2.1)

        out = softmax(scale * q @ K.T) @ K[:, :kv_lora_rank],  K the latents of the query's sequence

    With Q > 1 new tokens per sequence (speculative decoding), each attends to the keys up to its own position; seq_lens
    includes all of them. If a sequence is shorter than Q, its first queries attend to no key. Softmax is computed in
    fp32; products take the inputs' dtype and accumulate in fp32; the result is rounded once.

    q             [num_seqs, num_heads, kv_lora_rank + rope_dim] or [num_seqs, Q, num_heads, ...]  bf16, fp16 or fp32;
                  any number of heads; last dim contiguous; RoPE is applied to the last rope_dim columns already
    kv_cache      [num_pages, page_size, kv_lora_rank + rope_dim]  dtype of q or the architecture's FP8; any page_size;
                  last dim contiguous, the others may be strided
    page_table    [num_seqs, max_pages]  int32; entries of pages that are not read are ignored
    seq_lens      [num_seqs]  int32; length including the new tokens; the result for length 0 is 0
    scale         factor on the logits
    kv_lora_rank  1 to the width of q
    kv_scale      one fp32 number in a tensor, [] or [1]: latent = stored * kv_scale
    returns       out [num_seqs, (Q,) num_heads, kv_lora_rank]  dtype of q, contiguous, and
                  lse [num_seqs, (Q,) num_heads]  fp32; natural log of the sum of exp(logit); -inf without keys
    raises        BadArgument (a ValueError) for other dtypes, shapes or strides; on a CPU also if page_table is too
                  narrow for seq_lens
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_zeros((*q.shape[:-1], kv_lora_rank)), q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
    num_pages, page_size, width = kv_cache.shape
    capacity = page_table.shape[1] * page_size
    if not (capacity and num_pages and q.numel()):
        return out, lse
    new = q.shape[1] if q.ndim == 4 else 1
    grouped = q.reshape(len(q), new, -1, width)
    at = torch.arange(capacity, device=q.device)
    at_once = max(1, LATENTS_AT_ONCE // (capacity * width))
    for first in range(0, len(q), at_once):
        some = slice(first, first + at_once)
        lengths = seq_lens[some, None]
        slots = (page_table[some, :, None] * page_size + torch.arange(page_size, device=q.device)).flatten(1)
        # A sequence with fewer keys reads its first one instead of the missing, never a row that it does not own.
        slots = torch.where(at < lengths, slots, slots[:, :1]).clamp_(0, num_pages * page_size - 1).long()
        latents = kv_cache[slots // page_size, slots % page_size].to(wide)
        if kv_scale is not None:
            latents = latents * kv_scale.to(wide)
        ends = lengths - new + 1 + torch.arange(new, device=q.device)  # [n, Q]: keys that each query sees
        result, sums = attend(grouped[some], latents, at < ends[..., None], scale, kv_lora_rank)
        out[some], lse[some] = result.view_as(out[some]), sums.view_as(lse[some])
    return out, lse


def attend(q: Tensor, latents: Tensor, seen: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """q [n, Q, H, width], latents [n, S, width], seen [n, Q, S] -> out [n, Q, H, rank] of q's dtype, lse [n, Q, H]"""
    n, new, heads, width = q.shape
    scores = (q.to(latents.dtype).reshape(n, -1, width) @ latents.transpose(1, 2)).view(n, new, heads, -1) * scale
    scores.masked_fill_(~seen[:, :, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp_()
    out = (weights.flatten(1, 2) @ latents[..., :rank]).view(n, new, heads, rank)
    blind = ~seen.any(-1)[..., None, None]  # what it read may be NaN, and 0 * NaN is not 0
    return out.masked_fill_(blind, 0).to(q.dtype), lse
