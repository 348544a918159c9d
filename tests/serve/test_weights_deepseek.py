"""DeepSeek checkpoints as they are found: with layers that are not used, without scales, in a form they do not name."""

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers_deepseek import LatentDriver, make_deepseek, quantize
from helpers_llama import edit_json, load
from safetensors.torch import load_file, save_file

from wave64 import platform, quant
from wave64.serve.model import load as weights
from wave64.serve.model.checkpoint import BUFFER_BYTES, WeightsError
from wave64.serve.model.config import ModelConfig, QuantConfig
from wave64.serve.model.deepseek.model import MixtureOfExperts
from wave64.serve.model.quantized import Experts, Fp8Linear

FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[16, 32])


#: prints by how much the peak of this process's memory rose during a load, and what the model's weights take, in bytes;
#: of one of four ranks, if it says so, and of the whole
MEMORY_OF_A_LOAD = """
import sys
from pathlib import Path

import torch

from wave64.serve.args import ServerArgs
from wave64.serve.engine.ranks import ranks_of
from wave64.serve.model.config import ModelConfig, QuantConfig
from wave64.serve.model.load import load_model

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

config = ModelConfig.from_folder(sys.argv[1])
load_model(config, sys.argv[1], torch.bfloat16, "cpu")  # brings in what the first load of a process does
for size in (4, 1) if sys.argv[2] == "ranks" else (1,):
    ranks = ranks_of(ServerArgs(tp_size=size, ep_size=min(size, 2)), size - 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    model = load_model(config, sys.argv[1], torch.bfloat16, "cpu", ranks=ranks)
    print(resident("VmHWM") - before, sum(weight.nbytes for weight in model.parameters()))
    del model
"""


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


def test_an_expert_that_is_missing(folder, device, monkeypatch):
    """It is said before the model takes memory: what is built by then is on no device."""
    built, build = [], weights._build
    monkeypatch.setattr(weights, "_build", lambda *args: (built.append(args[2]), build(*args))[1])
    edit(folder, lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    with pytest.raises(WeightsError, match=r"experts\.5\.up_proj\.weight: expected by the model, not in any"):
        load(folder, device)
    assert built == ["meta"]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_loading_takes_the_model_and_next_to_nothing_beside(tmp_path, fp8):
    """In a process of its own. The buffers are of the reading, and of what a converting load keeps of one tensor."""
    config = dict(hidden_size=512, moe_intermediate_size=256, n_routed_experts=64, num_experts_per_tok=4)
    make_deepseek(tmp_path, 3, **config).to(torch.bfloat16).save_pretrained(tmp_path)
    if fp8:
        quantize(tmp_path, (128, 128))
        edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config=FP8 | dict(
            weight_block_size=[128, 128])))
    command = [sys.executable, "-c", MEMORY_OF_A_LOAD, tmp_path, "one" if fp8 else "ranks"]
    freed_is_gone = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **freed_is_gone})
    assert found.returncode == 0, found.stderr
    *part, (peak, size) = (map(int, line.split()) for line in found.stdout.splitlines())
    for its_peak, its_size in part:
        assert size / 4 <= its_size < size / 3
        assert its_peak <= 1.1 * its_size + 2 * BUFFER_BYTES < size, "a rank reads its part and no more"
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 5e7
    assert peak <= 1.1 * stored + 2 * BUFFER_BYTES


@pytest.mark.parametrize("block", [(16, 32), (128, 128)], ids=["blocks", "cut-blocks"])
@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)])
def test_fp8_is_multiplied_as_it_was_stored(folder, arch, dtype, block):
    """Numbers times scales are the checkpoint's whatever the architecture's FP8, of linear layers and experts."""
    exact = quantize(folder, block)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=FP8 | dict(weight_block_size=list(block))))
    with platform.target(arch):
        model, _ = load(folder, "cpu")
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            parts = [exact[f"{name.rpartition('.')[0]}.{part}.weight"] for part in module.parts]
            pairs = [(module.weight, module.weight_scale, torch.cat(parts))]
        elif isinstance(module, Experts):
            of = [f"{name.rpartition('.')[0]}.{expert}" for expert in module.names]
            pairs = [(module.w13, module.w13_scale, torch.stack([
                torch.cat([exact[f"{e}.gate_proj.weight"], exact[f"{e}.up_proj.weight"]]) for e in of])),
                (module.w2, module.w2_scale, torch.stack([exact[f"{e}.down_proj.weight"] for e in of]))]
        else:
            continue
        for weight, scale, want in pairs:
            assert weight.dtype == dtype
            got = quant.dequantize(weight, scale, module.scales.block_shape)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
            seen += 1
    assert seen > 8


