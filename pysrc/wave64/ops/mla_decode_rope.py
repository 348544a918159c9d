"""MLA decode of new tokens: rotate, append to the latent cache, attend."""

import torch
from torch import Tensor

from wave64 import pools
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.concat_and_cache_mla import concat_and_cache_mla
from wave64.ops.mla_decode import SHAPES, attend, check_latents, check_queries, large_cases, make_latents, mla_decode
from wave64.ops.rotary_embedding import rotary_embedding


def make_case(seq_lens: list[int], heads: int = 16, queries: int = 0, rank: int = 512, rope: int = 64,
              page_size: int = 16, dtype: torch.dtype = torch.bfloat16, fp8: bool = False, is_neox: bool = False,
              angles: torch.dtype = torch.float32) -> dict:
    """queries: new tokens per sequence; 0: one, without a dimension of its own."""
    latents = make_latents(seq_lens, page_size, rank + rope, dtype, fp8, written=max(1, queries))
    slots = latents.pop("slots")
    leading = (len(seq_lens), queries) if queries else (len(seq_lens),)
    angle = torch.rand(max(seq_lens, default=0) + 8, rope // 2) * 6.2832
    ends = torch.tensor(seq_lens, dtype=torch.int64).view(-1, 1)
    positions = (ends - max(1, queries) + torch.arange(max(1, queries))).clamp_(min=0)
    return dict(q_nope=torch.randn(*leading, heads, rank, dtype=dtype),
                q_pe=torch.randn(*leading, heads, rope, dtype=dtype), kv_c=torch.randn(*leading, rank, dtype=dtype),
                k_pe=torch.randn(*leading, rope, dtype=dtype), kv_cache=latents.pop("kv_cache"),
                slot_mapping=slots.view(leading), **latents, positions=positions.view(leading),
                cos_sin_cache=torch.cat([angle.cos(), angle.sin()], -1).to(angles),
                scale=(128 + rope) ** -0.5 * (rank + rope) ** -0.5 * 12, is_neox=is_neox,
                kv_scale=torch.rand(1) + 0.5 if fp8 else None)


def cases():
    for name, options in SHAPES.items():
        yield Case(name, lambda options=options: make_case(**options))
    yield Case("neox", lambda: make_case([37, 4], heads=4, is_neox=True))
    yield Case("neox-queries", lambda: make_case([37, 4], heads=4, queries=3, rank=64, is_neox=True))
    yield Case("narrow-angles", lambda: make_case([37, 4], heads=4, rank=64, angles=torch.bfloat16))
    yield Case("strided", lambda: _strided(make_case([37, 4], heads=4, rank=128)))
    yield Case("not-stored", lambda: _not_stored(make_case([37, 4, 20], heads=4, rank=64)))
    yield from pools.cases(lambda **options: make_case([3 * options["page_size"] + 3, 2], heads=4,
                                                       rank=128, **options), ("kv_cache",), ["page_table"],
                           slots=["slot_mapping"])
    yield from large_cases(make_case)


def _strided(args: dict) -> dict:
    """Queries and latents as slices of fused projections: what models really pass; rows of the pool before pages."""
    q = torch.cat([args["q_nope"], args["q_pe"]], -1)
    new = torch.cat([args["kv_c"], args["k_pe"]], -1)
    rank = args["kv_c"].shape[-1]
    return {**args, "q_nope": q[..., :rank], "q_pe": q[..., rank:], "kv_c": new[..., :rank], "k_pe": new[..., rank:],
            "kv_cache": args["kv_cache"].transpose(0, 1).contiguous().transpose(0, 1)}


def _not_stored(args: dict) -> dict:
    args["slot_mapping"][1] = -1
    return args


def check(q_nope, q_pe, kv_c, k_pe, kv_cache, slot_mapping, page_table, seq_lens, positions, cos_sin_cache, scale,
          is_neox=False, kv_scale=None):
    check_queries("q_nope", q_nope)
    check_queries("q_pe", q_pe)
    leading, heads, rank, rope = q_nope.shape[:-2], q_nope.shape[-2], q_nope.shape[-1], q_pe.shape[-1]
    if not rank:
        raise BadArgument("q_nope", "at least one column", q_nope)
    if q_pe.shape[:-1] != q_nope.shape[:-1] or q_pe.dtype != q_nope.dtype:
        raise BadArgument("q_pe", f"{q_nope.dtype} {[*leading, heads]} x rope_dim, as q_nope", q_pe)
    for name, x, width in (("kv_c", kv_c, rank), ("k_pe", k_pe, rope)):
        if x.shape != (*leading, width) or x.dtype != q_nope.dtype or x.stride(-1) != 1 and width > 1:
            raise BadArgument(name, f"{q_nope.dtype} {[*leading, width]} with a contiguous last dimension", x)
    for name, x, integers in (("slot_mapping", slot_mapping, "int64"), ("positions", positions, "int64 or int32")):
        if x.shape != leading or str(x.dtype).removeprefix("torch.") not in integers.split() or not x.is_contiguous():
            raise BadArgument(name, f"contiguous {integers} {list(leading)}, one for each new token", x)
    if (cos_sin_cache.ndim != 2 or not len(cos_sin_cache) or cos_sin_cache.shape[1] != rope or rope % 2
            or not cos_sin_cache.is_contiguous()):
        raise BadArgument("cos_sin_cache", f"contiguous [max_pos, {rope}] with max_pos at least 1, of the width of "
                          "q_pe, which is to be even", cos_sin_cache)
    if cos_sin_cache.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BadArgument("cos_sin_cache", "bf16, fp16 or fp32", cos_sin_cache)
    check_latents(q_nope.dtype, rank + rope, kv_cache, page_table, seq_lens, len(q_nope), kv_scale)
    if kv_scale is not None and kv_cache.dtype == q_nope.dtype:
        raise BadArgument("kv_scale", f"None for a {kv_cache.dtype} cache", kv_scale, "scales belong to FP8 caches")


def cost(q_nope, q_pe, kv_c, k_pe, kv_cache, slot_mapping, page_table, seq_lens, positions, cos_sin_cache, scale,
         is_neox=False, kv_scale=None) -> Cost:
    tokens, rank, width = int(seq_lens.sum()), q_nope.shape[-1], kv_cache.shape[2]
    rows = q_nope[0].numel() // rank if len(q_nope) else 0
    return Cost(bytes=tokens * width * kv_cache.element_size() + 2 * q_nope.nbytes + q_pe.nbytes
                + kv_c.numel() // rank * width * kv_cache.element_size(),
                flops=2 * tokens * rows * (width + rank))


def fake(q_nope, *args, **kwargs):
    return q_nope.new_empty(q_nope.shape)


@op(cases=cases, check=check, cost=cost, fake=fake, mutates=("kv_cache",))
def mla_decode_rope(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                    page_table: Tensor, seq_lens: Tensor, positions: Tensor, cos_sin_cache: Tensor, scale: float,
                    is_neox: bool = False, kv_scale: Tensor | None = None) -> Tensor:
    """Apply RoPE to q_pe and k_pe, write [kv_c, k_pe] to the latent cache, and attend as mla_decode does with
    q = [q_nope, q_pe].   (DeepSeek-V2, DeepSeek-AI 2024, section 2.1; RoPE: Su et al. 2021)

    The new tokens are the last of their sequence. Attention uses their values from the arguments, rounded as the cache
    rounds them; slot_mapping only gives the slots in which they are stored for later steps. With Q > 1 new tokens per
    sequence every per-token argument has shape [num_seqs, Q, ...], and each token attends to the keys up to its own
    position. If a sequence is shorter than Q, its first new tokens do not exist: no query attends to them, and their
    results are 0.

    q_nope         [num_seqs, num_heads, kv_lora_rank]  bf16, fp16 or fp32; any number of heads; last dim contiguous
    q_pe           [num_seqs, num_heads, rope_dim]      dtype of q_nope; rotated in fp32, then rounded to its dtype;
                   rope_dim even; last dim contiguous
    kv_c           [num_seqs, kv_lora_rank]  dtype of q_nope; last dim contiguous
    k_pe           [num_seqs, rope_dim]  dtype of q_nope; last dim contiguous; rotated and rounded like q_pe
    kv_cache       [num_pages, page_size, kv_lora_rank + rope_dim]  dtype of q_nope or the architecture's FP8, which
                   stores x / kv_scale, saturated; any page_size; last dim contiguous, others may be strided; written
    slot_mapping   [num_seqs]  int64: page * page_size + offset of the token's position, not checked; -1: not stored
    page_table     [num_seqs, max_pages]  int32; entries of pages that are not read are ignored
    seq_lens       [num_seqs]  int32; length including the new tokens; the result for length 0 is 0
    positions      [num_seqs]  int64 or int32; rows of cos_sin_cache, not checked; independent of seq_lens
    cos_sin_cache  [max_pos, rope_dim] fp32 (most exact), bf16 or fp16; cosines, then sines; pair j is (x[j], x[j +
                   rope_dim/2]) if is_neox, else (x[2j], x[2j + 1]); (a, b) becomes (a cos - b sin, b cos + a sin)
    scale          factor on the logits
    kv_scale       one fp32 number in a tensor, FP8 caches only: latent = stored * kv_scale; None means 1
    returns        [num_seqs, (Q,) num_heads, kv_lora_rank]  dtype of q_nope, contiguous
    raises         BadArgument (a ValueError) for other dtypes, shapes or strides; on a CPU also if page_table is too
                   narrow for seq_lens
    """
    rank, rope = q_nope.shape[-1], q_pe.shape[-1]
    heads, new = q_nope.shape[-2], q_nope.shape[1] if q_nope.ndim == 4 else 1
    if q_nope.numel() == 0:
        return q_nope.new_empty(q_nope.shape)
    q_pe, k_pe = q_pe.reshape(-1, heads, rope).clone(), k_pe.reshape(-1, 1, rope).clone()
    rotary_embedding.reference(positions.flatten(), q_pe, k_pe, rope, cos_sin_cache, is_neox)
    kv_c, k_pe = kv_c.reshape(-1, rank), k_pe[:, 0]
    pool = kv_cache.contiguous()
    concat_and_cache_mla.reference(kv_c, k_pe, pool, slot_mapping.flatten(), kv_scale)
    if pool is not kv_cache:
        kv_cache.copy_(pool)

    # Old keys and new ones are two sets: the new are what the cache would give back, wherever it keeps them.
    stored = torch.empty(len(kv_c), 1, rank + rope, dtype=kv_cache.dtype, device=kv_cache.device)
    concat_and_cache_mla.reference(kv_c, k_pe, stored, torch.arange(len(kv_c), device=kv_c.device), kv_scale)
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    latents = stored.to(wide) if kv_scale is None else stored.to(wide) * kv_scale.to(wide)
    q = torch.cat([q_nope.reshape(-1, new, heads, rank), q_pe.view(-1, new, heads, rope)], -1).to(wide)
    age = torch.arange(new, device=q.device)
    there = seq_lens[:, None, None] - new + age >= 0  # of more new tokens than the sequence has, the first are none
    seen = there & (age <= age[:, None])
    old = (seq_lens - new).clamp(min=0)
    rows = q.view(len(old), 1, new * heads, rank + rope).squeeze(1)  # to old keys all queries are alike
    out_old, lse_old = mla_decode.reference(rows, kv_cache, page_table, old, scale, rank, kv_scale)
    out_new, lse_new = attend(q, latents.view(-1, new, rank + rope), seen, scale, rank)
    out_old, lse_old = out_old.view_as(out_new), lse_old.view_as(lse_new)
    lse = torch.logaddexp(lse_old, lse_new)
    lse = lse.masked_fill(lse == float("-inf"), 0)
    out = out_old * (lse_old - lse).exp()[..., None] + out_new * (lse_new - lse).exp()[..., None]
    return out.to(q_nope.dtype).view(q_nope.shape)
