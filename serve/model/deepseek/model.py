"""DeepSeek-V2, V2-Lite, V3 and R1 (DeepSeek-AI 2024, DeepSeek-V2; DeepSeek-AI 2024, DeepSeek-V3).

A block is Llama's but for its two sub-layers. Attention is multi-head latent attention: the cache holds per token a
latent of kv_lora_rank numbers and one rotated key for all heads, and every head's keys and values are linear in the
latent. The gated MLP is, after the first layers, a mixture: a router chooses a few of many experts for each token, and
shared experts serve all.
"""

import torch
from torch import Tensor, nn

from wave64 import ops
from wave64.serve.model.batch import Batch
from wave64.serve.model.config import ModelConfig, MoEConfig
from wave64.serve.model.deepseek.config import read_config
from wave64.serve.model.family import Family
from wave64.serve.model.layers import (
    Block,
    CausalLM,
    KVCache,
    RMSNorm,
    Rotary,
    mm_fp32,
)
from wave64.serve.model.linear import Layer, Quantized, weight
from wave64.serve.model.parallel import Ranks, Slice
from wave64.serve.model.quantized import (
    Experts,
    UpProjection,
    activation,
    block_columns,
    linear,
    norm_groups,
    row_parallel,
)
from wave64.serve.model.scaled import LatentScale

LATENT_EPS = 1e-6  # of the norms inside attention, independent of rms_norm_eps


class MultiHeadLatentAttention(nn.Module):
    """Queries and keys have a part without position and a rotated one. q = W_q x, through a latent of their own where
    q_lora_rank says so; [kv_c, k_pe] = W_kv_a x; per head k = [W_uk kv_c, k_pe] and v = W_uv kv_c.

    Decoding never computes k and v: q k^T = (W_uk^T q) kv_c^T, so queries are projected to latents, and the attention
    over latents back through W_uv. A prefill has as many queries as keys, for which expanding them is cheaper.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks, rotary: Rotary):
        super().__init__()
        mla, hidden, heads = config.mla, config.hidden_size, ranks.query_heads(config.num_heads)
        assert mla is not None
        self.num_heads, self.rank = heads.size, mla.kv_lora_rank
        self.nope, self.rope, self.v_head_dim = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.scale, self.rotary = mla.softmax_scale, rotary
        queries = heads.times(self.nope + self.rope)
        self.q_width = mla.q_lora_rank or queries.size
        parts = {"q_a_proj": mla.q_lora_rank} if mla.q_lora_rank else {"q_proj": queries}
        self.down_proj = linear(config, hidden, parts | {"kv_a_proj_with_mqa": self.rank + self.rope})
        self.q_a_layernorm = self.q_b_proj = None
        if mla.q_lora_rank:
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, LATENT_EPS, norm_groups(config, mla.q_lora_rank))
            self.q_b_proj = linear(config, mla.q_lora_rank, {"q_b_proj": queries})
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_EPS)
        self.cache_scales = LatentScale() if config.quantization and config.quantization.kv_scales else None
        self.kv_b_proj = UpProjection(config, heads, self.rank, self.nope, self.v_head_dim)
        self.o_proj = row_parallel(config, ranks, heads.times(self.v_head_dim), "o_proj", hidden)

    def forward(self, x: Tensor | Quantized, batch: Batch, kv_cache: KVCache) -> Tensor:
        q, kv_c, k_pe = self.down_proj(x).split((self.q_width, self.rank, self.rope), dim=-1)
        if self.q_b_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(self.q_a_layernorm.handed_on(q, None))
        q = q.unflatten(-1, (self.num_heads, -1))
        kv_c = self.kv_a_layernorm.alone(kv_c)
        n = batch.num_decodes
        if n == q.shape[0]:
            out = self._decode(q, kv_c, k_pe, batch, *kv_cache)
        elif n == 0:
            out = self._prefill(q, kv_c, k_pe, batch, *kv_cache)
        else:
            out = torch.cat((self._decode(q[:n], kv_c[:n], k_pe[:n], batch, *kv_cache),
                             self._prefill(q[n:], kv_c[n:], k_pe[n:], batch, *kv_cache)))
        return self.o_proj(out.flatten(1))

    def _decode(self, q: Tensor, kv_c: Tensor, k_pe: Tensor, batch: Batch, latents: Tensor) -> Tensor:
        n, scale = batch.num_decodes, self._scale_of(latents)
        q_nope, q_pe = q.split((self.nope, self.rope), dim=-1)
        out = ops.mla_decode_rope(
            self.kv_b_proj.queries_to_latents(q_nope), q_pe, kv_c, k_pe, latents, batch.slot_mapping[:n],
            batch.page_table[:n], batch.seq_lens[:n], batch.positions[:n], self.rotary.cos_sin_cache, self.scale,
            self.rotary.is_neox, scale)
        return self.kv_b_proj.latents_to_values(out)

    def _scale_of(self, latents: Tensor) -> Tensor | None:
        return None if self.cache_scales is None else self.cache_scales.of(latents)[0]

    def _prefill(self, q: Tensor, kv_c: Tensor, k_pe: Tensor, batch: Batch, latents: Tensor) -> Tensor:
        n, scale = batch.num_decodes, self._scale_of(latents)
        q_nope, q_pe = q.split((self.nope, self.rope), dim=-1)
        q_pe, k_pe = q_pe.contiguous(), k_pe.contiguous()
        ops.concat_and_cache_mla_rope_fused(batch.positions[n:], q_pe, k_pe, kv_c, self.rotary.cos_sin_cache,
                                            self.rotary.is_neox, batch.slot_mapping[n:], latents, scale)
        q = torch.cat((q_nope, q_pe), dim=-1)
        starts, longest = batch.cu_seqlens_q, batch.max_seqlen_q
        out, lse = ops.varlen_attention(q, *self._keys_and_values(kv_c, k_pe), starts, starts, longest, longest,
                                        self.scale)
        if batch.max_prefix:  # tokens of earlier chunks, which every new token sees
            assert batch.cu_seqlens_prefix is not None
            stored = latents.flatten(0, 1)[batch.prefix_slots].to(q.dtype)
            if scale is not None:
                stored = (stored * scale).to(q.dtype)
            before, its_lse = ops.varlen_attention(
                q, *self._keys_and_values(*stored.split((self.rank, self.rope), dim=-1)), starts,
                batch.cu_seqlens_prefix, longest, batch.max_prefix, self.scale, False)
            out, _ = ops.merge_attn_states(out, lse, before, its_lse)
        return out

    def _keys_and_values(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, num_heads, nope + rope] and [num_tokens, num_heads, v_head_dim]; k_pe is rotated."""
        k_nope, v = self.kv_b_proj(kv_c)
        return torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, self.num_heads, -1)), dim=-1), v


