"""DeepSeek checkpoints as they are found: with layers nobody uses, without scales, in another form than they say."""

import logging

import pytest
import torch
from helpers_deepseek import make_deepseek, quantise
from helpers_llama import edit_json, load
from safetensors.torch import load_file, save_file

from wave64.serve.checkpoint import WeightsError

FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[16, 32])


@pytest.fixture
def folder(tmp_path):
    make_deepseek(tmp_path, 3, num_nextn_predict_layers=1)
    return tmp_path


def edit(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_layers_for_speculation_are_left_out_in_words(folder, device, caplog):
    edit(folder, lambda t: t.update({f"model.layers.3.{name}": torch.ones(2, 2)
                                     for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}))
    with caplog.at_level(logging.INFO):
        load(folder, device)
    said = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert len(said) == 1
    assert "2 weights of model.layers.3." in said[0]


def test_a_layer_behind_those_is_refused(folder, device):
    edit(folder, lambda t: t.update({"model.layers.4.eh_proj.weight": torch.ones(2, 2)}))
    with pytest.raises(WeightsError, match=r"model\.layers\.4\.eh_proj\.weight: unexpected"):
        load(folder, device)


def test_an_expert_that_is_missing(folder, device):
    edit(folder, lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    with pytest.raises(WeightsError, match=r"experts\.5\.up_proj\.weight: expected by the model, not in any"):
        load(folder, device)


def test_fp8_without_its_scales(folder, device):
    quantise(folder, (16, 32))
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=FP8))
    edit(folder, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight_scale_inv"))
    with pytest.raises(WeightsError, match=r"o_proj\.weight_scale_inv: expected by the model, not in any"):
        load(folder, device)


def test_fp8_that_config_json_does_not_announce(folder, device):
    quantise(folder, (16, 32))
    with pytest.raises(WeightsError, match="unexpected"):
        load(folder, device)
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale_inv")])
    with pytest.raises(WeightsError, match="got F8_E4M3; config.json has no quantization_config that says so"):
        load(folder, device)


def test_weights_that_are_not_fp8_though_config_json_says_so(folder, device):
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=FP8))
    def scale(weight):
        return torch.ones(-(-weight.shape[0] // 16), -(-weight.shape[1] // 32))

    edit(folder, lambda t: t.update({f"{name}_scale_inv": scale(t[name]) for name in list(t) if "proj" in name}))
    with pytest.raises(WeightsError, match="expected dtype F8_E4M3, got F32"):
        load(folder, device)
