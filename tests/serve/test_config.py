"""config.json and generation_config.json: both spellings understood, everything else refused by name."""

import json

import pytest
import torch
from helpers_llama import make_llama
from safetensors.torch import save_file

from wave64.serve.model.config import ConfigError, ModelConfig, RopeConfig

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
SMALLEST = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read(config: dict, generation: dict | None = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_folder(tmp_path)

    return read


def test_llama_3_1(read):
    config = read(LLAMA_3_1_8B, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009]})
    assert config == ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope=RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False, hidden_act="silu", dtype=torch.bfloat16,
        context_length=131072, bos_token_id=128000, eos_token_ids=(128001, 128009, 128008),
        sampling_defaults={"temperature": 0.6, "top_p": 0.9},
    )  # fmt: skip


def test_what_either_file_calls_the_end_is_one(read):
    assert read(SMALLEST | {"eos_token_id": [5, 6]}, {"eos_token_id": [6, 7]}).eos_token_ids == (6, 7, 5)
    assert read(SMALLEST | {"eos_token_id": 5}, {}).eos_token_ids == (5,)
    assert read(SMALLEST, {"eos_token_id": 7}).eos_token_ids == (7,), "the default is for folders that name none"
    assert read(SMALLEST | {"eos_token_id": None}, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert read(SMALLEST | {"eos_token_id": 5}, {"eos_token_id": None}).eos_token_ids == (5,)
    assert read(SMALLEST, {"eos_token_id": None}).eos_token_ids == ()


def test_a_checkpoint_that_does_not_sample_is_greedy_unless_asked(read):
    assert read(SMALLEST, {"do_sample": False}).sampling_defaults == {"temperature": 0.0}
    assert read(SMALLEST, {"do_sample": False, "temperature": 0.7}).sampling_defaults == {"temperature": 0.0}
    assert read(SMALLEST, {"do_sample": True}).sampling_defaults == {}


def test_what_is_left_out_is_what_transformers_would_take(read):
    config = read(SMALLEST)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 8, 2048)
    assert (config.rms_norm_eps, config.hidden_act, config.dtype) == (1e-6, "silu", torch.float32)
    assert config.rope == RopeConfig(original_max_position_embeddings=2048)
    assert (config.bos_token_id, config.eos_token_ids, config.sampling_defaults) == (1, (2,), {})


@pytest.mark.parametrize(
    ("key", "values"),
    [("eos_token_id", {None: (), 7: (7,)}),
     ("hidden_act", {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}),
     ("torch_dtype", {"float16": torch.float16, "torch.bfloat16": torch.bfloat16, None: torch.float32}),
     ("dtype", {"float16": torch.float16})],
)  # fmt: skip
def test_values(read, key, values):
    attribute = {"eos_token_id": "eos_token_ids", "torch_dtype": "dtype"}.get(key, key)
    for value, meaning in values.items():
        assert getattr(read(SMALLEST | {key: value}), attribute) == meaning


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("rope", [
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.5}, {"rope_type": "dynamic", "factor": 2}, YARN,
    {**YARN, "attention_factor": 1.1, "beta_fast": 16, "truncate": False}, LLAMA_3_1_8B["rope_scaling"],
])  # fmt: skip
def test_both_spellings_of_rope_mean_the_same(read, rope):
    with_type = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    new = read(SMALLEST | {"rope_parameters": rope | {"rope_theta": 5000.0}}).rope
    assert new.theta == 5000.0
    assert new.rope_type == rope["rope_type"]
    assert new == read(SMALLEST | {"rope_theta": 5000.0, "rope_scaling": rope}).rope
    assert new == read(SMALLEST | {"rope_theta": 5000.0, "rope_scaling": with_type}).rope
    assert new == read(SMALLEST | {"rope_theta": 5000.0, "rope_scaling": rope | with_type}).rope


