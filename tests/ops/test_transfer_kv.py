"""`transfer_kv` against a loop over pairs, between pools and between a GPU and the host."""

import pytest
import torch
from helpers import examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import BadArgument, ops, quant
from wave64.testing import contract, lanes

BACKENDS = sorted(ops.transfer_kv.backends)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, *quant.FP8.values())
quick = examples(20)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory is what it can read")


def run(backend, *args):
    """Without a GPU a HIP kernel runs on the CPU, lane by lane."""
    chosen = ops.transfer_kv.backends[backend].run
    if backend == "hip" and not torch.cuda.is_available():
        with lanes.on_cpu("gfx942"):
            chosen(*args)
    else:
        chosen(*args)


def pool_of(slots, row, dtype):
    return torch.randint(0, 2 if dtype == torch.bool else 120, (slots, *row), dtype=torch.uint8).to(dtype)


def moved(src, dst, src_slots, dst_slots):
    """What dst is to hold afterwards."""
    expected = dst.clone()
    for source, target in zip(src_slots, dst_slots, strict=True):
        if 0 <= source < len(src) and 0 <= target < len(dst):
            expected[target] = src[source]
    return expected


@st.composite
def pairs(draw, src_slots, dst_slots):
    """Sources as they come, targets without repetition; of either some that are in no pool."""
    outside = st.sampled_from([-1, -2, -2**63, 2**40, 2**63 - 1])
    targets = draw(st.lists(st.integers(0, dst_slots - 1), unique=True, max_size=30))
    sources = [draw(st.integers(0, src_slots - 1) | outside | st.just(src_slots)) for _ in targets]
    for i in draw(st.lists(st.integers(0, max(len(targets) - 1, 0)), max_size=4)):
        targets[i:i + 1] = [draw(outside | st.just(dst_slots))]
    return sources[:len(targets)] + [0] * (len(targets) - len(sources)), targets


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(src_slots=st.integers(1, 40), dst_slots=st.integers(1, 40), row=st.lists(st.integers(1, 9), max_size=3),
       gap=st.integers(0, 3), dtype=st.sampled_from(DTYPES), data=st.data())
def test_equals_a_loop_over_pairs(backend, device, src_slots, dst_slots, row, gap, dtype, data):
    """Between slots of src are `gap` rows that belong to no tensor."""
    sources, targets = data.draw(pairs(src_slots, dst_slots))
    src = pool_of(src_slots * (1 + gap), row, dtype)[::1 + gap]
    dst = pool_of(dst_slots, row, dtype)
    expected = moved(src, dst, sources, targets)
    pool = dst.to(device)
    wide = torch.zeros(src_slots * (1 + gap), *row, device=device).to(dtype)[::1 + gap]
    wide.copy_(src)
    run(backend, wide, pool, torch.tensor(sources, dtype=torch.int64, device=device),
        torch.tensor(targets, dtype=torch.int64, device=device))
    assert contract.same_bits(pool.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [(8, 128), (3, 7)])
def test_there_and_back_is_what_it_was(backend, device, row):
    """Pages out to another pool, as tokens through flatten(0, 1), and back from there."""
    pages = torch.randn(6, 4, *row, device=device).bfloat16()
    before, elsewhere = pages.clone(), torch.zeros(30, *row, device=device).bfloat16()
    slots, other = torch.randperm(24, device=device)[:20], torch.randperm(30, device=device)[:20]
    run(backend, pages.flatten(0, 1), elsewhere, slots, other)
    pages.flatten(0, 1)[slots] = float("nan")
    run(backend, elsewhere, pages.flatten(0, 1), other, slots)
    assert torch.equal(pages, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_within_one_pool(backend, device):
    pool = torch.arange(12.0, device=device).view(6, 2)
    run(backend, pool, pool, torch.tensor([5, 3, -1], device=device), torch.tensor([0, 1, 4], device=device))
    assert pool[:, 0].tolist() == [10, 6, 4, 6, 8, 10]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [-1, 4, 2**62, -2**63])
