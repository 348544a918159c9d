"""Writes the new tokens' latents and rotated keys into the paged cache of multi-head latent attention."""

import torch
from torch import Tensor

from wave64 import pools, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.reshape_and_cache import FP8, reshape_and_cache
from wave64.ops.rms_norm import DTYPES
from wave64.quant import fp8_dtype


def _draw(tokens, pages, rank=512, rope=64, dtype=torch.bfloat16, cache_dtype=None, page_size=16, skip=(), scale=None):
    """Both parts as views into one projection, the key's [num_tokens, 1, rope_dim] as models have it; slots drawn
    without repetition, `skip` of them -1."""
    projected = torch.randn(tokens, rank + rope, dtype=dtype) * 4
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[list(skip)] = -1
    drawn = dict(kv_c=projected[:, :rank], k_pe=projected[:, None, rank:],
                 kv_cache=torch.randn(pages, page_size, rank + rope).to(cache_dtype or dtype), slot_mapping=slots)
    return drawn if scale is None else drawn | dict(scale=torch.tensor(scale))


def with_zeros(args):
    """Every other number 0: what a scale of next to nothing must not make NaN."""
    for name in ("kv_c", "k_pe"):
        args[name][..., ::2] = 0.0
    return args


def _contiguous():
    args = _draw(5, 2, skip=(1,))
    return args | dict(kv_c=args["kv_c"].contiguous(), k_pe=args["k_pe"][:, 0].contiguous())


