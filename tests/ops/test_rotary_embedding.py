"""`rotary_embedding` against transformers' (halves) and against a product of complex numbers (interleaved pairs)."""

import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from wave64 import ops

quick = examples(10)
MAX_POS = 40


def angles(rot_dim):
    return torch.arange(MAX_POS)[:, None] * 10000.0 ** (-torch.arange(0, rot_dim, 2) / rot_dim)


def run(backend, device, positions, query, key, head_size, table, is_neox):
    """Rotate views of one merged tensor, as a model does; elements next to them must not change."""
    tokens, rest_of_row = query.shape[0], torch.randn(query.shape[0], 8)
    merged = torch.cat([query.flatten(1), key.flatten(1), rest_of_row], 1).to(device)
    q, k, rest = merged.split([query[0].numel(), key[0].numel(), 8], 1)
    ops.rotary_embedding.backends[backend].run(positions.to(device), q, k, head_size, table.to(device), is_neox)
    assert torch.equal(rest.cpu(), rest_of_row)
    return q.cpu().reshape(tokens, -1, head_size), k.cpu().reshape(tokens, -1, head_size)


shapes = dict(tokens=st.integers(1, 6), heads=st.integers(1, 5), kv_heads=st.integers(1, 3), half=st.integers(1, 20),
              rest=st.integers(0, 7), seed=st.integers(0, 2**31))


def tensors(tokens, heads, kv_heads, head_size, seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(MAX_POS, (tokens,), generator=g), torch.randn(tokens, heads, head_size, generator=g),
            torch.randn(tokens, kv_heads, head_size, generator=g))


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(**shapes)
def test_halves_equal_transformers(backend, device, tokens, heads, kv_heads, half, rest, seed):
    positions, query, key = tensors(tokens, heads, kv_heads, 2 * half + rest, seed)
    angle = angles(2 * half)
    q, k = run(backend, device, positions, query, key, 2 * half + rest, torch.cat([angle.cos(), angle.sin()], 1), True)
    twice = torch.cat([angle, angle], 1)[positions][None]
    q_hf, k_hf = apply_rotary_pos_emb(query[None, ..., :2 * half], key[None, ..., :2 * half], twice.cos(), twice.sin(),
                                      unsqueeze_dim=2)
    torch.testing.assert_close(q, torch.cat([q_hf[0], query[..., 2 * half:]], -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, torch.cat([k_hf[0], key[..., 2 * half:]], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(**shapes)
def test_interleaved_pairs_are_rotated_complex_numbers(backend, device, tokens, heads, kv_heads, half, rest, seed):
    positions, query, key = tensors(tokens, heads, kv_heads, 2 * half + rest, seed)
    angle = angles(2 * half)
    got = run(backend, device, positions, query, key, 2 * half + rest, torch.cat([angle.cos(), angle.sin()], 1), False)
    rotation = torch.polar(torch.ones_like(angle), angle)[positions][:, None]
    for x, rotated in zip((query, key), got, strict=True):
        pairs = torch.view_as_complex(x[..., :2 * half].reshape(*x.shape[:2], half, 2).contiguous())
        expected = torch.cat([torch.view_as_real(pairs * rotation).flatten(-2), x[..., 2 * half:]], -1)
        torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_neox", [True, False])
def test_query_alone_and_position_zero_stays(backend, device, is_neox):
    angle = angles(16)
    table = torch.cat([angle.cos(), angle.sin()], 1).to(device)
    query = torch.randn(2, 3, 16, device=device)
    before = query.clone()
    ops.rotary_embedding.backends[backend].run(torch.tensor([0, 5], device=device), query, None, 16, table, is_neox)
    assert torch.equal(query[0], before[0])
    assert not torch.equal(query[1], before[1])


@pytest.mark.parametrize(("argument", "wrong"), [
    ("positions", torch.zeros(3)), ("query", torch.zeros(3, 31)), ("query", torch.zeros(2, 32)),
    ("query", torch.zeros(3, 2, 15)), ("key", torch.zeros(3, 16, dtype=torch.float16)), ("key", torch.zeros(3, 17)),
    ("cos_sin_cache", torch.zeros(40, 18)), ("cos_sin_cache", torch.zeros(40, 15))])
def test_refuses_by_name(argument, wrong):
    args = dict(positions=torch.zeros(3).long(), query=torch.zeros(3, 32), key=torch.zeros(3, 16), head_size=16,
                cos_sin_cache=torch.zeros(40, 16))
    with refused("rotary_embedding", argument):
        ops.rotary_embedding(**args | {argument: wrong})