def test_context_reaches_as_far_as_the_rope_was_stretched(read):
    assert read(SMALLEST | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}).context_length == 4096
    assert read(SMALLEST | {"rope_scaling": {"type": "linear", "factor": 4.0}}).context_length == 8192
    assert read(SMALLEST | {"rope_scaling": YARN}).context_length == 2048


@pytest.mark.parametrize(("change", "words"), [
    ({"architectures": ["MambaForCausalLM"]}, ["architectures", "MambaForCausalLM", "LlamaForCausalLM"]),
    ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
    ({"vocab_size": None}, ["vocab_size", "positive integer"]),
    ({"hidden_size": 0}, ["hidden_size", "0"]),
    ({"hidden_size": "32"}, ["hidden_size", '"32"']),
    ({"num_hidden_layers": True}, ["num_hidden_layers", "true"]),
    ({"hidden_size": 30}, ["hidden_size", "30", "num_attention_heads, 4"]),
    ({"head_dim": 7}, ["head_dim", "7", "even"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor", "4"]),
    ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu", "gelu_pytorch_tanh"]),
    ({"torch_dtype": "float8"}, ["torch_dtype", "float8", "bfloat16"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps", "small", "number"]),
    ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes", "true or false"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>", "token id"]),
    ({"sliding_window": 512}, ["sliding_window", "512"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantization_config", "awq"]),
    ({"logits_scaling": 8.0}, ["logits_scaling", "8.0", "mathematics"]),
    ({"rope_interleaved": True}, ["rope_interleaved", "false", "two halves"]),
    ({"rope_scaling": {"type": "default", "factor": 2.0}}, ["rope_scaling.factor", "default", "2.0"]),
    ({"rope_theta": -1}, ["rope_theta", "-1"]),
    ({"rope_scaling": {"type": "longrope"}}, ["rope_scaling.type", "longrope", "default, linear, dynamic, llama3"]),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, ["rope_scaling.type", "linear", "yarn"]),
    ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor", "number"]),
    ({"rope_scaling": {"type": "linear", "factor": 2, "attn_factor": 3}}, ["rope_scaling.attn_factor", "linear", "3"]),
    ({"rope_scaling": [2]}, ["rope_scaling", "object"]),
    ({"rope_parameters": LLAMA_3_1_8B["rope_scaling"] | {"high_freq_factor": 1.0}}, ["high_freq_factor", "1.0"]),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "10000.0", "500000"]),
    ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2}}, ["rope_parameters", "rope_scaling"]),
])  # fmt: skip
def test_refused(read, tmp_path, change, words):
    with pytest.raises(ConfigError) as refusal:
        read(SMALLEST | change)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("key", "value"), [
    ("use_sliding_window", False), ("some_map", {}), ("_note", "x"), ("top_k", 50), ("sliding_window", None),
    ("sliding_window", 2048),
    ("rope_scaling", None), ("pretraining_tp", 2),
])  # fmt: skip
def test_keys_without_effect_are_let_through(read, key, value):
    assert read(SMALLEST | {key: value}) == read(SMALLEST)


@pytest.mark.parametrize(("key", "value"), [
    ("is_llama_config", True), ("rope_interleaved", False), ("rope_interleave", False),
    ("transformers.js_config", {"dtype": "q4"}), ("resid_pdrop", 0.1), ("router_aux_loss_coef", 0.01),
    ("rope_scaling", {"rope_type": "default", "factor": 1.0}),
    ("rope_parameters", {"rope_type": "default", "factor": 1.0, "rope_theta": 10000.0, "rope_interleaved": False}),
    ("rope_scaling", {"type": "default", "original_max_position_embeddings": 2048, "attention_factor": 1}),
])  # fmt: skip
def test_what_published_checkpoints_say_besides_changes_nothing(read, key, value):
    assert read(SMALLEST | {key: value}) == read(SMALLEST)
    unknown = ("resid_pdrop", "router_aux_loss_coef")  # which are training's
    assert read(SMALLEST | {key: value}).passed_by == ((key,) if key in unknown else ()), "a needless line of the log"


