"""Apply RoPE to queries and keys in place, and write keys and values to the paged KV cache."""

from typing import Any

import torch
from torch import Tensor

from wave64 import pools, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.reshape_and_cache import FP8, reshape_and_cache
from wave64.ops.reshape_and_cache import check as check_cache_write
from wave64.ops.rms_norm import DTYPES
from wave64.ops.rotary_embedding import check as check_rotation
from wave64.ops.rotary_embedding import rotary_embedding


def _draw(tokens, heads, kv_heads, head_dim, pages=2, rot_dim=None, dtype=torch.bfloat16, is_neox=True,
          cache_dtype=None, page_size=16, skip=(), scale=None, max_pos=64,
          angles_dtype=torch.float32, per_head=False) -> dict[str, Any]:
    """Queries, keys and values as views of one merged projection; slots drawn without repetition, `skip` of them -1."""
    angle = torch.rand(max_pos, (rot_dim or head_dim) // 2) * 6.2832
    merged = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype) * 4
    query, key, value = merged.split([heads, kv_heads, kv_heads], 1)
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[list(skip)] = -1
    caches = [torch.randn(pages, page_size, kv_heads, head_dim).to(cache_dtype or dtype) for _ in range(2)]
    drawn = dict(positions=torch.randint(max_pos, (tokens,)), query=query, key=key, value=value,
                 cos_sin_cache=torch.cat([angle.cos(), angle.sin()], -1).to(angles_dtype), key_cache=caches[0],
                 value_cache=caches[1], slot_mapping=slots, is_neox=is_neox)
    if scale is None:
        return drawn
    if per_head:
        return drawn | dict(k_scale=(torch.rand(kv_heads) + 0.5) * scale, v_scale=(torch.rand(kv_heads) + 0.5) * scale)
    return drawn | dict(k_scale=torch.tensor(scale), v_scale=torch.tensor([2 * scale]))


def _contiguous():
    args = _draw(5, 3, 2, 64, skip=(1,), angles_dtype=torch.bfloat16)
    return args | {name: args[name].contiguous() for name in ("query", "key", "value")}


def _heads_of_keys_and_values():
    """Keys and values side by side within each head; every other one of more positions, in 32 bits."""
    both = torch.randn(5, 3, 128, dtype=torch.bfloat16)
    drawn = _draw(5, 4, 3, 64)
    return drawn | dict(key=both[..., :64], value=both[..., 64:],
                        positions=drawn["positions"].int().repeat_interleave(2)[::2])


def cases():
    for dtype, is_neox in zip(DTYPES, (True, False, True), strict=True):
        yield Case(f"heads-{dtype}", lambda d=dtype, n=is_neox: _draw(3, 8, 2, 128, dtype=d, is_neox=n, skip=(1,)))
        yield Case(f"odd-{dtype}", lambda d=dtype, n=is_neox: _draw(7, 5, 3, 37, 5, 22, d, not n, page_size=3,
                                                                    skip=(0, 4)))
        for fp8 in FP8:
            yield Case(f"{fp8}-from-{dtype}", lambda d=dtype, n=is_neox, f=fp8: _draw(
                3, 8, 2, 128, dtype=d, is_neox=n, cache_dtype=f, skip=(1,), scale=0.03))
            yield Case(f"odd-{fp8}-from-{dtype}", lambda d=dtype, n=is_neox, f=fp8: _draw(
                4, 5, 3, 37, 5, 22, d, not n, f, page_size=3, skip=(2,), scale=0.03))
    for fp8 in FP8:
        yield Case(f"{fp8}-scale-1e-40", lambda c=fp8: _draw(5, 3, 2, 64, cache_dtype=c, skip=(1,), scale=1e-40))
    yield Case("partial", lambda: _draw(5, 3, 2, 96, rot_dim=32))
    yield Case("fp8-partial-interleaved", lambda: _draw(5, 3, 2, 96, rot_dim=32, is_neox=False,
                                                        cache_dtype=quant.fp8_dtype(), scale=0.5))
    yield Case("fp8-per-head", lambda: _draw(5, 4, 3, 96, rot_dim=32, cache_dtype=quant.fp8_dtype(), skip=(1,),
                                             scale=0.5, per_head=True))
    yield Case("contiguous", _contiguous)
    yield Case("heads-of-keys-and-values", _heads_of_keys_and_values)
    yield Case("one-token", lambda: _draw(1, 32, 8, 128, page_size=1))
    yield Case("fp8-many-heads", lambda: _draw(2, 32, 8, 128, cache_dtype=quant.fp8_dtype(), scale=0.05))
    yield Case("many-tokens", lambda: _draw(70, 2, 1, 32, pages=5, skip=(11,)))
    yield Case("all-skipped", lambda: _draw(4, 3, 2, 32, skip=(0, 1, 2, 3)))
    yield Case("empty", lambda: _draw(0, 4, 2, 64))
    yield from pools.cases(lambda page_size, fp8: _draw(
        24, 3, 2, 64, 12, cache_dtype=quant.fp8_dtype() if fp8 else None, page_size=page_size, skip=(1,)),
        ("key_cache", "value_cache"), slots=["slot_mapping"])
    for tokens, heads in ((1, 32), (64, 32), (256, 32), (8192, 32), (8192, 64)):
        yield Case(f"{tokens}x{heads}+8x128", lambda t=tokens, h=heads: _draw(t, h, 8, 128, 1024, max_pos=8192),
                   large=True)
    yield Case("256x32+8x128-fp8", lambda: _draw(256, 32, 8, 128, 1024, cache_dtype=quant.fp8_dtype(), scale=0.05,
                                                 max_pos=8192), large=True)


