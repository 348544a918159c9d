"""DeepSeek V2 and V3: multi-head latent attention and a mixture of experts."""

from wave64.serve.model.deepseek.model import FAMILY, DeepseekForCausalLM

__all__ = ["FAMILY", "DeepseekForCausalLM"]
