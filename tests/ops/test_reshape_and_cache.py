"""`reshape_and_cache` against a loop over tokens, and FP8 caches against torch's conversion."""

import helpers
import pytest
import torch
from helpers import CPU_BACKENDS, FP8, bits, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops

quick = examples(10)


def run(backend, *args):
    helpers.run(ops.reshape_and_cache, backend, *args)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@quick
@given(pages=st.integers(1, 6), page_size=st.integers(1, 5), heads=st.integers(1, 4), head_dim=st.integers(1, 40),
       data=st.data())
def test_equals_a_loop_over_tokens(backend, device, pages, page_size, heads, head_dim, data):
    slots = data.draw(st.lists(st.integers(0, pages * page_size - 1), unique=True, max_size=8))
    for i in data.draw(st.lists(st.integers(0, max(len(slots) - 1, 0)), max_size=4)):
        slots[i:i + 1] = [-1]
    qkv = torch.randn(len(slots), 3 * heads, head_dim)
    caches = torch.randn(2, pages, page_size, heads, head_dim)
    expected = caches.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            for which in (0, 1):
                expected[which, slot // page_size, slot % page_size] = qkv[token, (which + 1) * heads:][:heads]
    merged, pools = qkv.to(device), caches.to(device)
    run(backend, merged[:, heads:2 * heads], merged[:, 2 * heads:], pools[0], pools[1],
        torch.tensor(slots, dtype=torch.int64, device=device))
    assert torch.equal(pools.cpu(), expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_saturates_and_rounds_to_nearest_even(backend, device, fp8, dtype):
    """Every number of the format, every midpoint of two neighbors, and what lies beyond the largest."""
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    numbers = numbers[numbers.isfinite()].unique()
    values = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([1e4, -1e4, 1e30])]).to(dtype)
    values = torch.cat([values, values.new_zeros(-len(values) % 8)]).view(-1, 2, 4)
    limit = torch.finfo(fp8).max
    pools = [torch.zeros(len(values), 1, 2, 4, device=device).to(fp8) for _ in range(2)]
    run(backend, values.to(device), values.to(device) * 4, *pools, torch.arange(len(values), device=device), None,
        torch.tensor([4.0], device=device))
    expected = bits(values.float().clamp(-limit, limit).to(fp8))
    assert torch.equal(bits(pools[0].view(values.shape)), expected)
    overflowed = (values * 4).isinf()
    assert torch.equal(bits(pools[1].view(values.shape))[~overflowed], expected[~overflowed])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_stays_nan_in_fp8(backend, device):
    key = torch.full((1, 1, 8), float("nan"), device=device)
    pools = [torch.zeros(1, 1, 1, 8, device=device).to(FP8[0]) for _ in range(2)]
    run(backend, key, key, *pools, torch.zeros(1, dtype=torch.int64, device=device))
    assert pools[0].float().isnan().all()


@pytest.mark.parametrize(("argument", "wrong"), [
    ("key", torch.zeros(3, 2)), ("key", torch.zeros(2, 2, 8)), ("value", torch.zeros(3, 2, 16)[..., ::2]),
    ("key_cache", torch.zeros(4, 1, 2, 9)), ("key_cache", torch.zeros(4, 1, 2, 8).half()),
    ("value_cache", torch.zeros(5, 1, 2, 8)), ("value_cache", torch.zeros(4, 1, 2, 8).to(FP8[0])),
    ("slot_mapping", torch.zeros(3, dtype=torch.int32)), ("k_scale", torch.ones(1)), ("v_scale", torch.ones(2))])
def test_refuses_by_name(argument, wrong):
    args = dict(key=torch.zeros(3, 2, 8), value=torch.zeros(3, 2, 8), key_cache=torch.zeros(4, 1, 2, 8),
                value_cache=torch.zeros(4, 1, 2, 8), slot_mapping=torch.zeros(3, dtype=torch.int64))
    with refused("reshape_and_cache", argument):
        ops.reshape_and_cache(**args | {argument: wrong})
