"""Collectives of HIP on numbers, sizes, alignments and worlds that nobody chose: each rank has the sum in the order of
the ranks, bit by bit, and that is the sum in fp64 but for its rounding."""

import pytest
from collectives import (
    DTYPES,
    LL,
    LL128,
    ONE_SHOT,
    TWO_SHOT,
    AllGather,
    AllReduce,
    FusedNorm,
    ReduceScatter,
    one_by_one,
)
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = [*((AllReduce, protocol) for protocol in (LL, LL128, ONE_SHOT, TWO_SHOT)), (AllGather, LL),
         (ReduceScatter, LL), *((FusedNorm, protocol) for protocol in (LL, LL128, ONE_SHOT))]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """What the emulator imports first raises Python's limit of recursion, which hypothesis takes for a test's doing."""
    one_by_one(AllReduce.drawn(2, 1, DTYPES[0], LL, 0), "gfx942", shots=1)


@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(KINDS), world=st.integers(2, 8), count=st.integers(1, 300), dtype=st.sampled_from(DTYPES),
       offset=st.integers(0, 7), seed=st.integers(0, 2**31 - 1))
def test_any_call_gives_the_sum(kind, world, count, dtype, offset, seed):
    """offset: elements from a multiple of 16 bytes on to where tensors begin."""
    op, protocol = kind
    call = op.drawn(world, count, dtype, protocol, seed, offset)
    one_by_one(call, "gfx942", shots=2 if (op, protocol) == (AllReduce, TWO_SHOT) else 1, checks=())
    call.verify()
