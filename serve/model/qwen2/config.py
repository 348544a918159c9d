"""What config.json says of a Qwen2, and what a Qwen3's has in common with it."""

from typing import Any

from wave64.serve.model.config import (
    Keys,
    ModelConfig,
    common,
    read_heads,
    read_rope,
    refuse_other_layers,
)
from wave64.serve.model.formats import schemes_of


def read_config(architecture: str, keys: Keys) -> ModelConfig:
    return qwen(architecture, keys, head_dim=None, attention_bias=False, qkv_bias=True)


def qwen(architecture: str, keys: Keys, head_dim: int | None, **biases: Any) -> ModelConfig:
    """The configuration, with transformers' defaults; head_dim and biases: what the two families differ in."""
    refuse_other_layers(keys, "full_attention", "a Qwen")
    keys.optional_number("sliding_window")  # has no effect unless use_sliding_window
    first_windowed, num_layers = keys.number("max_window_layers", 28, above=-1), keys.count("num_hidden_layers")
    if keys.flag("use_sliding_window") and not keys.get("layer_types") and first_windowed < num_layers:
        raise keys.error("use_sliding_window", True, "false: a window in some of a Qwen's layers is not served")
    max_position_embeddings = keys.count("max_position_embeddings", 32768)
    return ModelConfig(
        architecture=architecture,
        schemes=schemes_of(keys),
        mlp_bias=False,
        **biases,
        **read_heads(keys, num_kv_heads=32, head_dim=head_dim),
        **common(keys, read_rope(keys, max_position_embeddings), max_position_embeddings, bos=None, eos=None),
    )
