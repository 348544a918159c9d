"""What config.json says of a Qwen3."""

from wave64.serve.model.config import Keys, ModelConfig
from wave64.serve.model.qwen2.config import qwen


def read_config(architecture: str, keys: Keys) -> ModelConfig:
    return qwen(architecture, keys, head_dim=128, attention_bias=keys.flag("attention_bias"))
