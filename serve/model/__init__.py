"""The model families that can be served, by the name that a checkpoint's config.json gives under `architectures`."""

from wave64.serve.model import deepseek, llama, mistral, qwen2, qwen3
from wave64.serve.model.family import Family

FAMILIES = {
    "DeepseekV2ForCausalLM": deepseek.FAMILY,
    "DeepseekV3ForCausalLM": deepseek.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
}

__all__ = ["FAMILIES", "Family"]
