"""The models that can be served, by the name a checkpoint's config.json gives under `architectures`."""

from wave64.serve.model.deepseek.model import DeepseekForCausalLM
from wave64.serve.model.llama.model import LlamaForCausalLM

MODELS = {"DeepseekV2ForCausalLM": DeepseekForCausalLM, "DeepseekV3ForCausalLM": DeepseekForCausalLM,
          "LlamaForCausalLM": LlamaForCausalLM}

__all__ = ["MODELS", "DeepseekForCausalLM", "LlamaForCausalLM"]
