"""The parts decoder models are made of. Every kernel is an op of wave64; matrix products are torch's.

Weights are allocated uninitialized, on the default device and in the default dtype: the caller sets both, builds the
model, then fills the views that `checkpoint()` yields. Activations are token-major, [num_tokens, ...].
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wave64 import ops
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN
from wave64.serve.model.batch import Batch
from wave64.serve.model.config import ModelConfig, RopeConfig
from wave64.serve.model.linear import Layer, Quantized, Stored, weight
from wave64.serve.model.parallel import Ranks, Slice
from wave64.serve.model.rope import cos_sin_cache
from wave64.serve.model.scaled import CacheScales, activation, head, projections, row_parallel

#: whether ROCm's torch has a product of 16-bit matrices with an fp32 result
MIXED_ON_ROCM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)

#: of one layer: keys and values, each [num_pages, page_size, num_kv_heads, head_dim], or latents alone
KVCache = tuple[Tensor, ...]

#: of keys and of values in an FP8 cache; None: 1
KVScales = tuple[Tensor | None, Tensor | None]


def mm_fp32(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix.T in fp32, both of one dtype. Products of 16-bit numbers are exact in fp32: torch's mixed product,
    where there is one (on GPUs, ROCm's since torch 2.10), needs no widening first."""
    if x.is_cuda and x.dtype != torch.float32 and (torch.version.hip is None or MIXED_ON_ROCM):
        return torch.mm(x, matrix.t(), out_dtype=torch.float32)
    return F.linear(x.float(), matrix.float())


class Embedding(Layer):
    """A row of `weight` [vocab_size, hidden] per token id; zeros for an id that another rank holds."""

    def __init__(self, vocab_size: int | Slice, hidden_size: int):
        super().__init__()
        self.rows = Slice.of(vocab_size)
        self.weight = weight(self.rows.held, hidden_size)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        yield f"{name}.weight", self.weight.data[: self.rows.size], self.rows.shard(0)

    def finish(self) -> None:
        self.weight.data[self.rows.size :].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        if self.rows.size == self.rows.whole:
            return F.embedding(ids, self.weight)
        elsewhere = (ids < self.rows.begin) | (ids >= self.rows.end)
        rows = F.embedding((ids - self.rows.begin).masked_fill(elsewhere, 0), self.weight)
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0)


class RMSNorm(Layer):
    """group_size: of the FP8 that the next product takes, in which the norm is handed on, made in the same launch; 0:
    none."""

    def __init__(self, hidden_size: int, eps: float, group_size: int = 0):
        super().__init__()
        self.weight = weight(hidden_size)
        self.eps, self.group_size = eps, group_size

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to the residual stream and returns the norm of the sum. Both are written: residual holds the sum,
        x the norm."""
        ops.fused_add_rms_norm(x, residual, self.weight, self.eps)
        return x

    def handed_on(self, x: Tensor, residual: Tensor | None) -> Tensor | Quantized:
        """As forward, or without a residual as alone, in the form that the next product takes."""
        if self.group_size:
            q, scale = ops.fused_add_rms_norm_quant_fp8(x, residual, self.weight, self.eps, self.group_size)
            return Quantized(q, scale, x.dtype)
        return self.alone(x) if residual is None else self(x, residual)

    def of_sum(self, x: Tensor, residual: Tensor, ranks: Ranks) -> Tensor | Quantized:
        """As handed_on, of what the ranks of an attention group have computed each a part of."""
        if ranks.attention.size == 1 or self.group_size == PER_TOKEN or self.group_size and not ranks.sums_exactly(x):
            return self.handed_on(ranks.sum_attention(x), residual)
        if self.group_size:
            return Quantized(*ranks.quantized_norm_of_sum(x, residual, self.weight, self.eps, self.group_size), x.dtype)
        return ranks.norm_of_sum(x, residual, self.weight, self.eps)

    def of_mlp_sum(self, x: Tensor, residual: Tensor, ranks: Ranks) -> Tensor | Quantized:
        """As handed_on, of what all ranks have computed each a part of, for the tokens of all attention groups."""
        if ranks.data.size == 1:
            return self.of_sum(x, residual, ranks)
        return self.handed_on(ranks.sum_mlp(x, residual.shape[0]), residual)

    def alone(self, x: Tensor) -> Tensor:
        """The norm of x [num_tokens, hidden] or [num_tokens, num_heads, hidden], strided or not; x does not change."""
        return ops.rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """Applies RoPE to queries and keys, and caches keys and values; one table for all layers of a model."""

    cos_sin_cache: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int, length: int, is_neox: bool = True):
        super().__init__()
        self.head_dim, self.is_neox = head_dim, is_neox
        table = cos_sin_cache(rope, head_dim, length).to(torch.get_default_device())
        self.register_buffer("cos_sin_cache", table, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, kv_cache: KVCache,
                scales: KVScales = (None, None)) -> None:
        """query, key and value [num_tokens, heads, head_dim]; query and key in place, then key and value are written to
        the slots of the batch's tokens."""
        key_cache, value_cache = kv_cache
        ops.rotary_embedding_and_cache(batch.positions, query, key, value, self.cos_sin_cache, key_cache, value_cache,
                                       batch.slot_mapping, self.is_neox, *scales)


