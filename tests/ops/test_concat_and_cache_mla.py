"""`concat_and_cache_mla` against a loop over tokens, and FP8 caches against torch's conversion."""

import helpers
import pytest
import torch
from helpers import BACKENDS, FP8, bits, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops

quick = examples(20)


def run(backend, *args):
    helpers.run(ops.concat_and_cache_mla, backend, *args)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(pages=st.integers(1, 9), page_size=st.integers(1, 9), widths=st.sampled_from(
    [(1, 1), (24, 8), (37, 5), (130, 3), (256, 64), (512, 64), (600, 200)]), offset=st.sampled_from([0, 1, 64]),
    one_head=st.booleans(), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), data=st.data())
def test_equals_a_loop_over_tokens(backend, device, pages, page_size, widths, offset, one_head, dtype, data):
    """Both parts are adjacent columns of one projection, after `offset` other columns."""
    slots = data.draw(st.permutations(range(pages * page_size)))[:data.draw(st.integers(0, 40))]
    for i in data.draw(st.lists(st.integers(0, max(len(slots) - 1, 0)), max_size=4)):
        slots[i:i + 1] = [-1]
    rank, rope = widths
    projected = torch.randn(len(slots), offset + rank + rope).to(dtype)
    cache = torch.randn(pages, page_size, rank + rope).to(dtype)
    expected = cache.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // page_size, slot % page_size] = projected[token, offset:]
    kv_c, k_pe = projected.to(device)[:, offset:].split([rank, rope], 1)
    pool = cache.to(device)
    run(backend, kv_c, k_pe[:, None] if one_head else k_pe, pool,
        torch.tensor(slots, dtype=torch.int64, device=device))
    assert torch.equal(pool.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [None, 4.0])
