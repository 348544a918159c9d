"""wave64's relatives of Llama, Qwen3, Qwen2 and Mistral, against transformers'."""

import json

import pytest
import torch
from helpers_llama import load, make_llama
from helpers_parity import Parity, answers_without_near_ties, assert_no_less_exact

from wave64.serve.model.config import ConfigError, ModelConfig

#: name -> family and what differs from helpers_llama.BASE; the window is shorter than the prompt
RELATIVES = {
    "qwen3-gqa2-head_dim14": ("Qwen3", dict(num_key_value_heads=2, head_dim=14, sliding_window=3)),
    "qwen3-mqa-tied-bias": ("Qwen3", dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
                                          attention_bias=True)),
    "qwen2-gqa2-tied": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, sliding_window=3)),
    "mistral-window5": ("Mistral", dict(num_key_value_heads=2, sliding_window=5)),
    "mistral-no_window": ("Mistral", dict(num_key_value_heads=2, head_dim=16, sliding_window=None)),
}  # fmt: skip
NAMES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


@pytest.fixture(scope="module", params=RELATIVES)
def models(request, tmp_path_factory, device):
    """(transformers' model, wave64's, its config), loaded from the same folder."""
    folder = tmp_path_factory.mktemp("relative")
    family, overrides = RELATIVES[request.param]
    theirs = make_llama(folder, family=family, **overrides)
    return theirs, *load(folder, device)


class TestRelatives(Parity):
    def answers(self, theirs):
        return answers_without_near_ties(theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_no_less_exact_than_transformers(tmp_path, device, dtype):
    theirs = make_llama(tmp_path, family="Qwen3", **RELATIVES["qwen3-gqa2-head_dim14"][1])
    assert_no_less_exact(theirs, tmp_path, device, dtype)


@pytest.fixture
def read(tmp_path):
    def read(name: str, **keys) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(dict(
            architectures=[name], vocab_size=64, hidden_size=128, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=64) | keys))
        return ModelConfig.from_folder(tmp_path)

    return read


def test_missing_keys_mean_what_transformers_takes_them_for(read):
    qwen2, qwen3, mistral = (read(name) for name in NAMES)
    assert [c.num_kv_heads for c in (qwen2, qwen3, mistral)] == [32, 32, 8]
    assert [c.head_dim for c in (qwen2, qwen3, mistral)] == [2, 128, 2]
    assert [c.sliding_window for c in (qwen2, qwen3, mistral)] == [-1, -1, 4096]
    assert [c.max_position_embeddings for c in (qwen2, qwen3, mistral)] == [32768, 32768, 131072]
    assert [c.eos_token_ids for c in (qwen2, qwen3, mistral)] == [(), (), (2,)]
    assert [c.bos_token_id for c in (qwen2, qwen3, mistral)] == [None, None, 1]
    assert [(c.attention_bias, c.qkv_bias) for c in (qwen2, qwen3, mistral)] == [(False, True), *[(False, False)] * 2]
    assert read(NAMES[2], num_key_value_heads=None).num_kv_heads == 64


@pytest.mark.parametrize(("name", "keys", "words"), [
    (NAMES[0], dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), "use_sliding_window: expected"),
    (NAMES[1], dict(layer_types=["full_attention", "sliding_attention"]), "layer_types: expected"),
    (NAMES[0], dict(attention_bias=True), "attention_bias"), (NAMES[2], dict(attention_bias=True), "attention_bias"),
    (NAMES[1], dict(mlp_bias=True), "mlp_bias"), (NAMES[2], dict(sliding_window=0), "sliding_window: expected"),
    (NAMES[2], dict(layer_types=["full_attention"] * 2), "layer_types: expected sliding_attention"),
    (NAMES[1], dict(quantization_config=dict(quant_method="gptq")), "gptq"),
    (NAMES[0], dict(use_mrope=True), "use_mrope"), (NAMES[1], dict(head_dim=15), "head_dim: expected an even"),
])  # fmt: skip
def test_what_changes_the_mathematics_is_refused(read, name, keys, words):
    with pytest.raises(ConfigError, match=words):
        read(name, **keys)


@pytest.mark.parametrize("keys", [dict(use_sliding_window=False, sliding_window=131072, max_window_layers=0),
                                  dict(use_sliding_window=True, max_window_layers=2), dict(use_mrope=False)])
def test_what_changes_nothing_is_read(read, keys):
    assert read(NAMES[0], **keys).sliding_window == -1