@pytest.mark.parametrize(("arch", "stride"), [("gfx942", 768), ("gfx950", 512)])
def test_fp8_rows_have_the_stride_that_the_architecture_reads_fastest(arch, stride):
    """512 bytes apart they would meet in few of an MI300X's memory channels; values and shape are the same."""
    layer = Fp8Linear(512, {"a": 16, "b": 8}, QuantConfig((8, 128)))
    layer.weight.data.copy_(torch.randn(24, 512))
    stored = layer.weight.data.float()
    with platform.target(arch):
        layer.finish()
    assert (layer.weight.shape, layer.weight.stride()) == ((24, 512), (stride, 1))
    assert torch.equal(layer.weight.float() * (2 if arch == "gfx942" else 1), stored)


def test_fp8_without_its_scales(folder, device):
    quantize(folder, (16, 32))
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=FP8))
    edit(folder, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight_scale_inv"))
    with pytest.raises(WeightsError, match=r"o_proj\.weight_scale_inv: expected by the model, not in any"):
        load(folder, device)


def test_fp8_that_config_json_does_not_announce(folder, device):
    quantize(folder, (16, 32))
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


def test_a_mixture_is_in_the_layers_that_first_dense_and_frequency_say(tmp_path):
    """By DeepSeek's own rule; transformers' V3 knows no frequency, so a checkpoint of one is not to be had there."""
    make_deepseek(tmp_path, 3, num_hidden_layers=7, first_k_dense_replace=3)
    edit_json(tmp_path / "config.json", lambda c: c.update(moe_layer_freq=2))
    model: Any = weights._build(ModelConfig.from_folder(tmp_path), torch.bfloat16, "meta")
    sparse = [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MixtureOfExperts)]
    assert sparse == [4, 6]


def test_latents_in_fp8_have_the_scale_that_is_stored(tmp_path):
    """Latents, and keys with position, 2^10 times as large, which e4m3 does not hold, and what reads them as much
    smaller: with scales as much larger, in prefill, behind a prefix and in decode, no bit changes."""
    logits, power = [], 2.0**10
    for number, factor in enumerate((1.0, power)):
        folder = tmp_path / str(number)
        make_deepseek(folder, 3)
        quantize(folder, (8, 32))
        edit_json(folder / "config.json", lambda c: c.update(quantization_config=FP8 | dict(
            weight_block_size=[8, 32], kv_cache_scheme="static")))
        weights = load_file(folder / "model.safetensors")
        for layer in (f"model.layers.{layer}.self_attn." for layer in range(3)):
            weights[f"{layer}kv_a_layernorm.weight"] *= factor
            weights[f"{layer}kv_b_proj.weight_scale_inv"] /= factor
            weights[f"{layer}kv_a_proj_with_mqa.weight_scale_inv"][4:] *= factor  # rows from 32 on, of k_pe
            weights[f"{layer}q_b_proj.weight_scale_inv"][2::3] /= factor  # of each head 16 rows of q_nope, 8 of q_pe
            weights |= {f"{layer}k_scale": torch.tensor(factor), f"{layer}v_scale": torch.tensor(factor / 4)}
        save_file(weights, folder / "model.safetensors")
        model, config = load(folder, "cpu", torch.float32)
        driver = LatentDriver(model, config, "cpu")
        driver.kv_cache = driver.pool(config, 128, 4, torch.float8_e4m3fn, "cpu")
        steps = driver.step({}, {"a": [5, 9, 2, 44]}), driver.step({}, {"a": [7, 8, 3]}), driver.step({"a": 6}, {})
        logits.append(torch.cat(steps))
    assert logits[0].isfinite().all()
    assert torch.equal(*logits)
    with platform.target("gfx942"):
        on_fnuz: Any = load(folder, "cpu", torch.float32)[0]
    assert on_fnuz.model.layers[2].self_attn.cache_scales.k_scale == 2 * power