class Attention(nn.Module):
    """Causal attention over a paged cache, any number of query heads per KV head. Holds no weights.

    sliding_window  w > 0: a query sees the last w tokens, its own among them; -1: all
    """

    def __init__(self, head_dim: int, sliding_window: int = -1):
        super().__init__()
        self.scale, self.sliding_window = head_dim**-0.5, sliding_window

    def forward(self, query: Tensor, batch: Batch, kv_cache: KVCache, scales: KVScales = (None, None)) -> Tensor:
        """query [num_tokens, num_heads, head_dim]; keys and values of the new tokens are in the cache.

        Decodes attend with the decode kernel, the rest with the prefill kernel. Returns
        [num_tokens, num_heads * head_dim].
        """
        n = batch.num_decodes
        if n == query.shape[0]:
            out = self._decode(query, batch, kv_cache, scales)
        elif n == 0:
            out = self._prefill(query, batch, kv_cache, scales)
        else:
            out = torch.cat((self._decode(query[:n], batch, kv_cache, scales),
                             self._prefill(query[n:], batch, kv_cache, scales)))
        return out.flatten(1)

    def _decode(self, query: Tensor, batch: Batch, kv_cache: KVCache, scales: KVScales) -> Tensor:
        n, (key_cache, value_cache) = batch.num_decodes, kv_cache
        return ops.paged_attention(query, key_cache, value_cache, batch.page_table[:n], batch.seq_lens[:n], self.scale,
                                   self.sliding_window, k_scale=scales[0], v_scale=scales[1])

    def _prefill(self, query: Tensor, batch: Batch, kv_cache: KVCache, scales: KVScales) -> Tensor:
        n, (key_cache, value_cache) = batch.num_decodes, kv_cache
        out, _ = ops.prefill_attention(query, key_cache, value_cache, batch.page_table[n:], batch.cu_seqlens_q,
                                       batch.seq_lens[n:], batch.max_seqlen_q, self.scale, True, self.sliding_window,
                                       k_scale=scales[0], v_scale=scales[1])
        return out


