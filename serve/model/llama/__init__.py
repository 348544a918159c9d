"""Llama 2 and 3: grouped-query attention and a gated MLP."""

from wave64.serve.model.llama.model import FAMILY, LlamaForCausalLM

__all__ = ["FAMILY", "LlamaForCausalLM"]