def test_each_word_of_mathematics_alone_has_a_key_refused(read):
    words = "rope rotary posit alibi attn attention head kv qk mla moe expert router gate topk norm scal mult " \
            "quant window slid chunk sparse softcap capping clip logit bias activ act_fn residual parallel embed " \
            "layer lora rank dim hidden width mamba ssm conv recur index compress interleav factor eps loop depth " \
            "tie_ tied vocab num_ _size"
    for word in words.split():
        with pytest.raises(ConfigError, match=f"x{word}x: expected "):
            read(SMALLEST | {f"x{word}x": True})


@pytest.mark.parametrize("key", [
    "rotary_pct", "attn_temperature_tuning", "num_heads_per_group", "head_softcap", "moe_top", "use_qk_norm",
    "embedding_multiplier", "logit_scale", "quant_method", "attention_window", "mlp_Bias2", "final_logit_softcapping",
    "clip_qkv", "parallel_residual", "expert_interval", "NormType", "index_topk", "residual_multiplier",
])  # fmt: skip
def test_a_key_that_names_mathematics_is_refused_with_the_way_out(read, tmp_path, key):
    with pytest.raises(ConfigError, match=rf"{key}: expected .*; if .*, start with --ignore-config-key {key}$"):
        read(SMALLEST | {key: True})
    assert ModelConfig.from_folder(tmp_path, [key]) == read(SMALLEST)


def test_keys_within_others_are_ignored_by_their_dotted_name(read, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "attn_factor": 3.0}
    with pytest.raises(ConfigError, match="start with --ignore-config-key rope_scaling.attn_factor"):
        read(SMALLEST | {"rope_scaling": rope})
    plain = {"rope_type": "linear", "factor": 2.0}
    ignored = ModelConfig.from_folder(tmp_path, ["rope_scaling.attn_factor"])
    assert ignored == read(SMALLEST | {"rope_scaling": plain})


def test_any_other_key_is_passed_by_and_told(read):
    config = read(SMALLEST | {"my_notes": "x", "trained_by": 5, "nothing": None, "_private": 1})
    assert config == read(SMALLEST)
    assert config.passed_by == ("my_notes", "trained_by")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_auto_is_what_most_weights_are_stored_in(read, tmp_path, key, stored):
    assert read(SMALLEST | {key: "auto"}).dtype == torch.float32, "a folder without weights"
    weights = {"a": torch.zeros(9, dtype=stored), "b": torch.zeros(4), "c": torch.zeros(99).to(torch.float8_e4m3fn)}
    save_file(weights, tmp_path / "model.safetensors")
    assert read(SMALLEST | {key: "auto"}).dtype == stored


@pytest.mark.parametrize("names", [5, True, "LlamaForCausalLM", [[]], [{"a": 1}], {"LlamaForCausalLM": 1}])
def test_architectures_of_another_kind(read, names):
    with pytest.raises(ConfigError, match=r"architectures: expected one of .*, got ."):
        read(SMALLEST | {"architectures": names})


def test_sizes_that_no_model_has_are_refused_before_it_is_made(read):
    with pytest.raises(ConfigError, match="num_hidden_layers: expected at most 4096, got 1000000"):
        read(SMALLEST | {"num_hidden_layers": 10**6})
    with pytest.raises(ConfigError, match="vocab_size: expected at most 2147483647"):
        read(SMALLEST | {"vocab_size": 2**31})


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}", '{"a":' * 100_000])
def test_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.from_folder(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(ConfigError, match="config.json: no such file"):
        ModelConfig.from_folder(tmp_path)


def test_bad_generation_config_names_its_own_file(read):
    with pytest.raises(ConfigError, match=r"generation_config.json: temperature: expected a number .* got \"hot\""):
        read(SMALLEST, {"temperature": "hot"})


def test_what_transformers_writes_is_read(tmp_path):
    make_llama(tmp_path, num_key_value_heads=2, eos_token_id=[3, 5], bos_token_id=1)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.dtype) == (4, 2, 12, torch.float32)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (3, 5))
