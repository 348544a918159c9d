"""Matrix products on a CPU: whatever way is chosen, the numbers are F.linear's and the memory is one copy."""

import pytest
import torch
from helpers_llama import load, make_llama
from torch.nn import functional as F

from wave64.serve.model import cpu, linear
from wave64.serve.model.cpu import _filled, products_by
from wave64.serve.model.layers import Embedding
from wave64.serve.model.linear import Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Tied(torch.nn.Module):
    """The ends of a model with tied embeddings, and a layer between."""

    def __init__(self):
        super().__init__()
        self.embed = Embedding(29, 24)
        self.middle = Linear(24, 24, bias=True)
        self.head = Linear(24, 29, tied=self.embed.weight)
        for weight in self.parameters():
            weight.data.normal_()


def finish(model):
    for layer in (model.middle, model.head):
        layer.finish()


@pytest.fixture(params=DTYPES, ids=str)
def model(request):
    said = products_by(request.param)
    if said != "products by oneDNN":
        pytest.skip(said)
    return Tied().to(request.param)


@pytest.mark.parametrize("amd", [False, True])
def test_products_are_those_of_linear(model, amd, monkeypatch):
    monkeypatch.setattr(cpu, "_is_amd", lambda: amd)
    weight, bias = model.middle.weight.clone(), model.middle.bias.clone()
    finish(model)
    for tokens in (0, 1, 3, 4, 9, 17, 65, 300):
        x = torch.randn(tokens, 24).to(weight.dtype)
        with torch.inference_mode():
            got = model.middle(x)
        torch.testing.assert_close(got, F.linear(x, weight, bias))
        torch.testing.assert_close(model.head(x), F.linear(x, model.embed.weight))


def test_few_numbers_of_tokens_are_compiled_for():
    """Each leaves machine code behind for good (serve/model/cpu.py), so lengths of all kinds must not give as many."""
    filled = [_filled(tokens) for tokens in range(513)]
    assert filled[:33] == list(range(33))
    assert all(tokens <= more <= tokens * 17 / 16 + 1 for tokens, more in enumerate(filled))
    assert len(set(filled)) == 33 + 4 * 16


def test_layout_replaces_the_weight(model):
    before = sum(weight.nbytes for weight in model.parameters())
    values = model.middle.weight.clone()
    finish(model)
    assert sum(weight.nbytes for weight in model.parameters()) == before
    layout = model.middle.weight
    assert layout.is_mkldnn == (layout.dtype != torch.float32)
    assert torch.equal(layout.to_dense() if layout.is_mkldnn else layout, values)


def test_rows_that_are_looked_up_stay_plain(model):
    finish(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed(torch.tensor([5]))[0], model.head.weight[5])


def test_without_onednn_products_stay_and_the_reason_is_given(model, monkeypatch):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert products_by(model.middle.weight.dtype) == "products by torch, not oneDNN: this torch was built without it"
    finish(model)
    assert not model.middle.weight.is_mkldnn
    assert model.middle.product is F.linear


@pytest.mark.parametrize(("dtype", "probe"), [(torch.bfloat16, "_is_mkldnn_bf16_supported"),
                                              (torch.float16, "_is_mkldnn_fp16_supported")])
def test_a_cpu_without_the_instructions_is_told_of(dtype, probe, monkeypatch, caplog, tmp_path):
    """In one line as a model is loaded, and not where there is nothing to gain."""
    make_llama(tmp_path)
    for supported, lines in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.ops.mkldnn, probe, lambda supported=supported: supported)
        assert cpu.slow_dtype(torch.float32) is None
        monkeypatch.setattr(linear, "choose_product", lambda weight, plain: (F.linear, weight))
        caplog.clear()
        with caplog.at_level("INFO", logger="wave64"):
            load(tmp_path, "cpu", dtype)
        said = [record.getMessage() for record in caplog.records if "--dtype float32" in record.getMessage()]
        assert len(said) == lines
        assert all(str(dtype).removeprefix("torch.") in line for line in said)
