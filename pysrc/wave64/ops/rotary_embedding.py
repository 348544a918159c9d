"""Rotary position embedding of query and key, in place."""

from typing import Any

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES


def _draw(tokens, heads, kv_heads, head_size, rot_dim=None, dtype=torch.bfloat16, is_neox=True, max_pos=8192,
          layout="merged", cache_dtype=torch.float32) -> dict[str, Any]:
    """layout: "merged" rows of one qkv tensor, "flat" or "heads" contiguous of their own."""
    rot_dim = rot_dim or head_size
    angle = torch.rand(max_pos, rot_dim // 2) * 6.2832
    merged = torch.randn(tokens, (heads + 2 * kv_heads) * head_size, dtype=dtype)
    query, key, _ = merged.split([heads * head_size, kv_heads * head_size, kv_heads * head_size], -1)
    if layout != "merged":
        query, key = query.contiguous(), key.contiguous()
    if layout == "heads":
        query, key = query.view(tokens, heads, head_size), key.view(tokens, kv_heads, head_size)
    return dict(positions=torch.randint(max_pos, (tokens,)), query=query, key=key if kv_heads else None,
                head_size=head_size, cos_sin_cache=torch.cat([angle.cos(), angle.sin()], -1).to(cache_dtype),
                is_neox=is_neox)


def _int32():
    drawn = _draw(9, 3, 1, 16)
    return drawn | {"positions": drawn["positions"].int()}


def _strided_positions():
    """Every other number, as of a view."""
    args = _draw(5, 4, 2, 64, max_pos=64)
    positions = args["positions"]
    return args | dict(positions=torch.stack([positions, positions.flip(0)], 1)[:, 0])


def cases():
    for dtype in DTYPES:
        for is_neox in (True, False):
            yield Case(f"llama-8b-{dtype}-{'neox' if is_neox else 'interleaved'}",
                       lambda d=dtype, n=is_neox: _draw(2, 32, 8, 128, dtype=d, is_neox=n, max_pos=64))
        yield Case(f"partial-{dtype}", lambda d=dtype: _draw(7, 5, 1, 80, 24, dtype=d, max_pos=64))
    yield Case("partial-interleaved", lambda: _draw(7, 3, 3, 80, 24, is_neox=False, max_pos=64))
    yield Case("odd-head-size", lambda: _draw(3, 3, 1, 37, 22, max_pos=64, layout="flat"))
    yield Case("odd-head-size-fp32", lambda: _draw(3, 3, 1, 37, 22, torch.float32, max_pos=64, layout="flat"))
    yield Case("narrow", lambda: _draw(3, 1, 1, 2, max_pos=64, layout="heads"))
    yield Case("heads", lambda: _draw(5, 7, 1, 48, max_pos=64, layout="heads"))
    yield Case("query-only", lambda: _draw(5, 6, 0, 64, max_pos=64))
    yield Case("cache-in-dtype", lambda: _draw(5, 4, 2, 64, max_pos=64, cache_dtype=torch.bfloat16))
    yield Case("positions-int32", _int32)
    yield Case("positions-strided", _strided_positions)
    yield Case("empty", lambda: _draw(0, 4, 2, 64, max_pos=64))
    for tokens, heads, kv_heads in [(1, 32, 8), (128, 32, 8), (128, 64, 8), (4096, 32, 8), (16384, 64, 8)]:
        yield Case(f"{tokens}x{heads}+{kv_heads}x128",
                   lambda t=tokens, h=heads, k=kv_heads: _draw(t, h, k, 128), large=True)


def _refuse(name: str, x: Tensor, tokens: int, head_size: int) -> None:
    """Raises unless `x` is [tokens, heads * head_size] or [tokens, heads, head_size], dense within a row."""
    wrong = x.ndim not in (2, 3) or x.shape[0] != tokens or (x.stride(-1) != 1 and x.shape[-1] > 1)
    if x.ndim == 2:
        wrong |= x.shape[1] % head_size != 0
    else:
        wrong = wrong or x.shape[2] != head_size
    if wrong:
        raise BadArgument(name, f"[{tokens}, heads * {head_size}] or [{tokens}, heads, {head_size}], a row per "
                          "position, last dimension contiguous", x)


def check(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    if positions.ndim != 1 or positions.dtype not in (torch.int64, torch.int32):
        raise BadArgument("positions", "int64 or int32 [num_tokens]", positions)
    if head_size < 1:
        raise BadArgument("head_size", "at least 1", head_size)
    _refuse("query", query, positions.shape[0], head_size)
    if query.dtype not in DTYPES:
        raise BadArgument("query", "bf16, fp16 or fp32", query)
    if key is not None:
        _refuse("key", key, positions.shape[0], head_size)
        if key.dtype != query.dtype:
            raise BadArgument("key", f"dtype {query.dtype}, that of query", key)
    if (cos_sin_cache.ndim != 2 or not len(cos_sin_cache) or cos_sin_cache.shape[1] % 2
            or cos_sin_cache.shape[1] > head_size or not cos_sin_cache.is_contiguous()):
        raise BadArgument("cos_sin_cache", "contiguous [max_pos, rot_dim] with max_pos at least 1, rot_dim even and at "
                          f"most {head_size}", cos_sin_cache)
    if cos_sin_cache.dtype not in DTYPES:
        raise BadArgument("cos_sin_cache", "fp32, or bf16 or fp16", cos_sin_cache)


def cost(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    rot_dim = cos_sin_cache.shape[1]
    rotated = (query.nbytes + (key.nbytes if key is not None else 0)) * rot_dim // head_size
    return Cost(bytes=2 * rotated + positions.nbytes + positions.numel() * rot_dim * cos_sin_cache.element_size())


def _rotate(x: Tensor, head_size: int, cos: Tensor, sin: Tensor, pair: int) -> None:
    """Rotates `x` in place; cos and sin are [num_tokens, 1, rot_dim / 2], `pair` the dimension of a pair: -2 or -1."""
    half = cos.shape[-1]
    if x.ndim == 2:
        x = x.view(x.shape[0], x.shape[1] // head_size, head_size)
    x = x[..., :2 * half]
    x = x.view(*x.shape[:2], *((2, half) if pair == -2 else (half, 2)))
    wide = x.to(cos.dtype)
    rotated, crossed = wide * cos.unsqueeze(pair), wide * sin.unsqueeze(pair)
    first, second = rotated.unbind(pair)
    a, b = crossed.unbind(pair)
    first.sub_(b)
    second.add_(a)
    x.copy_(rotated)


@op(cases=cases, check=check, cost=cost, mutates=("query", "key"))
def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor,
                     is_neox: bool = True) -> None:
    """Apply RoPE to the first rot_dim values of every head of query and key, in place; in fp32, rounded once.
    (Su et al. 2021)

    Pair j is (x[j], x[j + rot_dim / 2]) if is_neox, else (x[2j], x[2j + 1]); (a, b) becomes (a c - b s, b c + a s)
    with c = cos_sin_cache[position, j] and s = cos_sin_cache[position, j + rot_dim / 2]. The rest of a head does not
    change.

    positions      [num_tokens]                    int64 or int32 in [0, max_pos), not checked
    query          [num_tokens, heads * head_size] or [num_tokens, heads, head_size], bf16, fp16 or fp32; last dim
                   contiguous, rows may be strided (a view of a merged QKV); written
    key            like query, with its own number of heads; or None; written
    cos_sin_cache  [max_pos, rot_dim]              fp32 (most exact), bf16 or fp16; cosines, then sines; rot_dim even,
                   at most head_size
    raises         BadArgument (a ValueError) for other shapes or dtypes
    """
    angles = cos_sin_cache.index_select(0, positions).to(torch.promote_types(query.dtype, torch.float32)).unsqueeze(1)
    cos, sin = angles.chunk(2, -1)
    pair = -2 if is_neox else -1
    _rotate(query, head_size, cos, sin, pair)
    if key is not None:
        _rotate(key, head_size, cos, sin, pair)