class Router(Layer):
    """Chooses experts by their affinity to a token, in fp32. V2: softmax over all, then the best of at most topk_groups
    groups of experts, a group counting as its best. V3: sigmoid, a bias on the choice alone, which keeps the load
    balanced, and a group counts as its best two."""

    def __init__(self, config: MoEConfig, hidden_size: int, fused_shared: int):
        super().__init__()
        self.config, self.fused_shared = config, fused_shared
        self.weight = weight(config.num_experts, hidden_size)
        self.e_score_correction_bias = None
        if config.correction_bias:
            self.e_score_correction_bias = weight(config.num_experts, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights fp32, ids int32), of each token its top_k and then `fused_shared` experts"""
        c = self.config
        return ops.grouped_topk(mm_fp32(x, self.weight), c.top_k, c.num_groups, c.topk_groups, c.norm_topk_prob,
                                c.scoring_func, self.e_score_correction_bias, c.routed_scaling_factor,
                                self.fused_shared)


class GatedMLP(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks, inter: Slice):
        super().__init__()
        self.gate_up_proj = linear(config, config.hidden_size, {"gate_proj": inter, "up_proj": inter})
        self.down_proj = row_parallel(config, ranks, inter, "down_proj", config.hidden_size)
        self.activation = activation(config)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class MixtureOfExperts(nn.Module):
    """One shared expert is one more expert that every token chooses, where it is split as the others are. Else shared
    experts are a gated MLP of their joint width, to which a rank feeds the tokens that it attends to."""

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        moe = config.moe
        assert moe is not None
        fused = moe.num_shared_experts == 1 and ranks.ep_size == ranks.data.size == 1
        self.gate = Router(moe, config.hidden_size, int(fused))
        self.experts = Experts(config, ranks, moe.num_experts, moe.intermediate_size, fused)
        self.shared_experts, self.own = None, ranks.own
        if width := 0 if fused else moe.num_shared_experts * moe.intermediate_size:
            self.shared_experts = GatedMLP(config, ranks, ranks.shared_features(width, block_columns(config)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.experts(x, *self.gate(x))
        if self.shared_experts is not None:
            self.own(out).add_(self.shared_experts(self.own(x)))
        return out


class DeepseekForCausalLM(CausalLM):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        mla, moe = config.mla, config.moe
        assert mla is not None
        rotary = Rotary(config.rope, mla.qk_rope_head_dim, config.context_length, is_neox=not mla.rope_interleave)

        groups = norm_groups(config, config.hidden_size)

        def block(number: int) -> Block:
            attention = MultiHeadLatentAttention(config, ranks, rotary)
            if moe is not None and number >= moe.first_dense_layers and number % moe.layer_freq == 0:
                return Block(config, ranks, attention, MixtureOfExperts(config, ranks), (groups, 0))
            inter = ranks.features(config.intermediate_size, block_columns(config))
            return Block(config, ranks, attention, GatedMLP(config, ranks, inter), (groups, groups))

        super().__init__(config, ranks, map(block, range(config.num_layers)))
        # layers behind the last one predict the token after next, for speculation, which is not served
        self.unused_weights = tuple(f"model.layers.{config.num_layers + i}."
                                    for i in range(config.num_nextn_predict_layers))


def latents(config: ModelConfig, ranks: Ranks, num_pages: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    """`kv_shapes` of multi-head latent attention: one latent and one rotated key per token, which all heads share."""
    mla = config.mla
    assert mla is not None
    return ((num_pages, page_size, mla.kv_lora_rank + mla.qk_rope_head_dim),)


FAMILY = Family(read_config, latents, DeepseekForCausalLM, reads_prefixes=True)
