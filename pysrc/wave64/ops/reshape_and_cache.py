"""Writes the new tokens' keys and values into the paged KV cache."""

import torch
from torch import Tensor

from wave64 import pools, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

FP8 = tuple(quant.FP8.values())


def _draw(tokens, pages, heads, head_dim, dtype=torch.bfloat16, cache_dtype=None, page_size=16, skip=(), scale=None,
          per_head=False):
    """Keys and values as views into a merged qkv, slots drawn without repetition, `skip` of them -1."""
    qkv = torch.randn(tokens, 3 * heads, head_dim, dtype=dtype) * 4
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[list(skip)] = -1
    caches = [torch.randn(pages, page_size, heads, head_dim).to(cache_dtype or dtype) for _ in range(2)]
    drawn = dict(key=qkv[:, heads:2 * heads], value=qkv[:, 2 * heads:], key_cache=caches[0], value_cache=caches[1],
                 slot_mapping=slots)
    if scale is None:
        return drawn
    if per_head:
        return drawn | dict(k_scale=(torch.rand(heads) + 0.5) * scale, v_scale=(torch.rand(heads) + 0.5) * scale)
    return drawn | dict(k_scale=torch.tensor(scale), v_scale=torch.tensor([2 * scale]))


def _with_zeros(args):
    """Every other number 0 or next to it: what a scale of next to nothing must not make NaN."""
    for name in ("key", "value"):
        args[name][..., ::4] = 0.0
        args[name][..., 1::4] *= 1e-38
    return args


def _strided_heads(tokens, heads, head_dim):
    """Keys and values side by side within each head."""
    both = torch.randn(tokens, heads, 2 * head_dim, dtype=torch.bfloat16)
    return _draw(tokens, 2, heads, head_dim) | dict(key=both[..., :head_dim], value=both[..., head_dim:])


def cases():
    for dtype in DTYPES:
        yield Case(f"llama-8b-{dtype}", lambda d=dtype: _draw(3, 2, 8, 128, d))
    for dtype in DTYPES:
        yield Case(f"odd-{dtype}", lambda d=dtype: _draw(7, 5, 3, 37, d, page_size=3, skip=(0, 4)))
        for fp8 in FP8:
            yield Case(f"{fp8}-from-{dtype}", lambda d=dtype, c=fp8: _draw(5, 2, 2, 64, d, c, skip=(1,), scale=0.03))
        yield Case(f"odd-fp8-from-{dtype}", lambda d=dtype: _draw(
            4, 5, 3, 37, d, quant.fp8_dtype(), page_size=3, skip=(2,), scale=0.03))
    yield Case("fp8-per-head", lambda: _draw(5, 2, 3, 64, cache_dtype=quant.fp8_dtype(), scale=0.03, per_head=True))
    yield Case("odd-fp8-per-head", lambda: _draw(
        4, 5, 3, 37, cache_dtype=quant.fp8_dtype(), page_size=3, skip=(2,), scale=0.03, per_head=True))
    yield Case("llama-8b-fp8", lambda: _draw(3, 2, 8, 128, cache_dtype=quant.fp8_dtype(), scale=0.03))
    yield Case("fp8-unscaled", lambda: _draw(5, 2, 2, 64, cache_dtype=torch.float8_e4m3fn))
    for scale in (0.0, 1e-40, 2.0**-126):
        yield Case(f"fp8-scale-{scale:.0e}", lambda s=scale: _with_zeros(_draw(
            5, 2, 2, 64, cache_dtype=FP8[0], scale=s)))
        yield Case(f"fp8-fnuz-scale-{scale:.0e}", lambda s=scale: _with_zeros(_draw(
            5, 2, 2, 64, torch.float32, FP8[1], scale=s)))
    yield Case("heads-apart", lambda: _strided_heads(5, 3, 64))
    yield Case("one-token", lambda: _draw(1, 1, 1, 64, page_size=1))
    yield Case("all-skipped", lambda: _draw(4, 2, 2, 32, skip=(0, 1, 2, 3)))
    yield Case("empty", lambda: _draw(0, 2, 2, 32))
    yield from pools.cases(lambda page_size, fp8: _draw(
        24, 12, 2, 64, cache_dtype=quant.fp8_dtype() if fp8 else None, page_size=page_size, skip=(1,)),
        ("key_cache", "value_cache"), slots=["slot_mapping"])
    for tokens, pages in [(1, 64), (128, 4096), (4096, 4096), (16384, 4096)]:
        yield Case(f"{tokens}x8x128", lambda t=tokens, p=pages: _draw(t, p, 8, 128), large=True)
    yield Case("128x8x128-fp8", lambda: _draw(128, 4096, 8, 128, cache_dtype=FP8[0], scale=0.05), large=True)


