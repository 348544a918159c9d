"""`apply_token_bitmask` against NumPy's own idea of bits in words, and xgrammar's function where it is there."""

import math

import numpy as np
import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from wave64 import ops

quick = examples(12)


def apply(backend, device, logits, bitmask):
    logits = logits.clone().to(device)
    ops.apply_token_bitmask.backends[backend].run(logits, bitmask.to(device))
    return logits.cpu()


def mask_of(allowed, vocab):
    """int32 words of which the bits of the tokens in `allowed` are 1."""
    words = [0] * math.ceil(vocab / 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return torch.tensor(np.array([words], dtype=np.uint32).view(np.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(rows=st.integers(1, 3), vocab=st.integers(1, 200), seed=st.integers(0, 2**31), data=st.data())
def test_equals_numpy_on_any_words(backend, device, rows, vocab, seed, data):
    """Words are drawn whole: 0, -1 and those with the sign bit come up, and bits behind the vocabulary are set."""
    words = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=math.ceil(vocab / 32), max_size=math.ceil(vocab / 32))
    bitmask = np.array([data.draw(words) for _ in range(rows)], dtype=np.int32)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    allowed = np.unpackbits(bitmask.view(np.uint8), axis=1, count=vocab, bitorder="little").astype(bool)
    got = apply(backend, device, logits, torch.from_numpy(bitmask))
    assert np.array_equal(got.numpy(), np.where(allowed, logits.numpy(), -np.inf))


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(vocab=st.integers(1, 5000), data=st.data())
def test_keeps_exactly_the_allowed_tokens(backend, device, vocab, data):
    allowed = data.draw(st.sets(st.integers(0, vocab - 1), max_size=20))
    got = apply(backend, device, torch.zeros(1, vocab), mask_of(allowed, vocab))
    assert set(got[0].isfinite().nonzero()[:, 0].tolist()) == allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_xgrammar(backend, device, dtype):
    xgrammar = pytest.importorskip("xgrammar")
    logits = torch.randn(3, 1000).to(dtype)
    bitmask = torch.randint(-(2**31), 2**31, (3, 32), dtype=torch.int64).to(torch.int32)
    expected = logits.clone()
    xgrammar.apply_token_bitmask_inplace(expected, bitmask, backend="cpu")
    assert torch.equal(apply(backend, device, logits, bitmask), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_allowed_logit_keeps_its_bits(backend, device):
    logits = torch.tensor([[math.nan, math.inf, -math.inf, -0.0, math.nan, 1e-40]])
    got = apply(backend, device, logits, mask_of({0, 1, 2, 3, 5}, 6))
    kept = [0, 1, 2, 3, 5]
    assert torch.equal(got[:, kept].view(torch.int32), logits[:, kept].view(torch.int32))
    assert got[0, 4] == -math.inf


@pytest.mark.parametrize(("argument", "wrong"), [
    ("logits", torch.zeros(4)), ("logits", torch.zeros(4, 100).T), ("bitmask", torch.zeros(2, 4).long()),
    ("bitmask", torch.zeros(2, 3, dtype=torch.int32)), ("bitmask", torch.zeros(1, 4, dtype=torch.int32)),
    ("bitmask", torch.zeros(4, 2, dtype=torch.int32).T)])
def test_refuses_by_name(argument, wrong):
    args = {"logits": torch.zeros(2, 100), "bitmask": torch.zeros(2, 4, dtype=torch.int32)} | {argument: wrong}
    with refused("apply_token_bitmask", argument):
        ops.apply_token_bitmask(**args)
