"""config.json of DeepSeek's models: as published, as transformers writes it, and what is refused."""

import json
import math

import pytest
import torch
import transformers

from wave64.serve.model.config import ConfigError, ModelConfig, QuantConfig

YARN = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=4096, type="yarn")
FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])
#: DeepSeek-V3 and R1, as DeepSeek wrote it
V3 = dict(
    architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, aux_loss_alpha=0.001, eos_token_id=1, ep_size=1,
    first_k_dense_replace=3, hidden_act="silu", hidden_size=7168, initializer_range=0.02, intermediate_size=18432,
    kv_lora_rank=512, max_position_embeddings=163840, model_type="deepseek_v3", moe_intermediate_size=2048,
    moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128,
    num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128, num_nextn_predict_layers=1, pretraining_tp=1,
    q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, quantization_config=FP8, rms_norm_eps=1e-6,
    rope_scaling=YARN, rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid", seq_aux=True,
    tie_word_embeddings=False, topk_group=4, topk_method="noaux_tc", torch_dtype="bfloat16",
    transformers_version="4.33.1", use_cache=True, v_head_dim=128, vocab_size=129280)  # fmt: skip
V2_LITE = {**V3, **dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", first_k_dense_replace=1, hidden_size=2048,
    intermediate_size=10944, moe_intermediate_size=1408, n_group=1, n_routed_experts=64, n_shared_experts=2,
    norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16,
    q_lora_rank=None, routed_scaling_factor=1.0, scoring_func="softmax", topk_group=1, topk_method="greedy",
    vocab_size=102400, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, quantization_config=None,
    num_nextn_predict_layers=None)}  # fmt: skip
V2 = {**V2_LITE, **dict(
    hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, n_group=8, n_routed_experts=160,
    num_attention_heads=128, num_hidden_layers=60, num_key_value_heads=128, q_lora_rank=1536,
    routed_scaling_factor=16.0, topk_group=3, topk_method="group_limited_greedy")}  # fmt: skip


def read(tmp_path, config) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_folder(tmp_path)


def test_v3_as_published(tmp_path):
    config = read(tmp_path, V3)
    mla, moe = config.mla, config.moe
    assert (config.num_layers, config.num_heads, config.context_length) == (61, 128, 163840)
    assert config.dtype == torch.bfloat16
    assert (mla.q_lora_rank, mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (
        1536, 512, 128, 64, 128)  # fmt: skip
    assert mla.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert (moe.num_experts, moe.top_k, moe.num_groups, moe.topk_groups) == (256, 8, 8, 4)
    assert (moe.scoring_func, moe.correction_bias, moe.norm_topk_prob) == ("sigmoid", True, True)
    assert (moe.routed_scaling_factor, moe.num_shared_experts, moe.intermediate_size) == (2.5, 1, 2048)
    assert (moe.first_dense_layers, moe.layer_freq) == (3, 1)
    assert config.quantization == QuantConfig((128, 128), scale_ue8m0=False)
    v3_1 = read(tmp_path, {**V3, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}})
    assert v3_1.quantization == QuantConfig((128, 128), scale_ue8m0=True)
    assert config.num_nextn_predict_layers == 1
    assert (config.rope.rope_type, config.rope.factor) == ("yarn", 40)


def test_v2_and_v2_lite_as_published(tmp_path):
    lite, large = read(tmp_path, V2_LITE), read(tmp_path, V2)
    assert (lite.mla.q_lora_rank, lite.quantization, lite.num_nextn_predict_layers) == (0, None, 0)
    assert (lite.moe.num_groups, lite.moe.scoring_func, lite.moe.correction_bias) == (1, "softmax", False)
    assert (large.moe.num_groups, large.moe.topk_groups, large.moe.routed_scaling_factor) == (8, 3, 16.0)
    assert large.mla.softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


def test_transformers_spelling_says_the_same(tmp_path):
    theirs = {key: value for key, value in V3.items()
              if key not in ("rope_scaling", "rope_theta", "scoring_func", "topk_method", "torch_dtype", "ep_size")}
    rope = {key: value for key, value in YARN.items() if key != "type"}
    theirs |= dict(rope_parameters={**rope, "rope_type": "yarn", "rope_theta": 10000.0}, dtype="bfloat16", head_dim=64,
                   qk_head_dim=192, rope_interleave=True)
    assert read(tmp_path, theirs) == read(tmp_path, V3)