def long_rows(tokens, pages):
    """Rows that span more than 2 GiB, for which offsets have 64 bits."""
    rows = torch.empty(tokens, 2**30 // (tokens - 1) // 64 * 64 + 640, dtype=torch.bfloat16)[:, :576].normal_()
    return _draw(tokens, pages) | dict(kv_c=rows[:, :512], k_pe=rows[:, None, 512:])


def cases():
    for dtype in DTYPES:
        yield Case(f"deepseek-{dtype}", lambda d=dtype: _draw(37, 3, dtype=d, skip=(3,)))
    for dtype in DTYPES:
        yield Case(f"odd-{dtype}", lambda d=dtype: _draw(7, 5, 37, 5, d, page_size=3, skip=(0, 4)))
        for fp8 in FP8:
            yield Case(f"{fp8}-from-{dtype}", lambda d=dtype, c=fp8: _draw(5, 2, dtype=d, cache_dtype=c, skip=(1,),
                                                                           scale=0.03))
        yield Case(f"odd-fp8-from-{dtype}", lambda d=dtype: _draw(
            4, 5, 37, 5, d, fp8_dtype(), page_size=3, skip=(2,), scale=0.03))
    yield Case("contiguous", _contiguous)
    yield Case("fp8-unscaled", lambda: _draw(5, 2, cache_dtype=FP8[0]))
    yield Case("fp8-scale-0", lambda: with_zeros(_draw(5, 2, cache_dtype=fp8_dtype(), scale=0.0)))
    for fp8 in FP8:
        yield Case(f"{fp8}-scale-1e-40", lambda c=fp8: with_zeros(_draw(5, 2, cache_dtype=c, scale=1e-40)))
    yield Case("small", lambda: _draw(70, 5, 32, 8))
    yield Case("one-token", lambda: _draw(1, 1, page_size=1))
    yield Case("all-skipped", lambda: _draw(4, 2, skip=(0, 1, 2, 3)))
    yield Case("empty", lambda: _draw(0, 2))
    yield from pools.cases(lambda page_size, fp8: _draw(
        24, 12, 128, cache_dtype=quant.fp8_dtype() if fp8 else None, page_size=page_size, skip=(1,)), ("kv_cache",),
        slots=["slot_mapping"])
    for tokens, pages in [(1, 64), (128, 4096), (8192, 4096)]:
        yield Case(f"{tokens}x576", lambda t=tokens, p=pages: _draw(t, p), large=True)
    yield Case("8192x576-far-apart", lambda: long_rows(8192, 4096), large=True)
    for fp8 in FP8:
        for tokens in (128, 8192):
            yield Case(f"{tokens}x576-{fp8}", lambda t=tokens, c=fp8: _draw(t, 4096, cache_dtype=c, scale=0.05),
                       large=True)


def check(kv_c, k_pe, kv_cache, slot_mapping, scale=None):
    if slot_mapping.ndim != 1 or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        raise BadArgument("slot_mapping", "contiguous int64 [num_tokens]", slot_mapping)
    tokens = slot_mapping.shape[0]
    if kv_c.ndim != 2 or kv_c.shape[0] != tokens or kv_c.shape[1] == 0 or kv_c.stride(1) != 1 and kv_c.shape[1] > 1:
        raise BadArgument("kv_c", f"[{tokens}, kv_lora_rank], a row per slot, last dimension contiguous", kv_c)
    if kv_c.dtype not in DTYPES:
        raise BadArgument("kv_c", "bf16, fp16 or fp32", kv_c)
    if k_pe.ndim not in (2, 3) or k_pe.shape[0] != tokens or k_pe.ndim == 3 and k_pe.shape[1] != 1 \
            or k_pe.shape[-1] == 0 or k_pe.stride(-1) != 1 and k_pe.shape[-1] > 1:
        expected = f"[{tokens}, rope_dim] or [{tokens}, 1, rope_dim], last dimension contiguous"
        raise BadArgument("k_pe", expected, k_pe)
    if k_pe.dtype != kv_c.dtype:
        raise BadArgument("k_pe", f"dtype {kv_c.dtype}, that of kv_c", k_pe)
    row = kv_c.shape[1] + k_pe.shape[-1]
    if kv_cache.ndim != 3 or kv_cache.shape[2] != row or not kv_cache.is_contiguous():
        expected = f"contiguous [num_pages, page_size, {row}], kv_lora_rank + rope_dim"
        raise BadArgument("kv_cache", expected, kv_cache)
    if kv_cache.dtype != kv_c.dtype and kv_cache.dtype not in FP8:
        raise BadArgument("kv_cache", f"dtype {kv_c.dtype}, that of kv_c, or float8_e4m3fn(uz)", kv_cache)
    if scale is not None and (scale.numel() != 1 or scale.ndim > 1 or scale.dtype != torch.float32):
        raise BadArgument("scale", "one fp32 value in a tensor, [] or [1]", scale)
    if scale is not None and kv_cache.dtype not in FP8:
        raise BadArgument("scale", f"None for a {kv_cache.dtype} cache", scale, "scales belong to FP8 caches")


def cost(kv_c, k_pe, kv_cache, slot_mapping, scale=None) -> Cost:
    numbers = kv_c.numel() + k_pe.numel()
    return Cost(bytes=numbers * (kv_c.element_size() + kv_cache.element_size()) + slot_mapping.nbytes)


@op(cases=cases, check=check, cost=cost, mutates=("kv_cache",), fake=lambda *_, **__: None)
def concat_and_cache_mla(kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                         scale: Tensor | None = None) -> None:
    """Write new tokens to a paged latent cache: kv_cache[slot // page_size, slot % page_size] = [kv_c[t], k_pe[t]] with
    slot = slot_mapping[t]. Tokens whose slot is -1 are skipped. An FP8 cache stores x / scale, computed in fp32,
    saturated and rounded to nearest even.   (DeepSeek-AI 2024, DeepSeek-V2)

    kv_c         [num_tokens, kv_lora_rank]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    k_pe         [num_tokens, rope_dim] or [num_tokens, 1, rope_dim]  dtype of kv_c, strides like it; RoPE is applied
                 already
    kv_cache     [num_pages, page_size, kv_lora_rank + rope_dim]  dtype of kv_c, or float8_e4m3fn or float8_e4m3fnuz;
                 contiguous; written
    slot_mapping [num_tokens]  int64 in [-1, num_pages * page_size), not checked; no slot twice, except -1
    scale        one fp32 value in a tensor, FP8 caches only; None means 1; values below 2^-126 count as 2^-126
    raises       BadArgument (a ValueError) for other shapes, dtypes, strides or devices
    """
    if kv_cache.numel() == 0:
        return  # no slot but -1
    # The two parts of a row are a key and a value of one head, in two views of the cache.
    rank, cache = kv_c.shape[1], kv_cache.unsqueeze(2)
    key, value = kv_c.unsqueeze(1), k_pe if k_pe.ndim == 3 else k_pe.unsqueeze(1)
    reshape_and_cache.reference(key, value, cache[..., :rank], cache[..., rank:], slot_mapping, scale, scale)
