"""wave64's Llama against transformers' LlamaForCausalLM."""

import pytest
import torch
from helpers_llama import LLAMAS, PagedDriver, load, make_llama
from helpers_parity import PROMPT, Parity


@pytest.fixture(scope="module", params=LLAMAS)
def llama(request, tmp_path_factory, device):
    """(transformers' model, wave64's, its config), loaded from the same folder; one in two in the old spelling."""
    folder = tmp_path_factory.mktemp("llama")
    old_spelling = list(LLAMAS).index(request.param) % 2 == 1
    theirs = make_llama(folder, old_spelling=old_spelling, **LLAMAS[request.param])
    return theirs, *load(folder, device)


@pytest.fixture
def theirs(llama):
    return llama[0]


@pytest.fixture
def driver(llama, device):
    return PagedDriver(*llama[1:], device=device)


class TestLlama(Parity):
    """The dynamic model runs far beyond its trained context."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_no_less_exact_than_transformers(tmp_path, device, dtype):
    theirs = make_llama(tmp_path, **LLAMAS["llama3-gqa4-tied"])
    ours, config = load(tmp_path, device, dtype)
    with torch.inference_mode():
        exact = theirs(torch.tensor([PROMPT])).logits[0]
        narrow = theirs.to(dtype)(torch.tensor([PROMPT])).logits[0].float()
    error = (PagedDriver(ours, config, device).step({}, {"a": PROMPT}) - exact).square().mean().sqrt()
    assert error <= 1.5 * (narrow - exact).square().mean().sqrt()
    assert error > 0, "the model ran in fp32"