@pytest.mark.parametrize(("changed", "named"), [
    (dict(scoring_func="tanh"), "scoring_func"), (dict(topk_method="greedy"), "topk_method"),
    (dict(hidden_act="relu"), "hidden_act"), (dict(rope_scaling={**YARN, "type": "longrope"}), "rope_scaling.type"),
    (dict(attention_bias=True), "attention_bias"), (dict(n_group=7), "n_group"), (dict(topk_group=9), "topk_group"),
    (dict(num_experts_per_tok=129), "num_experts_per_tok"), (dict(qk_rope_head_dim=63), "qk_rope_head_dim"),
    (dict(num_key_value_heads=8), "num_key_value_heads"), (dict(head_dim=128), "head_dim"),
    (dict(n_group=256, topk_group=8), "n_group"), (dict(kv_lora_rank=0), "kv_lora_rank"),
    (dict(quantization_config={**FP8, "quant_method": "awq"}), "quantization_config.quant_method"),
    (dict(quantization_config={**FP8, "fmt": "e5m2"}), "quantization_config.fmt"),
    (dict(quantization_config={**FP8, "activation_scheme": "static"}), "quantization_config.activation_scheme"),
    (dict(quantization_config={**FP8, "weight_block_size": None}), "quantization_config.weight_block_size"),
    (dict(quantization_config={**FP8, "weight_block_size": [128, 48]}), "quantization_config.weight_block_size"),
    (dict(quantization_config={**FP8, "kv_cache_scheme": "dynamic"}), "quantization_config.kv_cache_scheme"),
    (dict(quantization_config={**FP8, "scale_fmt": "ue4m3"}), "quantization_config.scale_fmt"),
    (dict(quantization_config={**FP8, "quant_method": None}), "quantization_config.quant_method"),
    (dict(n_routed_experts=None), "n_routed_experts"), (dict(n_group=None), "n_group"),
    (dict(n_shared_experts=-1), "n_shared_experts"), (dict(q_lora_rank=False), "q_lora_rank"),
    (dict(rope_scaling={**YARN, "mscale": None}), "rope_scaling"),
    (dict(rope_scaling={**YARN, "mscale_all_dim": None}), "rope_scaling"),
    (dict(index_topk=2048), "index_topk")])  # fmt: skip
def test_what_the_model_does_not_know_is_refused(tmp_path, changed, named):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, {**V3, **changed})
    text = str(refused.value)
    assert text.count("\n") == 0
    assert text.startswith(f"{tmp_path / 'config.json'}: {named}: expected ")


def test_either_spelling_of_interleaving_counts(tmp_path):
    assert read(tmp_path, {**V3, "rope_interleaved": True}) == read(tmp_path, V3)
    for changed in ({"rope_interleaved": False}, {"rope_interleave": False, "rope_interleaved": True}):
        with pytest.raises(ConfigError, match="rope_interleaved: expected (true|false), as rope_interleave has it"):
            read(tmp_path, {**V3, **changed})


def test_a_v2_that_normalizes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="norm_topk_prob: expected false"):
        read(tmp_path, {**V2, "norm_topk_prob": True})


@pytest.mark.parametrize("key", ["n_group", "topk_group", "num_experts_per_tok"])
def test_a_v2_that_does_not_say_how_experts_are_chosen_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=f"{key}: expected a positive integer, got null"):
        read(tmp_path, {**V2, key: None})


def test_a_v2_that_turns_half_heads_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rope_interleave: expected true"):
        read(tmp_path, {**V2, "rope_interleave": False})


@pytest.mark.parametrize(("name", "config_class"), [("V2", transformers.DeepseekV2Config),
                                                    ("V3", transformers.DeepseekV3Config)])
def test_what_is_left_out_is_what_transformers_would_take(tmp_path, name, config_class):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    chosen = dict(num_experts_per_tok=6) if name == "V2" else {}
    ours = read(tmp_path, dict(architectures=[f"Deepseek{name}ForCausalLM"], **sizes, **chosen))
    theirs = config_class(**sizes, **chosen)
    mla, moe = ours.mla, ours.moe
    assert (mla.q_lora_rank, mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (
        theirs.q_lora_rank, theirs.kv_lora_rank, theirs.qk_nope_head_dim, theirs.qk_rope_head_dim, theirs.v_head_dim)
    assert (moe.num_experts, moe.top_k, moe.num_groups, moe.topk_groups) == (
        theirs.n_routed_experts, theirs.num_experts_per_tok, theirs.n_group or 1, theirs.topk_group or 1)
    assert (moe.num_shared_experts, moe.intermediate_size, moe.first_dense_layers, moe.norm_topk_prob) == (
        theirs.n_shared_experts, theirs.moe_intermediate_size, theirs.first_k_dense_replace, theirs.norm_topk_prob)
    assert (moe.routed_scaling_factor, ours.rms_norm_eps, ours.max_position_embeddings) == (
        theirs.routed_scaling_factor, theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
