"""Apply RoPE to the queries and keys of latent attention in place, and write [kv_c, k_pe] to the KV cache."""

from typing import Any

import torch
from torch import Tensor

from wave64 import pools, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.concat_and_cache_mla import check as check_cache_write
from wave64.ops.concat_and_cache_mla import concat_and_cache_mla, with_zeros
from wave64.ops.reshape_and_cache import FP8
from wave64.ops.rms_norm import DTYPES
from wave64.ops.rotary_embedding import check as check_rotation
from wave64.ops.rotary_embedding import rotary_embedding
from wave64.quant import fp8_dtype

#: What `rotary_embedding` calls the tensors that it rotates.
NAMES = {"query": "q_pe", "key": "k_pe"}


def _draw(tokens, heads, pages, rank=512, rope=64, dtype=torch.bfloat16, is_neox=False, cache_dtype=None, page_size=16,
          skip=(), scale=None, nope=128, max_pos=64, angles_dtype=torch.float32) -> dict[str, Any]:
    """As models have them: q_pe is the end of every head, latents and keys, [num_tokens, 1, rope_dim], lie side by side
    in one projection; slots drawn without repetition, `skip` of them -1."""
    angle = torch.rand(max_pos, rope // 2) * 6.2832
    q = torch.randn(tokens, heads, nope + rope, dtype=dtype)
    projected = torch.randn(tokens, rank + rope, dtype=dtype) * 4
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[list(skip)] = -1
    drawn = dict(positions=torch.randint(max_pos, (tokens,)), q_pe=q[..., nope:], k_pe=projected[:, None, rank:],
                 kv_c=projected[:, :rank], cos_sin_cache=torch.cat([angle.cos(), angle.sin()], -1).to(angles_dtype),
                 is_neox=is_neox, slot_mapping=slots,
                 kv_cache=torch.randn(pages, page_size, rank + rope).to(cache_dtype or dtype))
    return drawn if scale is None else drawn | dict(scale=torch.tensor(scale))


def _contiguous():
    args = _draw(5, 3, 2, skip=(1,))
    return args | dict(q_pe=args["q_pe"].contiguous(), k_pe=args["k_pe"][:, 0].contiguous(),
                       kv_c=args["kv_c"].contiguous())


def _one_projection():
    """Queries, latents and keys side by side, as models without a latent for queries project them."""
    heads, nope, rank, rope = 3, 32, 128, 16
    rows = torch.randn(6, heads * (nope + rope) + rank + rope, dtype=torch.bfloat16)
    q, kv_c, k_pe = rows.split([heads * (nope + rope), rank, rope], -1)
    return _draw(6, heads, 2, rank, rope, skip=(2,)) | dict(q_pe=q.unflatten(-1, (heads, -1))[..., nope:], kv_c=kv_c,
                                                            k_pe=k_pe)


def _int32():
    """Every other one of more positions."""
    drawn = _draw(9, 3, 2, 32, 16)
    return drawn | dict(positions=drawn["positions"].int().repeat_interleave(2)[::2])


def cases():
    for dtype in DTYPES:
        for is_neox in (True, False):
            style = "neox" if is_neox else "interleaved"
            yield Case(f"deepseek-{dtype}-{style}", lambda d=dtype, n=is_neox: _draw(5, 16, 2, dtype=d, is_neox=n,
                                                                                     skip=(3,)))
            yield Case(f"odd-{dtype}-{style}", lambda d=dtype, n=is_neox: _draw(
                7, 5, 5, 37, 6, d, n, page_size=3, skip=(0, 4), nope=3))
        for fp8 in FP8:
            yield Case(f"{fp8}-from-{dtype}", lambda d=dtype, c=fp8: _draw(5, 3, 2, dtype=d, cache_dtype=c, skip=(1,),
                                                                           scale=0.03))
    yield Case("fp8-scale-0", lambda: with_zeros(_draw(5, 3, 2, cache_dtype=fp8_dtype(), scale=0.0)))
    for fp8 in FP8:
        yield Case(f"{fp8}-scale-1e-40", lambda c=fp8: with_zeros(_draw(5, 3, 2, cache_dtype=c, scale=1e-40)))
        yield Case(f"odd-{fp8}", lambda c=fp8: _draw(7, 5, 5, 37, 6, is_neox=True, cache_dtype=c, page_size=3,
                                                     skip=(0, 4), nope=3))
    yield Case("deepseek-fp8", lambda: _draw(5, 16, 2, cache_dtype=fp8_dtype(), skip=(3,), scale=0.03))
    for dtype in (torch.float16, torch.float32):
        yield Case(f"odd-fp8-from-{dtype}", lambda d=dtype: _draw(
            4, 3, 5, 37, 6, d, True, fp8_dtype(), page_size=3, skip=(2,), scale=0.03, nope=3))
    yield Case("contiguous", _contiguous)
    yield Case("one-projection", _one_projection)
    yield Case("many-tokens", lambda: _draw(70, 2, 5, 32, 16, is_neox=True, skip=(11,)))
    yield Case("many-heads", lambda: _draw(16, 127, 2, 32, 154, is_neox=True, nope=1))
    yield Case("positions-int32", _int32)
    yield Case("angles-in-dtype", lambda: _draw(5, 3, 2, 32, 16, angles_dtype=torch.bfloat16))
    yield Case("one-token", lambda: _draw(1, 128, 1, page_size=1))
    yield Case("all-skipped", lambda: _draw(4, 3, 2, 32, 16, skip=(0, 1, 2, 3)))
    yield Case("no-heads", lambda: _draw(4, 0, 2, 32, 16))
    yield Case("empty", lambda: _draw(0, 3, 2))
    yield from pools.cases(lambda page_size, fp8: _draw(
        24, 3, 12, 128, cache_dtype=quant.fp8_dtype() if fp8 else None, page_size=page_size, skip=(1,)), ("kv_cache",),
        slots=["slot_mapping"])
    for tokens in (1, 128, 8192):
        for heads in (128, 16):
            yield Case(f"{tokens}x{heads}", lambda t=tokens, h=heads: _draw(t, h, 1024, max_pos=8192), large=True)
    yield Case("8192x16-neox", lambda: _draw(8192, 16, 1024, is_neox=True, max_pos=8192), large=True)
    for fp8 in FP8:
        yield Case(f"8192x16-{fp8}", lambda c=fp8: _draw(8192, 16, 1024, cache_dtype=c, scale=0.05, max_pos=8192),
                   large=True)


def check(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, scale=None):
    if q_pe.ndim != 3:
        raise BadArgument("q_pe", "[num_tokens, num_heads, rope_dim]", q_pe)
    if q_pe.dtype not in DTYPES:
        raise BadArgument("q_pe", "bf16, fp16 or fp32", q_pe)
    rope = q_pe.shape[2]
    if k_pe.ndim not in (2, 3) or k_pe.shape[-1] != rope:
        raise BadArgument("k_pe", f"[num_tokens, {rope}] or [num_tokens, 1, {rope}], rope_dim of q_pe", k_pe)
    for name, tensor in (("k_pe", k_pe), ("kv_c", kv_c)):
        if tensor.dtype != q_pe.dtype:
            raise BadArgument(name, f"dtype {q_pe.dtype}, that of q_pe", tensor)
    try:
        check_rotation(positions, q_pe, k_pe, rope, cos_sin_cache, is_neox)
    except BadArgument as e:
        e.argument = NAMES.get(e.argument, e.argument)
        raise
    if cos_sin_cache.shape[1] != rope:
        raise BadArgument("cos_sin_cache", f"[max_pos, {rope}], rope_dim of q_pe", cos_sin_cache)
    if slot_mapping.shape != positions.shape:
        raise BadArgument("slot_mapping", f"int64 [{positions.shape[0]}], a slot per position", slot_mapping)
    check_cache_write(kv_c, k_pe, kv_cache, slot_mapping, scale)


def cost(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, scale=None) -> Cost:
    rotated, kept = q_pe.numel() + k_pe.numel(), kv_c.numel() + k_pe.numel()
    angles = positions.numel() * cos_sin_cache.shape[1] * cos_sin_cache.element_size()
    return Cost(bytes=2 * rotated * q_pe.element_size() + kv_c.nbytes + kept * kv_cache.element_size() + angles
                + positions.numel() * positions.element_size() + slot_mapping.nbytes)


@op(cases=cases, check=check, cost=cost, mutates=("q_pe", "k_pe", "kv_cache"), fake=lambda *_, **__: None)
def concat_and_cache_mla_rope_fused(positions: Tensor, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cos_sin_cache: Tensor,
                                    is_neox: bool, slot_mapping: Tensor, kv_cache: Tensor,
                                    scale: Tensor | None = None) -> None:
    """Apply RoPE to q_pe and k_pe in place, then write [kv_c, k_pe] to the KV cache: rotary_embedding, then
    concat_and_cache_mla of the rotated and rounded key. A token whose slot is -1 is not cached, but its q_pe and k_pe
    are rotated.
    (DeepSeek-AI 2024, DeepSeek-V2, section 2.1; rotation: Su et al. 2021; the operator is vLLM's)

    positions      [num_tokens]  int64 or int32 in [0, max_pos), not checked; may be strided
    q_pe           [num_tokens, num_heads, rope_dim]  bf16, fp16 or fp32; rope_dim even, last dim contiguous, rows and
                   heads may be strided (the end of each query head); written
    k_pe           [num_tokens, rope_dim] or [num_tokens, 1, rope_dim]  dtype of q_pe; last dim contiguous, rows may be
                   strided; written
    kv_c           [num_tokens, kv_lora_rank]  dtype of q_pe, strides like k_pe; q_pe, k_pe and kv_c do not overlap
    cos_sin_cache  [max_pos, rope_dim]  fp32 (most exact), bf16 or fp16; cosines, then sines; contiguous. Pair j is
                   (x[j], x[j + rope_dim/2]) if is_neox, else (x[2j], x[2j + 1]); (a, b) becomes
                   (a cos - b sin, b cos + a sin), in fp32
    slot_mapping   [num_tokens]  int64 in [-1, num_pages * page_size), not checked; no slot twice, except -1
    kv_cache       [num_pages, page_size, kv_lora_rank + rope_dim]  dtype of q_pe, or float8_e4m3fn or float8_e4m3fnuz,
                   which stores x / scale, saturated; contiguous; written
    scale          one fp32 value in a tensor, FP8 caches only; None means 1; values below 2^-126 count as 2^-126
    raises         BadArgument (a ValueError) for other shapes, dtypes, strides or devices
    """
    rotary_embedding.reference(positions, q_pe, k_pe, q_pe.shape[2], cos_sin_cache, is_neox)
    concat_and_cache_mla.reference(kv_c, k_pe, kv_cache, slot_mapping, scale)