def check(positions, query, key, value, cos_sin_cache, key_cache, value_cache, slot_mapping, is_neox=True, k_scale=None,
          v_scale=None):
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 3:
            raise BadArgument(name, "[num_tokens, num_heads, head_dim]", tensor)
    if key.shape[2] != query.shape[2]:
        raise BadArgument("key", f"[num_tokens, num_kv_heads, {query.shape[2]}], head_dim of query", key)
    check_rotation(positions, query, key, query.shape[2], cos_sin_cache, is_neox)
    if value.shape != key.shape or value.dtype != key.dtype:
        raise BadArgument("value", f"{key.dtype} {list(key.shape)}, dtype and shape of key", value)
    if slot_mapping.shape != positions.shape:
        raise BadArgument("slot_mapping", f"int64 [{positions.shape[0]}], a slot per position", slot_mapping)
    check_cache_write(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)


def cost(positions, query, key, value, cos_sin_cache, key_cache, value_cache, slot_mapping, is_neox=True, k_scale=None,
         v_scale=None) -> Cost:
    rot_dim, head_dim = cos_sin_cache.shape[1], query.shape[2]
    rotated = (query.numel() + key.numel()) * rot_dim // head_dim * query.element_size() if head_dim else 0
    kept = key.numel() * (head_dim - rot_dim) // head_dim if head_dim else 0
    angles = positions.numel() * rot_dim * cos_sin_cache.element_size()
    cached = 2 * key.numel() * key_cache.element_size()
    return Cost(bytes=2 * rotated + kept * key.element_size() + value.nbytes + cached + angles
                + positions.numel() * positions.element_size() + slot_mapping.nbytes)


@op(cases=cases, check=check, cost=cost, mutates=("query", "key", "key_cache", "value_cache"),
    fake=lambda *_, **__: None)
def rotary_embedding_and_cache(positions: Tensor, query: Tensor, key: Tensor, value: Tensor, cos_sin_cache: Tensor,
                               key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, is_neox: bool = True,
                               k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    """Apply RoPE to query and key in place, then write key and value to the KV cache: rotary_embedding, then
    reshape_and_cache of the rotated and rounded key. A token whose slot is -1 is not cached, but its query and key are
    rotated. (Rotation: Su et al. 2021)

    positions      [num_tokens]  int64 or int32 in [0, max_pos), not checked; may be strided
    query          [num_tokens, num_heads, head_dim]  bf16, fp16 or fp32; last dim contiguous, rows and heads may be
                   strided (views of a merged QKV); written
    key, value     [num_tokens, num_kv_heads, head_dim]  dtype of query, strides like query; key is written
    cos_sin_cache  [max_pos, rot_dim]  fp32 (most exact), bf16 or fp16; cosines, then sines; contiguous; rot_dim even,
                   at most head_dim: the first rot_dim numbers of a head are rotated. Pair j is
                   (x[j], x[j + rot_dim/2]) if is_neox, else (x[2j], x[2j + 1]); (a, b) becomes
                   (a cos - b sin, b cos + a sin), in fp32
    *_cache        [num_pages, page_size, num_kv_heads, head_dim]  dtype of query, or float8_e4m3fn or float8_e4m3fnuz,
                   which stores x / scale, saturated; contiguous; written
    slot_mapping   [num_tokens]  int64 in [-1, num_pages * page_size), not checked; no slot twice, except -1
    *_scale        fp32, one number, [] or [1], or one per head, [num_kv_heads]; FP8 caches only; None means 1; numbers
                   below 2^-126 count as 2^-126
    raises         BadArgument (a ValueError) for other shapes, dtypes, strides or devices
    """
    rotary_embedding.reference(positions, query, key, query.shape[2], cos_sin_cache, is_neox)
    reshape_and_cache.reference(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