def test_a_slot_outside_writes_nothing(backend, device, slot):
    """Not even around the pool, which is the middle of a larger storage."""
    storage = torch.zeros(12, 32, device=device)
    outside, inside = torch.full((3,), slot, device=device), torch.arange(3, device=device)
    ones = torch.ones(4, 32, device=device)
    run(backend, ones, storage[4:8], inside, outside)
    run(backend, ones, storage[4:8], outside, inside)
    assert not storage.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pools_beyond_two_to_the_31(backend, device):
    """Offsets in bytes need 33 bits. Memory that is never touched costs nothing on a CPU."""
    slots = 2**32 // 1152 + 8
    far = torch.empty(slots, 576, dtype=torch.bfloat16, device=device)
    rows = torch.randn(3, 576, device=device).bfloat16()
    ends, three = torch.tensor([slots - 1, 2, slots // 2], device=device), torch.arange(3, device=device)
    run(backend, rows, far, three, ends)
    back = torch.zeros_like(rows)
    run(backend, far, back, ends, three)
    assert torch.equal(back, rows)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_to_the_host_and_back(backend, dtype):
    pool, host = pool_of(40, (8, 128), dtype).cuda(), pool_of(50, (8, 128), dtype).pin_memory()
    before, sources, targets = pool.clone(), torch.randperm(40)[:30], torch.randperm(50)[:30]
    targets[3], sources[7] = -1, 40
    expected = moved(pool.cpu(), host, sources.tolist(), targets.tolist())
    run(backend, pool, host, sources.cuda(), targets.cuda())
    torch.cuda.synchronize()
    assert contract.same_bits(host, expected)
    run(backend, host, pool, targets.cuda(), sources.cuda())
    assert contract.same_bits(pool, before)


@needs_gpu
def test_the_gpu_decides_which_backend_serves(monkeypatch):
    pool, host, slot = torch.zeros(2, 4).cuda(), torch.ones(2, 4).pin_memory(), torch.zeros(1, dtype=torch.int64).cuda()
    monkeypatch.setitem(ops.transfer_kv.bound, "cpu", ())
    ops.transfer_kv(host, pool, slot, slot)
    torch.ops.wave64.transfer_kv(host, pool, slot, slot + 1)
    assert pool.sum() == 8


GOOD = dict(src=torch.zeros(3, 2, 8), dst=torch.zeros(4, 2, 8), src_slots=torch.zeros(2, dtype=torch.int64),
            dst_slots=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("src", torch.tensor(1.0), "[num_slots, ...]"), ("src", torch.zeros(3, 2, 16)[..., ::2], "each slot contiguous"),
    ("src", torch.zeros(3, 8, 2).transpose(1, 2), "each slot contiguous"),
    ("dst", torch.zeros(4, 2, 9), "float32 [num_slots, 2, 8]"), ("dst", torch.zeros(4, 16), "rows as in src"),
    ("dst", torch.zeros(4, 2, 8).half(), "float32 [num_slots, 2, 8]"),
    ("dst", torch.zeros(4, 2, 16)[..., ::2], "each contiguous"),
    ("dst", torch.tensor(1.0), "float32 [num_slots, 2, 8]"),
    ("src_slots", torch.zeros(2, dtype=torch.int32), "int64 [2]"),
    ("src_slots", torch.zeros(1, 2, dtype=torch.int64), "int64 [2]"),
    ("src_slots", torch.zeros(4, dtype=torch.int64)[::2], "contiguous"),
    ("src_slots", torch.zeros(2, dtype=torch.int64, device="meta"), "on cpu"),
    ("dst_slots", torch.zeros(3, dtype=torch.int64), "int64 [2], one for each pair"),
    ("dst_slots", torch.zeros(2), "int64 [2]"),
    ("dst_slots", torch.zeros(2, dtype=torch.int64, device="meta"), "on cpu")])
def test_refuses_by_name(argument, wrong, words):
    with refused("transfer_kv", argument, words):
        ops.transfer_kv(**GOOD | {argument: wrong})


@pytest.mark.parametrize("elsewhere", ["src", "dst"])
def test_refuses_host_memory_that_is_not_pinned(elsewhere):
    """The meta device stands for a GPU."""
    host = "dst" if elsewhere == "src" else "src"
    with pytest.raises(BadArgument, match=f"^transfer_kv: {host}: expected on meta, .* or in pinned host memory"):
        ops.transfer_kv(**GOOD | {elsewhere: GOOD[elsewhere].to("meta")})
