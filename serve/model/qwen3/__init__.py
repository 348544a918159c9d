"""Qwen3, the dense models: Llama's block with norms of queries and keys."""

from wave64.serve.model.qwen3.model import FAMILY, Qwen3ForCausalLM

__all__ = ["FAMILY", "Qwen3ForCausalLM"]
