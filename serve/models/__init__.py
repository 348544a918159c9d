"""The models that can be served, by the name a checkpoint's config.json gives under `architectures`."""

from wave64.serve.models.llama import LlamaForCausalLM

MODELS = {"LlamaForCausalLM": LlamaForCausalLM}

__all__ = ["MODELS", "LlamaForCausalLM"]
