"""What config.json says of a Mistral."""

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
    window = -1  # null: no window; the first Mistral's configuration has 4096, which a missing key stands for
    if "sliding_window" not in keys.raw or keys.get("sliding_window") is not None:
        window = keys.count("sliding_window", 4096)
    refuse_other_layers(keys, "full_attention" if window == -1 else "sliding_attention", "a Mistral")
    max_position_embeddings = keys.count("max_position_embeddings", 131072)
    return ModelConfig(
        architecture=architecture,
        schemes=schemes_of(keys),
        attention_bias=False,
        mlp_bias=False,
        sliding_window=window,
        **read_heads(keys, num_kv_heads=8),
        **common(keys, read_rope(keys, max_position_embeddings), max_position_embeddings),
    )
