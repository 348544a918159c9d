"""What config.json says of a Llama."""

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
    refuse_other_layers(keys, "full_attention", "a Llama")
    heads = read_heads(keys)
    max_position_embeddings = keys.count("max_position_embeddings", 2048)
    window = keys.get("sliding_window")
    if window is not None and keys.count("sliding_window") < max_position_embeddings:
        raise keys.error("sliding_window", window, "null: a Llama attends to the whole context")
    return ModelConfig(
        architecture=architecture,
        schemes=schemes_of(keys),
        attention_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        **heads,
        **common(keys, read_rope(keys, max_position_embeddings), max_position_embeddings),
    )
