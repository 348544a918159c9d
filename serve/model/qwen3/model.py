"""Qwen3, the dense models (Qwen Team 2025, Qwen3 Technical Report).

Llama's block, but each head of queries and keys is normalized by itself before RoPE: with that, the products of queries
and keys stay bounded without biases.
"""

from torch import Tensor

from wave64.serve.model.config import ModelConfig
from wave64.serve.model.family import Family, keys_and_values
from wave64.serve.model.layers import RMSNorm, Rotary, SelfAttention
from wave64.serve.model.llama import LlamaForCausalLM
from wave64.serve.model.parallel import Ranks
from wave64.serve.model.qwen3.config import read_config


class Qwen3Attention(SelfAttention):
    def __init__(self, config: ModelConfig, ranks: Ranks, rotary: Rotary):
        super().__init__(config, ranks, rotary)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def before_rope(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm.alone(query), self.k_norm.alone(key)


class Qwen3ForCausalLM(LlamaForCausalLM):
    attention = Qwen3Attention


FAMILY = Family(read_config, keys_and_values, Qwen3ForCausalLM)
