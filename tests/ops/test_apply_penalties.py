"""`apply_penalties` against a loop over tokens, and against the processor of transformers."""

from collections import Counter

import pytest
import torch
from helpers import BACKENDS, examples, refused
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from wave64 import ops

quick = examples(12)
VOCAB = 50


def padded(rows):
    """Lists of ids as one int64 tensor, -1 where a row is shorter."""
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)


def apply(backend, device, logits, prompts, outputs, presence, frequency, repetition):
    logits = logits.clone().to(device)
    settings = [torch.tensor(x, dtype=torch.float32, device=device) for x in (presence, frequency, repetition)]
    ops.apply_penalties.backends[backend].run(logits, padded(prompts).to(device), padded(outputs).to(device), *settings)
    return logits.cpu()


ids = st.lists(st.integers(0, VOCAB - 1), max_size=30)
row = st.tuples(ids, ids, st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(rows=st.lists(row, min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_equals_a_loop_over_tokens(backend, device, rows, seed):
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    expected = logits.double()
    for line, (prompt, output, presence, frequency, repetition) in zip(expected, rows, strict=True):
        counts = Counter(output)
        for token in {*prompt, *output}:
            line[token] = line[token] / repetition if line[token] > 0 else line[token] * repetition
            if token in counts:
                line[token] -= frequency * counts[token] + presence
    got = apply(backend, device, logits, *map(list, zip(*rows, strict=True)))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    untouched = torch.tensor([[token not in {*prompt, *output} for token in range(VOCAB)]
                              for prompt, output, *_ in rows])
    assert torch.equal(got[untouched], logits[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repetition_equals_transformers(backend, device):
    logits = torch.randn(3, VOCAB) * 5
    seen = torch.randint(VOCAB, (3, 20))
    got = apply(backend, device, logits, seen[:, :12].tolist(), seen[:, 12:].tolist(), [0.0] * 3, [0.0] * 3, [1.3] * 3)
    torch.testing.assert_close(got, RepetitionPenaltyLogitsProcessor(1.3)(seen, logits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_appears_thousands_of_times_is_counted_exactly(backend, device):
    output = [7] * 3000 + [8]
    got = apply(backend, device, torch.zeros(1, VOCAB), [[7, 7, 9]], [output], [0.0], [1.0], [1.0])
    assert got[0, 7:10].tolist() == [-3000.0, -1.0, 0.0]


@pytest.mark.parametrize(("argument", "wrong"), [
    ("logits", torch.zeros(4)), ("prompt_ids", torch.zeros(2, 3, dtype=torch.int32)),
    ("output_ids", torch.zeros(3, 3, dtype=torch.int64)), ("presence_penalty", torch.zeros(3)),
    ("frequency_penalty", torch.zeros(2, dtype=torch.float64)), ("repetition_penalty", torch.zeros(2, 1))])
def test_refuses_by_name(argument, wrong):
    args = {"logits": torch.zeros(2, 10)} | dict.fromkeys(("prompt_ids", "output_ids"), torch.zeros(2, 3).long())
    args |= dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), torch.zeros(2))
    with refused("apply_penalties", argument):
        ops.apply_penalties(**args | {argument: wrong})