class SelfAttention(nn.Module):
    """Grouped-query attention between its projections, RoPE on whole heads. A family that changes queries and keys
    before RoPE overrides `before_rope`."""

    def __init__(self, config: ModelConfig, ranks: Ranks, rotary: Rotary):
        super().__init__()
        heads, kv_heads = ranks.query_heads(config.num_heads), ranks.kv_heads(config.num_kv_heads)
        width, kv_width = heads.times(config.head_dim), kv_heads.times(config.head_dim)
        parts = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv_proj = projections(config, "self_attn", config.hidden_size, parts,
                                    config.attention_bias or config.qkv_bias)
        self.o_proj = row_parallel(config, ranks, "self_attn", "o_proj", width, config.hidden_size,
                                   config.attention_bias)
        kv_scales = config.schemes and config.schemes.kv_scales
        self.cache_scales = CacheScales(kv_scales, kv_heads) if kv_scales else None
        self.rotary = rotary
        self.attention = Attention(config.head_dim, config.sliding_window)

    def forward(self, x: Tensor | Quantized, batch: Batch, kv_cache: KVCache) -> Tensor:
        query, key, value = (part.unflatten(-1, (-1, self.rotary.head_dim))
                             for part in self.qkv_proj(x).split(self.qkv_proj.widths, dim=-1))
        query, key = self.before_rope(query, key)
        scales = self.cache_scales.of(kv_cache[0]) if self.cache_scales is not None else (None, None)
        self.rotary(query, key, value, batch, kv_cache, scales)
        return self.o_proj(self.attention(query, batch, kv_cache, scales))

    def before_rope(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query and key [num_tokens, heads, head_dim], views of the projection -> what RoPE is applied to, in place, in
        the same shape"""
        return query, key


class MLP(nn.Module):
    """Gated MLP: down(activation(gate x) * up x)."""

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        scheme = config.scheme("mlp.down_proj")
        inter = ranks.features(config.intermediate_size, scheme.block[1] if scheme and scheme.block else 1)
        self.gate_up_proj = projections(config, "mlp", config.hidden_size, {"gate_proj": inter, "up_proj": inter},
                                        config.mlp_bias)
        self.down_proj = row_parallel(config, ranks, "mlp", "down_proj", inter, config.hidden_size, config.mlp_bias)
        self.activation_and_mul = activation(config, "mlp", "down_proj", inter.size)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return self.down_proj(self.activation_and_mul(self.gate_up_proj(x)))


class Block(nn.Module):
    """Two sub-layers, attention and MLP, each fed with the norm of the residual stream and added to it. What they
    compute is this rank's part of a sum.

    groups  of FP8 that attention and the MLP take in place of the norm (RMSNorm's group_size)
    """

    def __init__(self, config: ModelConfig, ranks: Ranks, self_attn: nn.Module, mlp: nn.Module,
                 groups: tuple[int, int] = (0, 0)):
        super().__init__()
        gathers = ranks.data.size > 1  # the norm itself
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, groups[0])
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, 0 if gathers else groups[1])
        self.mlp = mlp
        self.ranks = ranks

    def forward(self, x: Tensor, residual: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        """x: this rank's part of the output of the previous block, not yet added to the residual stream; returns that
        of this block."""
        x = self.self_attn(self.input_layernorm.of_mlp_sum(x, residual, self.ranks), batch, kv_cache)
        normed = self.post_attention_layernorm.of_sum(x, residual, self.ranks)
        if not isinstance(normed, Quantized):
            normed = self.ranks.gather(normed, batch.gathered_tokens)
        return self.mlp(normed)


class Decoder(nn.Module):
    """Token ids through all blocks."""

    def __init__(self, config: ModelConfig, ranks: Ranks, blocks: Iterable[Block]):
        super().__init__()
        self.embed_tokens = Embedding(ranks.vocabulary(config.vocab_size), config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ranks = ranks

    def forward(self, batch: Batch, kv_cache: list[KVCache]) -> Tensor:
        """The final hidden states of the rows in batch.logit_rows, [R, hidden]."""
        ids = self.ranks.gather(batch.input_ids, batch.gathered_tokens)
        x = self.embed_tokens(ids)
        residual = x.new_zeros(batch.input_ids.shape[0], x.shape[1])
        for layer, layer_cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, residual, batch, layer_cache)
        x = self.ranks.sum_mlp(x, residual.shape[0])
        return self.norm(x[batch.logit_rows], residual[batch.logit_rows])


class CausalLM(nn.Module):
    """Decoder and head. Built uninitialized on the default device, in the default dtype; `model.load.load_model` fills
    it."""

    #: suffixes of names that old checkpoints have and whose values follow from the configuration
    derived_weights = ("rotary_emb.inv_freq",)
    #: prefixes of stored names that this model does not use
    unused_weights: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, ranks: Ranks, blocks: Iterable[Block]):
        super().__init__()
        self.model = Decoder(config, ranks, blocks)
        tied = self.model.embed_tokens.weight if config.tie_word_embeddings else None
        self.lm_head = head(config, ranks.vocabulary(config.vocab_size), tied)
        self.ranks, self.vocab_size, self.schemes = ranks, config.vocab_size, config.schemes
        self.is_quantized = config.schemes is not None or config.quantization is not None

    def forward(self, batch: Batch, kv_cache: list[KVCache]) -> Tensor:
        """Logits [R, vocab_size] fp32 of the rows in batch.logit_rows, those of all attention groups below each other,
        each padded to batch.gathered_logits; in batch.logits, if there is one. Writes what attention caches of the new
        tokens to kv_cache, one tuple of tensors per layer, shaped as the family's kv_shapes says."""
        x = self.ranks.gather(self.model(batch, kv_cache), batch.gathered_logits)
        logits = self.ranks.whole_vocabulary(self.lm_head(x), self.vocab_size)
        return logits.float().contiguous() if batch.logits is None else batch.logits.copy_(logits)
