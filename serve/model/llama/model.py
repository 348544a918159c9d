"""Llama 2, 3, 3.1, 3.2, 3.3 and whatever else declares LlamaForCausalLM (Touvron et al. 2023, Grattafiori et al. 2024).

A block adds to the residual stream twice, each time the output of a sub-layer fed with the norm of the stream:
grouped-query attention with rotary positions, then a gated MLP.
"""

from torch import Tensor, nn

from wave64.serve.model.batch import Batch
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.family import Family, keys_and_values
from wave64.serve.model.layers import ACTIVATIONS, Attention, Block, Decoder, KVCache, Linear, MergedLinear, Rotary
from wave64.serve.model.llama.config import read_config


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig, rotary: Rotary):
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.widths = (width, kv_width, kv_width)
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), self.widths, strict=True))
        self.qkv_proj = MergedLinear(config.hidden_size, parts, bias=config.attention_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.attention_bias)
        self.rotary = rotary
        self.attention = Attention(config.num_heads, config.num_kv_heads, config.head_dim)

    def forward(self, x: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        qkv = self.qkv_proj(x)
        query, key, value = qkv.split(self.widths, dim=-1)
        self.rotary(batch.positions, qkv[:, : -self.widths[-1]])
        return self.o_proj(self.attention(query, key, value, batch, kv_cache))


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedLinear(config.hidden_size, parts, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation_and_mul = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation_and_mul(self.gate_up_proj(x)))


class LlamaForCausalLM(nn.Module):
    """Built uninitialised on the default device, in the default dtype; `model.load.load_model` fills it."""

    #: names that end so are in old checkpoints and hold what the configuration gives anyway
    derived_weights = ("rotary_emb.inv_freq",)
    #: names that begin so are of no use here
    unused_weights = ()

    def __init__(self, config: ModelConfig):
        super().__init__()
        rotary = Rotary(config.rope, config.head_dim, config.context_length)
        self.model = Decoder(config, (Block(config, LlamaAttention(config, rotary), LlamaMLP(config))
                                      for _ in range(config.num_layers)))
        tied = self.model.embed_tokens.weight if config.tie_word_embeddings else None
        self.lm_head = Linear(config.hidden_size, config.vocab_size, tied=tied)

    def forward(self, batch: Batch, kv_cache: list[KVCache]) -> Tensor:
        """Logits [R, vocab_size] fp32 of the rows in batch.logit_rows. Writes the new keys and values to kv_cache,
        one (keys, values) pair per layer."""
        return self.lm_head(self.model(batch, kv_cache)).float()


FAMILY = Family(read_config, keys_and_values, LlamaForCausalLM)
