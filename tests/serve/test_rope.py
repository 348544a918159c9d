"""The rope tables against transformers' own, with the parameters of published models."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wave64.serve.model.config import RopeConfig
from wave64.serve.model.rope import cos_sin_cache, inverse_frequencies

TRAINED = 4096
ROPES = {
    "llama-2": RopeConfig(original_max_position_embeddings=TRAINED),
    "llama-3": RopeConfig(theta=500000.0, original_max_position_embeddings=TRAINED),
    "linear": RopeConfig("linear", 10000.0, 4.0, TRAINED),
    "dynamic": RopeConfig("dynamic", 10000.0, 2.0, TRAINED),
    "llama-3.1": RopeConfig("llama3", 500000.0, 8.0, 8192),
    "llama-3.2": RopeConfig("llama3", 500000.0, 32.0, 8192),
    "yarn-64k": RopeConfig("yarn", 10000.0, 16.0, TRAINED),
    "yarn-all-keys": RopeConfig("yarn", 1e6, 40.0, TRAINED, beta_fast=24.0, beta_slow=2.0, truncate=False, mscale=1.0,
                                mscale_all_dim=0.7),
    "yarn-attention_factor": RopeConfig("yarn", 1e6, 40.0, TRAINED, attention_factor=1.5),
    "yarn-low-base": RopeConfig("yarn", 100.0, 4.0, 163840, beta_fast=6000.0),  # the ramp would end too far
    "yarn-short": RopeConfig("yarn", 10000.0, 4.0, 4),  # every pair is beyond the ramp
}  # fmt: skip


def theirs(rope: RopeConfig, head_dim: int) -> LlamaRotaryEmbedding:
    keys = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
                     "attention_factor", "mscale", "mscale_all_dim")}.get(rope.rope_type, ("factor",))  # fmt: skip
    given = {key: getattr(rope, key) for key in keys if rope.rope_type != "default" and getattr(rope, key) is not None}
    parameters = {"rope_type": rope.rope_type, "rope_theta": rope.theta, **given}
    config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=TRAINED,
                                      rope_parameters=parameters)  # fmt: skip
    return LlamaRotaryEmbedding(config)


def their_table(module: LlamaRotaryEmbedding, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = module(torch.empty(1), positions.unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), -1)


@pytest.mark.parametrize("head_dim", [128, 80, 10])
@pytest.mark.parametrize("name", ROPES)
def test_table_is_transformers(name, head_dim):
    table = cos_sin_cache(ROPES[name], head_dim, TRAINED)
    assert (table.shape, table.dtype) == ((TRAINED, head_dim), torch.float32)
    # one unit in the last place of a frequency turns position 4095 by up to 4095 * 1.2e-7
    want = their_table(theirs(ROPES[name], head_dim), torch.arange(TRAINED))
    torch.testing.assert_close(table, want, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers(name):
    module = theirs(ROPES[name], 128)
    frequencies, factor = inverse_frequencies(ROPES[name], 128)
    torch.testing.assert_close(frequencies, module.inv_freq, rtol=5e-7, atol=0)
    assert factor == pytest.approx(module.attention_scaling)


def test_dynamic_beyond_the_trained_context_is_what_generation_sees():
    """transformers, generating one token after the other, turns each by the frequencies of the length so far."""
    rope, module = ROPES["dynamic"], theirs(ROPES["dynamic"], 64)
    table = cos_sin_cache(rope, 64, 2 * TRAINED)
    for position in (TRAINED - 1, TRAINED, TRAINED + 1, 6000, 2 * TRAINED - 1):
        one = their_table(module, torch.tensor([position]))
        torch.testing.assert_close(table[position : position + 1], one, rtol=0, atol=2e-3)
    assert not torch.allclose(table[6000], cos_sin_cache(RopeConfig(), 64, 6001)[6000], atol=0.1)


def test_dynamic_rows_do_not_depend_on_the_length_of_the_table():
    rope = ROPES["dynamic"]
    short, long = cos_sin_cache(rope, 64, 5000), cos_sin_cache(rope, 64, 9000)[:5000]
    torch.testing.assert_close(short, long, rtol=0, atol=2e-3)