def test_fp8_saturates_and_rounds_to_nearest_even(backend, device, fp8, dtype, scale):
    """Every number of the format, every midpoint of two neighbors, and what lies beyond the largest; in both parts."""
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    numbers = numbers[numbers.isfinite()].unique()
    values = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([1e4, -1e4, 1e30])]).to(dtype)
    values = torch.cat([values, values.new_zeros(-len(values) % 24)]).view(-1, 24)
    values = torch.cat([values, values.flip(1)])
    pool = torch.zeros(1, len(values), 24, device=device).to(fp8)
    rows = (values * (scale or 1)).to(device)
    run(backend, rows[:, :16], rows[:, 16:], pool, torch.arange(len(values), device=device),
        None if scale is None else torch.tensor(scale, device=device))
    limit = torch.finfo(fp8).max
    assert torch.equal(bits(pool[0]), bits(values.float().clamp(-limit, limit).to(fp8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_in_fp8(backend, device):
    row = torch.full((1, 24), float("nan"), device=device)
    pool = torch.zeros(1, 1, 24, device=device).to(FP8[0])
    run(backend, row[:, :16], row[:, 16:], pool, torch.zeros(1, dtype=torch.int64, device=device))
    assert pool.float().isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_beyond_two_to_the_31(backend, device):
    """Offsets in the pool need 33 bits. Memory that is never touched costs nothing on a CPU."""
    pages = 2**31 // (64 * 576 * 2) * 2 + 2
    pool = torch.empty(pages, 64, 576, dtype=torch.bfloat16, device=device)
    slots = torch.tensor([pages * 64 - 1, 5, pages * 32, -1, pages * 64 - 2], device=device)
    row = torch.randn(5, 576, device=device).bfloat16()
    run(backend, row[:, :512], row[:, 512:], pool, slots)
    kept = slots >= 0
    assert torch.equal(pool[slots[kept] // 64, slots[kept] % 64], row[kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_two_to_the_31(backend, device):
    stride = 2**31 // 48 * 16 + 16
    far = torch.empty(3 * stride + 576, dtype=torch.bfloat16, device=device).as_strided((4, 576), (stride, 1))
    far.copy_(torch.randn(4, 576))
    pool = torch.zeros(1, 4, 576, dtype=torch.bfloat16, device=device)
    run(backend, far[:, :512], far[:, 512:], pool, torch.arange(4, device=device))
    assert torch.equal(pool[0], far)


def test_a_pool_without_pages_takes_only_skipped_tokens(device):
    row, none = torch.randn(2, 24, device=device), torch.full((2,), -1, device=device)
    ops.concat_and_cache_mla(row[:, :16], row[:, 16:], torch.zeros(0, 16, 24, device=device), none)


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("kv_c", torch.zeros(3, 1, 16), "[3, kv_lora_rank]"), ("kv_c", torch.zeros(2, 16), "a row per slot"),
    ("kv_c", torch.zeros(3, 0), "[3, kv_lora_rank]"), ("kv_c", torch.zeros(3, 32)[:, ::2], "last dimension contiguous"),
    ("kv_c", torch.zeros(3, 16).double(), "bf16, fp16 or fp32"),
    ("k_pe", torch.zeros(8), "[3, rope_dim]"), ("k_pe", torch.zeros(2, 8), "[3, rope_dim]"),
    ("k_pe", torch.zeros(3, 2, 8), "[3, 1, rope_dim]"), ("k_pe", torch.zeros(3, 0), "[3, rope_dim]"),
    ("k_pe", torch.zeros(3, 1, 16)[..., ::2], "last dimension contiguous"),
    ("k_pe", torch.zeros(3, 8).half(), "that of kv_c"), ("k_pe", torch.zeros(3, 8, device="meta"), "where kv_c is"),
    ("kv_cache", torch.zeros(4, 24), "[num_pages, page_size, 24]"),
    ("kv_cache", torch.zeros(4, 1, 25), "[num_pages, page_size, 24]"),
    ("kv_cache", torch.zeros(4, 2, 24)[:, :1], "contiguous"),
    ("kv_cache", torch.zeros(4, 1, 24).half(), "that of kv_c, or float8"),
    ("kv_cache", torch.zeros(4, 1, 24).to(torch.float8_e5m2), "that of kv_c, or float8"),
    ("kv_cache", torch.zeros(4, 1, 24, device="meta"), "where kv_c is"),
    ("slot_mapping", torch.zeros(3, dtype=torch.int32), "int64 [num_tokens]"),
    ("slot_mapping", torch.zeros(1, 3, dtype=torch.int64), "int64 [num_tokens]"),
    ("slot_mapping", torch.zeros(6, dtype=torch.int64)[::2], "contiguous"),
    ("slot_mapping", torch.zeros(3, dtype=torch.int64, device="meta"), "where kv_c is"),
    ("scale", torch.ones(1), "None for a torch.float32 cache")])
def test_refuses(argument, wrong, words):
    refuse(dict(kv_cache=torch.zeros(4, 1, 24)) | {argument: wrong}, argument, words)


@pytest.mark.parametrize(("wrong", "words"), [
    (torch.ones(2), "one fp32 value"), (torch.ones(1).half(), "one fp32 value"),
    (torch.ones(1, device="meta"), "where kv_c is")])
def test_refuses_scales_of_fp8_caches(wrong, words):
    refuse(dict(kv_cache=torch.zeros(4, 1, 24).to(FP8[0]), scale=wrong), "scale", words)


def refuse(changes, argument, words):
    args = dict(kv_c=torch.zeros(3, 16), k_pe=torch.zeros(3, 8), slot_mapping=torch.zeros(3, dtype=torch.int64))
    with refused("concat_and_cache_mla", argument, words):
        ops.concat_and_cache_mla(**args | changes)


@pytest.mark.parametrize(("arch", "flavor"), [("gfx942", FP8[1]), ("gfx950", FP8[0])])
def test_the_kernel_serves_the_fp8_of_its_architecture(arch, flavor):
    from wave64 import platform

    supports = ops.concat_and_cache_mla.backends["triton"].supports
    args = [torch.zeros(3, 16), torch.zeros(3, 8), None, torch.zeros(3, dtype=torch.int64)]
    with platform.target(arch):
        for fp8 in FP8:
            args[2] = torch.zeros(4, 1, 24).to(fp8)
            assert (supports(*args) is None) == (fp8 == flavor)
