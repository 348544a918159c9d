"""`moe_align_block_size` against a loop over ids."""

import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops
from wave64.testing.contract import poisoned

quick = examples(12)


def align(backend, device, ids, block_size, experts):
    """The three results as lists, of memory that was full of other numbers."""
    with poisoned():
        found = ops.moe_align_block_size.backends[backend].run(ids.to(device), block_size, experts)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in found)
    return [x.tolist() for x in found]


def by_loop(ids, block_size, experts):
    n = len(ids)
    pairs, owners = [], []
    for expert in range(experts):
        run = [i for i, x in enumerate(ids) if x == expert]
        run += [n] * (-len(run) % block_size)
        pairs += run
        owners += [expert] * (len(run) // block_size)
    blocks = -(-(n + min(n, experts) * (block_size - 1)) // block_size)
    total = len(pairs)
    return [pairs + [n] * (blocks * block_size - total), owners + [-1] * (blocks - len(owners)), [total]]


outside = st.sampled_from([-1, -2**31, 2**31 - 1, -7])


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(data=st.data(), tokens=st.integers(0, 40), top_k=st.integers(0, 5), experts=st.integers(1, 40),
       block_size=st.integers(1, 40), used=st.integers(1, 50))
def test_equals_a_loop(backend, device, data, tokens, top_k, experts, block_size, used):
    """Ids of the first `used` experts, which may be more than there are, and some far outside."""
    n = tokens * top_k
    ids = data.draw(st.lists(st.integers(0, used - 1) | outside, min_size=n, max_size=n))
    rows = torch.tensor(ids, dtype=torch.int32).view(tokens, top_k)
    assert align(backend, device, rows, block_size, experts) == by_loop(ids, block_size, experts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "experts", "block_size"), [
    (2047, 3, 16), (2048, 3, 128), (2049, 3, 64), (4999, 2, 64), (32768, 2, 64), (32769, 3, 64), (70001, 1, 128)])
def test_many_ids(backend, device, tokens, experts, block_size):
    """On both sides of one tile, of one launch, and of several parts."""
    ids = torch.randint(-1, experts + 1, (tokens, 1)).to(torch.int32)
    assert align(backend, device, ids, block_size, experts) == by_loop(ids.flatten().tolist(), block_size, experts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_to_one_expert(backend, device):
    """A run of all ids; the odd expert of a pair and the last one, which has no partner."""
    for expert in (1, 2):
        ids = torch.full((40000, 1), expert, dtype=torch.int32)
        pairs, owners, total = align(backend, device, ids, 64, 3)
        assert pairs[:40000] == list(range(40000))
        assert set(pairs[40000:]) == {40000}
        assert owners == [expert] * 625 + [-1] * (len(owners) - 625)
        assert total == [625 * 64]


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("topk_ids", torch.zeros(8, dtype=torch.int32), "int32 [num_tokens, top_k]"),
    ("topk_ids", torch.zeros(4, 2, dtype=torch.int64), "int32 [num_tokens, top_k]"),
    ("topk_ids", torch.zeros(4, 4, dtype=torch.int32)[:, ::2], "contiguous"),
    ("block_size", 0, "at least 1"), ("block_size", 2**31 - 1, "fewer than 2^31"),
    ("num_experts", 0, "1 to 65536"),
    ("num_experts", 2**31 - 1, "1 to 65536")])
def test_refuses_by_name(argument, wrong, words):
    args = dict(topk_ids=torch.zeros(4, 2, dtype=torch.int32), block_size=16, num_experts=8) | {argument: wrong}
    with refused("moe_align_block_size", argument, words):
        ops.moe_align_block_size(**args)
