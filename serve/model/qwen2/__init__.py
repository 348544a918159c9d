"""Qwen2 and Qwen2.5, the dense models: Llama with biases on queries, keys and values (Qwen Team 2024)."""

from wave64.serve.model.qwen2.model import FAMILY

__all__ = ["FAMILY"]
