"""wave64's Llama against transformers' LlamaForCausalLM."""

import pytest
import torch
from helpers_llama import LLAMAS, load, make_llama
from helpers_parity import Parity, assert_no_less_exact


@pytest.fixture(scope="module", params=LLAMAS)
def models(request, tmp_path_factory, device):
    """(transformers' model, wave64's, its config), loaded from the same folder; one in two in the old spelling."""
    folder = tmp_path_factory.mktemp("llama")
    old_spelling = list(LLAMAS).index(request.param) % 2 == 1
    theirs = make_llama(folder, old_spelling=old_spelling, **LLAMAS[request.param])
    return theirs, *load(folder, device)


class TestLlama(Parity):
    """The dynamic model runs far beyond its trained context."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_no_less_exact_than_transformers(tmp_path, device, dtype):
    theirs = make_llama(tmp_path, **LLAMAS["llama3-gqa4-tied"])
    assert_no_less_exact(theirs, tmp_path, device, dtype)