def _refuse(name: str, new: Tensor, cache: Tensor, tokens: int) -> None:
    if new.ndim != 3 or new.shape[0] != tokens or new.stride(2) != 1 and new.shape[2] > 1:
        raise BadArgument(name, f"[{tokens}, num_kv_heads, head_dim], a row per slot, last dimension contiguous", new)
    if new.dtype not in DTYPES:
        raise BadArgument(name, "bf16, fp16 or fp32", new)
    if cache.ndim != 4 or cache.shape[2:] != new.shape[1:] or not cache.is_contiguous():
        raise BadArgument(f"{name}_cache", f"contiguous [num_pages, page_size, {new.shape[1]}, {new.shape[2]}]", cache)
    if cache.dtype != new.dtype and cache.dtype not in FP8:
        raise BadArgument(f"{name}_cache", f"dtype {new.dtype}, that of {name}, or float8_e4m3fn(uz)", cache)


def check(key, value, key_cache, value_cache, slot_mapping, k_scale=None, v_scale=None):
    if slot_mapping.ndim != 1 or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        raise BadArgument("slot_mapping", "contiguous int64 [num_tokens]", slot_mapping)
    _refuse("key", key, key_cache, slot_mapping.shape[0])
    _refuse("value", value, value_cache, slot_mapping.shape[0])
    if value_cache.dtype != key_cache.dtype or value_cache.shape[:2] != key_cache.shape[:2]:
        pages = list(key_cache.shape[:2])
        raise BadArgument("value_cache", f"{key_cache.dtype} with the pages of key_cache, {pages}", value_cache)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        heads = key.shape[1]
        if scale is not None and (scale.shape not in ((), (1,), (heads,)) or not scale.is_contiguous()
                                  or scale.dtype != torch.float32):
            raise BadArgument(name, f"fp32, one number, [] or [1], or contiguous, one per head, [{heads}]", scale)
        if scale is not None and key_cache.dtype not in FP8:
            raise BadArgument(name, f"None for a {key_cache.dtype} cache", scale, "scales belong to FP8 caches")


def cost(key, value, key_cache, value_cache, slot_mapping, k_scale=None, v_scale=None):
    numbers = key.numel() + value.numel()
    return Cost(bytes=numbers * (key.element_size() + key_cache.element_size()) + slot_mapping.nbytes)


def as_stored(new: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
    """`new` in the cache's dtype: scaled and saturated where that is FP8."""
    if scale is not None:
        scale = scale.clamp(min=quant.MIN_SCALE).view(-1, 1)  # of a head, where there are several
        new = new.to(torch.promote_types(new.dtype, torch.float32)) / scale
    if cache.dtype in FP8:
        limit = torch.finfo(cache.dtype).max
        new = new.clamp(-limit, limit)
    return new.to(cache.dtype)


def rows_of(cache: Tensor) -> Tensor:
    """[num_slots, num_kv_heads, head_dim], FP8 as bytes: torch cannot index it."""
    return (cache.view(torch.uint8) if cache.dtype in FP8 else cache).view(-1, *cache.shape[2:])


@op(cases=cases, check=check, cost=cost, mutates=("key_cache", "value_cache"), fake=lambda *_, **__: None)
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
                      k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> None:
    """Write the keys and values of new tokens to a paged KV cache: cache[slot // page_size, slot % page_size] = key[t]
    with slot = slot_mapping[t]. Tokens whose slot is -1 are skipped. An FP8 cache stores x / scale, computed in fp32,
    saturated and rounded to nearest even.

    key, value   [num_tokens, num_kv_heads, head_dim]  bf16, fp16 or fp32; rows may be strided (views of a merged QKV)
    *_cache      [num_pages, page_size, num_kv_heads, head_dim]  dtype of key, or float8_e4m3fn or float8_e4m3fnuz;
                 contiguous; written
    slot_mapping [num_tokens]  int64 in [-1, num_pages * page_size), not checked; no slot twice, except -1
    *_scale      fp32, one number, [] or [1], or one per head, [num_kv_heads]; FP8 caches only; None means 1; numbers
                 below 2^-126 count as 2^-126
    raises       BadArgument (a ValueError) for other shapes or dtypes
    """
    tokens = slot_mapping.shape[0]
    if tokens == 0 or key_cache.numel() == 0:  # without a page every slot is -1
        return
    # A skipped token repeats one that is not: the same value to the same slot, so order cannot matter and no shape
    # depends on data. Where all are skipped, slot 0 is written with what it holds.
    valid = slot_mapping >= 0
    some, kept = valid.to(torch.uint8).max(0)
    source = torch.where(valid, torch.arange(tokens, device=slot_mapping.device), kept)
    slots = slot_mapping.index_select(0, source).clamp_(min=0)
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows, stored = rows_of(cache), as_stored(new, cache, scale)
        new_rows = (stored.view(torch.uint8) if cache.dtype in FP8 else stored).index_select(0, source)
        rows.index_copy_(0, slots, torch.where(some.bool(), new_rows, rows[0]))
