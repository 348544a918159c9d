"""The model families that can be served, by the name that a checkpoint's config.json gives under `architectures`."""

from wave64.serve.model import deepseek, llama
from wave64.serve.model.family import Family

FAMILIES = {
    "DeepseekV2ForCausalLM": deepseek.FAMILY,
    "DeepseekV3ForCausalLM": deepseek.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
}

__all__ = ["FAMILIES", "Family"]
