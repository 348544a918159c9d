"""Llama 2, 3, 3.1, 3.2, 3.3 and others that declare LlamaForCausalLM (Touvron et al. 2023, Grattafiori et al. 2024).

A block adds to the residual stream twice, each time the output of a sub-layer fed with the norm of the stream:
grouped-query attention with RoPE, then a gated MLP.
"""

from wave64.serve.model.config import ModelConfig
from wave64.serve.model.family import Family, keys_and_values
from wave64.serve.model.layers import MLP, Block, CausalLM, Rotary, SelfAttention
from wave64.serve.model.llama.config import read_config
from wave64.serve.model.parallel import Ranks
from wave64.serve.model.scaled import norm_groups


class LlamaForCausalLM(CausalLM):
    attention = SelfAttention

    def __init__(self, config: ModelConfig, ranks: Ranks):
        rotary = Rotary(config.rope, config.head_dim, config.context_length)

        def block(number: int) -> Block:
            layer = config.layer(number)
            groups = (norm_groups(layer, "self_attn", ("q_proj", "k_proj", "v_proj")),
                      norm_groups(layer, "mlp", ("gate_proj", "up_proj")))
            return Block(layer, ranks, self.attention(layer, ranks, rotary), MLP(layer, ranks), groups)

        super().__init__(config, ranks, map(block, range(config.num_layers)))


FAMILY = Family(read_config, keys_and_values, LlamaForCausalLM)
