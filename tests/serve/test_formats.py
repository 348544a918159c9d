"""FP8 checkpoints as tools write them: tests/serve/quantized holds small ones, made by tools/quantize_demos.py, each
with the logits of the tool's own quantized model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_llama import PagedDriver, edit_json
from helpers_llama import load as load_with_config
from safetensors.torch import load_file, save_file

from wave64 import platform, quant
from wave64.distributed import Group
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN
from wave64.serve.model.checkpoint import WeightsError
from wave64.serve.model.config import ConfigError, ModelConfig
from wave64.serve.model.formats import FORMATS, schemes_of, table
from wave64.serve.model.linear import Quantized
from wave64.serve.model.load import load_model, refuse_unless_split
from wave64.serve.model.parallel import Ranks
from wave64.serve.model.schemes import ONLINE, Scheme, Schemes, matches

MADE = Path(__file__).with_name("quantized")
ROOT = MADE.parents[2]
#: checkpoint -> the row of the table that it is of, and weights and activations of its layers
CHECKPOINTS = {
    "deepseek-blocks": (0, {("block", "group")}), "deepseek-ue8m0": (0, {("block", "group")}),
    "quark-fp8-kv": (1, {("tensor", "static")}), "quark-fp8-dynamic": (1, {("tensor", "token")}),
    "quark-tensor": (2, {("tensor", "static")}), "quark-channel": (2, {("channel", "token")}),
    "demo-quark-kv": (2, {("tensor", "static")}), "compressed-tensor": (3, {("tensor", "static")}),
    "compressed-channel": (3, {("channel", "token"), ("tensor", "static")}),
    "compressed-block": (3, {("block", "group")}), "compressed-heads": (3, {("channel", "token")}),
    "fbgemm": (4, {("channel", "token")}),
    "modelopt-kv": (5, {("tensor", "static")}), "modelopt-channel": (5, {("channel", "token")}),
}  # fmt: skip
#: In fp32 a tool's sums and these differ by some 1e-6 of an activation, and its neighbors in FP8 are 2^-4 apart: of ten
#: thousand activations less than one is rounded the other way, which changes one row of 24 by a part of what all of the
#: rounding changes. A scale that is wrong by a rounding of 2^-4 changes every row by as much.
TOLERANCE = 0.05
#: Of static scales those that none of the tokens exceeds: e4m3fnuz saturates at 480 of what e4m3fn does at 448.
STATIC = ["quark-fp8-kv", "quark-tensor", "demo-quark-kv", "modelopt-kv"]
Q = "model.layers.0.self_attn.q_proj"
#: The tools that round keys and values where they are cached, behind RoPE.
ROUND_THE_CACHE = ["modelopt-kv", "compressed-tensor", "compressed-heads"]


class Fp8Driver(PagedDriver):
    """With keys and values in FP8."""

    def pool(self, config, num_pages, page_size, dtype, device):
        return super().pool(config, num_pages, page_size, quant.fp8_dtype(), device)


def load(folder: Path) -> Any:
    """The model, in fp32 on the CPU."""
    return load_with_config(folder, "cpu", torch.float32)[0]


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def error(name: str, driver=PagedDriver) -> float:
    """How far our logits are from the tool's, as a fraction of how far those are from the plain model's."""
    model, config = load(MADE / name), ModelConfig.from_folder(MADE / name)
    expected = load_file(MADE / name / "expected.safetensors")
    got = driver(model, config, "cpu").step({}, {"a": expected["ids"].tolist()})
    return rms(got - expected["logits"]) / rms(expected["logits"] - expected["unquantized"])


@pytest.fixture
def copy(tmp_path):
    """A copy of quark-fp8-kv, whose weights a test may change."""
    return Path(shutil.copytree(MADE / "quark-fp8-kv", tmp_path / "copy"))


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_each_row_of_the_table_has_a_checkpoint():
    assert {row for row, _ in CHECKPOINTS.values()} == set(range(len(FORMATS)))
    assert sorted(CHECKPOINTS) == sorted(folder.name for folder in MADE.iterdir())
    assert sum(file.stat().st_size for file in MADE.rglob("*")) < 2_000_000
    for name, (row, kinds) in CHECKPOINTS.items():
        config = ModelConfig.from_folder(MADE / name)
        schemes = config.schemes
        assert schemes is not None
        assert (schemes.method, config.passed_by) == (FORMATS[row].method, ())
        found = {s for layer in range(config.num_layers) for s in map(config.layer(layer).scheme, (
            "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))}
        assert {(s.weight, s.activations) for s in found if s} == kinds
        assert config.scheme("lm_head") is None
        assert bool(schemes.kv_scales) == (name.endswith("kv") or name in ROUND_THE_CACHE)


def test_the_table_is_in_the_documentation():
    assert table() in (ROOT / "docs" / "fp8.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in ROUND_THE_CACHE])
def test_logits_are_those_of_the_tool_that_made_it(name):
    assert error(name) < TOLERANCE


@pytest.mark.parametrize("name", ROUND_THE_CACHE)
def test_keys_and_values_in_fp8_as_the_tool_rounds_them(name):
    """One that is rounded the other way is seen by all later tokens, not by its own alone."""
    assert error(name, Fp8Driver) < 2 * TOLERANCE
    assert error(name) > 4 * TOLERANCE


@pytest.mark.parametrize("name", STATIC)
def test_on_an_architecture_whose_fp8_means_half_the_number(name):
    """With stored scales twice as large, e4m3fnuz has the numbers of e4m3fn: nothing is rounded in another way."""
    with platform.target("gfx942"):
        model = load(MADE / name)
        assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fnuz
        assert error(name, Fp8Driver if name == "modelopt-kv" else PagedDriver) < TOLERANCE


def test_the_newer_file_of_modelopt_says_what_config_json_says(tmp_path):
    folder = Path(shutil.copytree(MADE / "modelopt-kv", tmp_path / "copy"))
    expected = ModelConfig.from_folder(folder).schemes
    edit_json(folder / "config.json", lambda c: c.pop("quantization_config"))
    assert ModelConfig.from_folder(folder).schemes == expected
    edit_json(folder / "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="NVFP4"))
    with pytest.raises(ConfigError, match=r"hf_quant_config.json: quantization.quant_algo: expected one of FP8, "
                                          r'FP8_PER_CHANNEL_PER_TOKEN, got "NVFP4"; use the float16'):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("name", ["quark-fp8-kv", "quark-channel", "compressed-block"])
def test_each_of_two_ranks_holds_its_part(name):
    whole = load(MADE / name)
    config = ModelConfig.from_folder(MADE / name)
    parts: list[Any] = []
    for rank in range(2):
        group = Group("", rank, 2)
        held: Any = load_model(config, MADE / name, torch.float32, "cpu", ranks=Ranks(group, group))
        parts.append(held.model.layers[0])
    whole = whole.model.layers[0]

    def bits(layer, path: str) -> torch.Tensor:
        weight = layer.get_parameter(path)
        return weight.view(torch.uint8) if weight.dtype in quant.FP8.values() else weight

    for path, dim in (("self_attn.o_proj.weight", 1), ("mlp.down_proj.weight", 1)):
        assert torch.equal(torch.cat([bits(part, path) for part in parts], dim), bits(whole, path))
    for path in ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"):
        widths = [part.get_submodule(path.rpartition(".")[0]).widths for part in parts]
        pieces = zip(*(bits(part, path).split(w) for part, w in zip(parts, widths, strict=True)), strict=True)
        assert torch.equal(torch.cat([half for piece in pieces for half in piece]), bits(whole, path))
    if name != "compressed-block":
        for path in ("self_attn.o_proj.weight_scale", "mlp.down_proj.weight_scale"):
            assert all(torch.equal(bits(part, path), bits(whole, path)) for part in parts)
    if name == "quark-fp8-kv":
        for path in ("self_attn.cache_scales.k_scale", "self_attn.o_proj.input_scale"):
            assert all(torch.equal(bits(part, path), bits(whole, path)) for part in parts)


def test_ranks_that_would_cut_a_block_are_refused():
    config, group = ModelConfig.from_folder(MADE / "compressed-block"), Group("", 0, 4)
    with pytest.raises(ConfigError, match="columns of o_proj in blocks of 32, 64, can be split over 1, 2 ranks, got 4"):
        refuse_unless_split(config, Ranks(group, group))


@pytest.mark.parametrize(("name", "groups"), [("quark-channel", PER_TOKEN), ("compressed-block", 32),
                                              ("deepseek-ue8m0", 0), ("quark-tensor", 0), ("fbgemm", 0)])
def test_the_norm_is_made_in_fp8_where_a_product_takes_it_so(name, groups, monkeypatch):
    layer, seen = load(MADE / name).model.layers[0], []
    assert (layer.input_layernorm.group_size, layer.post_attention_layernorm.group_size) == (groups, groups)
    monkeypatch.setattr(type(layer.mlp), "forward", lambda self, x: seen.append(x) or torch.zeros(3, 64))
    layer.mlp(layer.post_attention_layernorm.of_sum(torch.randn(3, 64), torch.randn(3, 64), Ranks()))
    assert isinstance(seen[0], Quantized) == bool(groups)


@pytest.mark.parametrize(("name", "is_quantized"), [
    ("quark-channel", True), ("compressed-block", True), ("deepseek-ue8m0", True), ("quark-tensor", False),
    ("fbgemm", False)])
def test_the_activation_is_made_in_fp8_where_a_product_takes_it_so(name, is_quantized):
    """In one launch, and what the second product says of it is what it says of the activation alone."""
    mlp, x = load(MADE / name).model.layers[0].mlp, torch.randn(3, 2 * 96)
    made, alone = mlp.activation_and_mul(x), torch.nn.functional.silu(x[:, :96]) * x[:, 96:]
    assert isinstance(made, Quantized) == is_quantized
    torch.testing.assert_close(mlp.down_proj(made), mlp.down_proj(alone), rtol=1e-3, atol=1e-3)


def test_merged_projections_keep_each_its_scale():
    weights = load_file(MADE / "quark-tensor" / "model.safetensors")
    layer = load(MADE / "quark-tensor").model.layers[0].self_attn.qkv_proj
    scales = [weights[f"model.layers.0.self_attn.{part}_proj.weight_scale"] for part in "qkv"]
    assert len(set(scales)) == 3
    expected = torch.cat([scale.expand(width) for scale, width in zip(scales, (64, 32, 32), strict=True)])
    assert torch.equal(layer.weight_scale, expected)


def test_of_input_scales_the_largest_counts(copy):
    names = [f"model.layers.0.self_attn.{part}_proj.input_scale" for part in "qkv"]
    change(copy, lambda w: w.update(zip(names, map(torch.tensor, (0.25, 0.5, 0.125)), strict=True)))
    assert load(copy).model.layers[0].self_attn.qkv_proj.input_scale == 0.5


def test_projections_of_one_input_may_be_stored_in_different_ways(copy):
    """q in FP8, k plain, v not a scale for each input but each token: three products side by side."""
    def plain(weights):
        weight, scale = (weights.pop(f"{Q}.{part}".replace("q_", "k_")) for part in ("weight", "weight_scale"))
        weights.pop(f"{Q}.input_scale".replace("q_", "k_"))
        weights[f"{Q}.weight".replace("q_", "k_")] = weight.float() * scale

    change(copy, plain)
    edit_json(copy / "config.json", lambda c: c["quantization_config"]["ignored_layers"].append("*.k_proj"))
    mixed, whole = (load(folder).model.layers[0].self_attn.qkv_proj
                    for folder in (copy, MADE / "quark-fp8-kv"))
    x = torch.randn(5, 64)
    assert mixed.widths == whole.widths
    got, expected = (layer(x).split(layer.widths, 1) for layer in (mixed, whole))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    assert 0 < rms(got[1] - expected[1]) < 0.1 * rms(expected[1])


@pytest.mark.parametrize(("name", "value", "words"), [
    (f"{Q}.weight_scale", torch.tensor(0.0), "expected positive finite scales, got 0 at 0 of 1"),
    (f"{Q}.input_scale", torch.tensor(float("nan")), "expected positive finite scales, got nan at 0 of 1"),
    ("model.layers.0.self_attn.k_scale", torch.tensor(-1.0), "expected positive finite scales, got -1 at 0 of 1"),
    (f"{Q}.weight_scale", torch.ones(64), r"expected shape \[1\], got \[64\]"),
    (f"{Q}.weight_scale", torch.tensor(float("inf")), "expected positive finite scales, got inf at 0 of 1"),
    (f"{Q}.weight_scale", torch.tensor([1]), "expected dtype F64, F32, .*, got I64"),
    (f"{Q}.weight_scale", None, "expected by the model, not in any of its safetensors files"),
    ("model.layers.0.self_attn.v_scale", None, "expected by the model, not in any of its safetensors files"),
    (f"{Q}.weight", torch.ones(64, 64), "expected dtype F8_E4M3, got F32; config.json's quantization_config says FP8"),
    (f"{Q}.output_scale", torch.tensor(1.0), "leaves this layer plain or has other scales for it; expected no such"),
    (f"{Q}.weight_scale_2", torch.tensor(1.0), "leaves this layer plain or has other scales for it; expected no such"),
    (f"{Q}.output", torch.tensor(1.0), "unexpected, the model config.json describes has no such weight")])
def test_a_damaged_scale_is_refused_before_memory_is_taken(copy, monkeypatch, name, value, words):
    change(copy, lambda w: w.pop(name) if value is None else w.update({name: value}))
    taken = []
    monkeypatch.setattr("wave64.serve.model.load.fill_from", lambda *_: taken.append(1))
    with pytest.raises(WeightsError) as refused:
        load(copy)
    assert re.search(words, str(refused.value))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not taken


def test_a_damaged_scale_of_a_block_is_refused_when_it_is_read(tmp_path):
    folder, name = Path(shutil.copytree(MADE / "deepseek-blocks", tmp_path / "copy")), f"{Q}.weight_scale_inv"
    change(folder, lambda w: w.update({name: w[name].fill_(float("inf"))}))
    with pytest.raises(WeightsError, match=f"{name}: expected positive finite scales, got inf at 0 of 4"):
        load(folder)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_a_weight_that_is_no_number_is_refused_when_it_is_read(copy, arch, bits):
    change(copy, lambda w: w[f"{Q}.weight"].view(torch.uint8)[3, 5:7].fill_(bits))
    with platform.target(arch), pytest.raises(WeightsError, match=f"{Q}.weight: expected numbers, got 2 NaN"):
        load(copy)


def in_quantization(**keys):
    return lambda config: config["quantization_config"].update(keys)


@pytest.mark.parametrize(("name", "edit", "words"), [
    ("compressed-tensor", in_quantization(ignore=["lm_head", "re:.*layers.1.self_atn.o_proj"]),
     r"layers.1.self_attn.o_proj.weight: expected F8_E4M3 with .*o_proj.weight_scale, as config.json's "
     r"quantization_config says, got F32; name model.layers.1.self_attn.o_proj there under ignore, .* plain; what is "
     r"there and matches no layer: re:.\*layers.1.self_atn.o_proj$"),
    ("compressed-tensor", in_quantization(ignore=["re:.*layers.1.self_attn.o_proj"]), "name lm_head there .* plain$"),
    ("quark-fp8-kv", in_quantization(ignored_layers=["lm_head", "q_proj"]),
     "q_proj.input_scale, .*q_proj.weight_scale: unexpected, config.json's quantization_config leaves this layer "),
    ("quark-fp8-kv", in_quantization(activation_scheme="dynamic"), "4 more: unexpected, config.json's"),
    ("quark-fp8-dynamic", in_quantization(activation_scheme="static"), "q_proj.input_scale, .* expected by the model"),
    *[("quark-fp8-kv", lambda c, value=value: c.update(quantization_config=value),
       "unexpected, config.json has no quantization_config that says what these scales are") for value in (None, {})],
    ("quark-tensor", in_quantization(global_quant_config=None), "quantization_config leaves this layer plain")])
def test_a_file_that_does_not_store_what_the_configuration_says(tmp_path, name, edit, words):
    folder = Path(shutil.copytree(MADE / name, tmp_path / "copy"))
    edit_json(folder / "config.json", edit)
    with pytest.raises(WeightsError) as refused:
        load(folder)
    assert re.search(words, str(refused.value)), str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("algorithm", ["FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"])
def test_two_formats_at_once_are_refused(copy, algorithm):
    (copy / "hf_quant_config.json").write_text(json.dumps(dict(quantization=dict(quant_algo=algorithm))))
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_folder(copy)
    assert "hf_quant_config.json" in str(refused.value)
    assert ("expected what hf_quant_config.json next to it says (weights per channel, activations token), got"
            in str(refused.value)) == (algorithm != "NVFP4")
    edit_json(copy / "config.json", lambda c: c.update(compression_config=dict(quant_method="fbgemm_fp8")))
    (copy / "hf_quant_config.json").unlink()
    with pytest.raises(ConfigError, match="compression_config: expected no such key"):
        ModelConfig.from_folder(copy)


def test_the_head_may_be_quantized(copy):
    """What it says is what its numbers times their scale say."""
    def store(weights):
        q, scale = quant.quantize_weight_tensors(weights["lm_head.weight"].float())
        head.append(q.float() * scale)
        weights.update({"lm_head.weight": q, "lm_head.weight_scale": scale, "lm_head.input_scale": torch.tensor(0.05)})

    head: list[torch.Tensor] = []
    change(copy, store)
    edit_json(copy / "config.json", lambda c: c.update(quantization_config=compressed()))
    change(copy, lambda w: [w.pop(name) for name in list(w) if name.endswith(("k_scale", "v_scale"))])
    layer, x = load(copy).lm_head, torch.randn(3, 64)
    rounded = (x / 0.05).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.05
    torch.testing.assert_close(layer(x), rounded @ head[0].t(), rtol=1e-4, atol=1e-4)
    edit_json(copy / "config.json", lambda c: c.update(tie_word_embeddings=True))
    with pytest.raises(WeightsError, match="lm_head.input_scale, lm_head.weight_scale: unexpected"):
        load(copy)


FP8 = dict(num_bits=8, type="float", strategy="tensor", dynamic=False)


def compressed(**changes) -> dict:
    group = dict(targets=["Linear"], weights=FP8, input_activations=FP8) | changes.pop("group", {})
    return dict(quant_method="compressed-tensors", format="float-quantized", config_groups=dict(g=group)) | changes


def quark(**weight) -> dict:
    fp8 = dict(dtype="fp8_e4m3", qscheme="per_tensor", is_dynamic=False)
    return dict(quant_method="quark", global_quant_config=dict(weight=fp8 | weight, input_tensors=fp8))


@pytest.mark.parametrize(("config", "key", "got"), [
    (dict(quant_method="awq", bits=4), "quant_method", '"awq": INT4 weights are not served'),
    (dict(quant_method="gptq"), "quant_method", '"gptq"'), (dict(quant_method="mxfp4"), "quant_method", '"mxfp4"'),
    (dict(quant_method="new"), "quant_method", '"new"'), (dict(bits=8), "quant_method", '""'),
    (dict(quant_method="fp8", fmt="e5m2"), "fmt", '"e5m2"'),
    (dict(quant_method="fp8", activation_scheme="none"), "activation_scheme", '"none"'),
    (dict(quant_method="fp8", activation_scheme="static", kv_cache_scheme="dynamic"), "kv_cache_scheme", '"dynamic"'),
    (dict(quant_method="fp8", weight_block_size=[128, 48]), "weight_block_size", "[128, 48]"),
    (dict(quant_method="fp8", weight_block_size=[128, 128], scale_fmt="ue4m3"), "scale_fmt", '"ue4m3"'),
    (dict(quant_method="fp8", new_key=1), "new_key", "1"),
    (dict(quant_method="fbgemm_fp8", activation_scale_ub=-1), "activation_scale_ub", "-1"),
    (compressed(format="pack-quantized"), "format", '"pack-quantized"'),
    (compressed(group=dict(weights=FP8 | dict(num_bits=4))), "config_groups.g.weights.num_bits", "4"),
    (compressed(group=dict(weights=FP8 | dict(type="int"))), "config_groups.g.weights.type", '"int"'),
    (compressed(group=dict(weights=FP8 | dict(strategy="group"))), "config_groups.g.weights.strategy", '"group"'),
    (compressed(group=dict(input_activations=None)), "config_groups.g.input_activations", "null"),
    (compressed(group=dict(input_activations=FP8 | dict(strategy="token"))),
     "config_groups.g.input_activations.dynamic", "false"),
    (compressed(config_groups={}), "config_groups", "{}"), (compressed(ignore=["re:("]), "ignore", '"re:("'),
    (compressed(kv_cache_scheme=FP8 | dict(strategy="channel")), "kv_cache_scheme.strategy", '"channel"'),
    (compressed(kv_cache_scheme=FP8 | dict(dynamic=True)), "kv_cache_scheme.dynamic", "true"),
    (compressed(transform_config=dict(a=1)), "transform_config", '{"a": 1}'),
    (quark(dtype="fp4"), "global_quant_config.weight.dtype", '"fp4"'),
    (quark(dtype="int8"), "global_quant_config.weight.dtype", '"int8"'),
    (quark(qscheme="per_group"), "global_quant_config.weight.qscheme", '"per_group"'),
    (quark(qscheme="per_channel", ch_axis=1), "global_quant_config.weight.ch_axis", "1"),
    (quark() | dict(algo_config=[dict(name="awq")]), "algo_config", '[{"name": "awq"}]'),
    (dict(quant_method="modelopt", quant_algo="NVFP4"), "quant_algo", '"NVFP4"'),
    (dict(quant_method="modelopt", quant_algo="FP8", kv_cache_scheme="NVFP4"), "kv_cache_scheme", '"NVFP4"')])
def test_what_is_not_served_is_refused_by_name(copy, config, key, got):
    edit_json(copy / "config.json", lambda c: c.update(quantization_config=config))
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_folder(copy)
    text = str(refused.value)
    assert text.startswith(f"{copy / 'config.json'}: quantization_config.{key}: expected ")
    assert f", got {got}" in text
    assert "\n" not in text


@pytest.mark.parametrize(("pattern", "name", "meant"), [
    ("lm_head", "lm_head", True), ("*lm_head", "model.lm_head", True), ("re:.*self_attn", Q, True),
    ("re:self", Q, False), ("q_proj", Q, True), ("model.layers.0", Q, True), ("model.layers.0*", Q, True),
    ("roj", Q, False), ("model.layers.1", "model.layers.10.mlp.up_proj", False), ("*.mlp.*", Q, False)])
def test_patterns(pattern, name, meant):
    assert matches(pattern, name) == meant


def test_the_first_rule_counts_and_names_come_before_kinds():
    a, b, c = Scheme("tensor", "static"), Scheme("channel", "token"), Scheme("tensor", "token")
    schemes = Schemes(("lm_head", "*.k_proj"), (("*.q_proj", a), ("re:.*attn", b)), c)
    within = schemes.within("model.layers.0.")
    assert [within.of(f"self_attn.{part}_proj") for part in "qkvo"] == [a, None, b, b]
    assert (within.of("mlp.up_proj"), schemes.of("lm_head")) == (c, None)


def test_a_target_by_its_name_comes_before_an_expression(copy):
    static = dict(weights=FP8, input_activations=FP8)
    dynamic = dict(weights=FP8, input_activations=FP8 | dict(strategy="token", dynamic=True))
    edit_json(copy / "config.json", lambda c: c.update(quantization_config=compressed(config_groups=dict(
        a=dict(targets=["re:.*_proj"]) | static, b=dict(targets=[Q]) | dynamic))))
    layer = ModelConfig.from_folder(copy).layer(0)
    found = [layer.scheme(f"self_attn.{part}_proj") for part in "qk"]
    assert [scheme and scheme.activations for scheme in found] == ["token", "static"]


def test_online_quantizes_while_loading(tmp_path):
    """A plain checkpoint in FP8: as if each output feature had been quantized before."""
    weights = load_file(MADE / "quark-tensor" / "model.safetensors")
    plain = {name: w.float() * weights.get(f"{name}_scale", torch.tensor(1.0)) for name, w in weights.items()
             if not name.endswith("_scale")}
    save_file(plain, tmp_path / "model.safetensors")
    shutil.copy(MADE / "quark-tensor" / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.pop("quantization_config"))
    config = replace(ModelConfig.from_folder(tmp_path), schemes=ONLINE)
    model: Any = load_model(config, tmp_path, torch.float32, "cpu")
    down = model.model.layers[0].mlp.down_proj
    q, scale = quant.quantize_weight_channels(plain["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(down.weight.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(down.weight_scale, scale)
    assert model.lm_head.weight.dtype == torch.float32


def per_head(folder: Path, powers: tuple[float, float] = (1.0, 1.0)) -> Path:
    """A copy of compressed-tensor with plain weights and KV scales per head. The second KV head's keys are times
    powers[0], its values times powers[1], queries and output columns by as much smaller: nothing changes but what is
    cached, and its scales."""
    shutil.copytree(MADE / "compressed-tensor", folder)

    def spread(weights):
        for name in [name for name in weights if name.endswith("proj.weight_scale")]:
            weight = name.removesuffix("_scale")
            weights[weight] = weights[weight].float() * weights.pop(name)
            weights.pop(f"{weight.removesuffix('weight')}input_scale")
        for layer in (f"model.layers.{number}.self_attn." for number in range(2)):
            for part, (power, columns) in {"k": (powers[0], 1), "q": (1 / powers[0], 2), "v": (powers[1], 1)}.items():
                weights[f"{layer}{part}_proj.weight"][16 * columns :] *= power
            weights[f"{layer}o_proj.weight"][:, 32:] /= powers[1]
            for part, power in zip("kv", powers, strict=True):
                scale = weights[f"{layer}{part}_scale"].flatten()
                weights[f"{layer}{part}_scale"] = torch.cat([scale, scale * power]).view(2, 1, 1)

    change(folder, spread)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(ignore=["re:.*"]) or
              c["quantization_config"]["kv_cache_scheme"].update(strategy="attn_head"))
    return folder


def test_scales_of_keys_and_values_per_head(tmp_path):
    """Powers of two change no bit of the result, and each of two ranks has the scale of its own head."""
    ids = load_file(MADE / "compressed-tensor" / "expected.safetensors")["ids"].tolist()
    logits = []
    for number, powers in enumerate([(1.0, 1.0), (2.0**6, 2.0**-7)]):
        folder = per_head(tmp_path / str(number), powers)
        logits.append(Fp8Driver(load(folder), ModelConfig.from_folder(folder), "cpu").step({}, {"a": ids}))
    assert torch.equal(*logits)
    whole, config = load(folder).model.layers[1].self_attn.cache_scales, ModelConfig.from_folder(folder)
    assert [scale.shape for scale in (whole.k_scale, whole.v_scale)] == [(2,), (2,)]
    for rank in range(2):
        group = Group("", rank, 2)
        part: Any = load_model(config, folder, torch.float32, "cpu", ranks=Ranks(group, group))
        held = part.model.layers[1].self_attn.cache_scales
        assert (held.k_scale, held.v_scale) == (whole.k_scale[rank], whole.v_scale[rank])
    with platform.target("gfx942"):
        assert torch.equal(load(folder).model.layers[1].self_attn.cache_scales.k_scale, 2 * whole.k_scale)
    change(folder, lambda w: w.update({"model.layers.0.self_attn.v_scale": torch.ones(3, 1, 1)}))
    with pytest.raises(WeightsError, match=r"v_scale: expected shape \[2\], got \[3, 1, 1\]"):
        load(folder)


def test_made_by_a_real_tool_or_said_not_to_be():
    made_by = {name: json.loads((MADE / name / "made_by.json").read_text()) for name in CHECKPOINTS}
    assert [name for name, packages in made_by.items() if set(packages) == {"torch", "transformers"}] == ["fbgemm"]
    assert schemes_of.__doc__
