"""Layers whose weights may be stored in FP8 with a scale per block, as DeepSeek-V3's are, or unquantized.

Such a weight is stored as numbers and, under `..._scale_inv`, what to multiply each block with; activations are
quantized in front of the product, each token in groups of a block's columns. If several stored weights are merged in
one tensor and do not begin at a block boundary, or a rank's rows of one do not, blocks are made smaller until they do,
and scales are repeated. Columns are split over ranks at boundaries only.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from wave64 import layouts, ops, quant
from wave64.ops.fused_all_reduce_rms_norm_quant_fp8 import GROUP_SIZES
from wave64.serve.model.checkpoint import Shard
from wave64.serve.model.config import ModelConfig, QuantConfig
from wave64.serve.model.linear import ACTIVATIONS, Layer, Linear, MergedLinear, Quantized, Stored, weight
from wave64.serve.model.parallel import Ranks, Slice


def linear(config: ModelConfig, in_features: int, parts: Mapping[str, int | Slice]) -> nn.Module:
    """y = x @ weight.T of one or several projections of the same input, side by side, without bias.

    parts  {name in the checkpoint: out_features}, in order
    """
    if config.quantization is None:
        return MergedLinear(in_features, parts)
    return Fp8Linear(in_features, parts, config.quantization)


def row_parallel(config: ModelConfig, ranks: Ranks, in_features: Slice, name: str, out_features: int) -> nn.Module:
    """y = x @ weight.T of the projection `name`, of which this rank has some columns: its part of a sum over ranks.

    Raises ConfigError for columns that are not whole blocks of an FP8 weight.
    """
    if config.quantization is None:
        return Linear(in_features, out_features)
    ranks.on_borders(f"columns of {name}", in_features, block_columns(config))
    return Fp8Linear(in_features, {name: out_features}, config.quantization)


def block_columns(config: ModelConfig) -> int:
    """Columns of a block of FP8 weights; 1 where they are stored plain."""
    return config.quantization.weight_block_size[1] if config.quantization else 1


def norm_groups(config: ModelConfig, columns: int) -> int:
    """Group size of the FP8 in which `linear` takes a norm of so many columns; 0 where it takes the norm itself: the
    operators that make both at once have some group sizes, and scales of fp32."""
    size, of = block_columns(config), config.quantization
    fits = of is not None and not of.scale_ue8m0 and size in GROUP_SIZES and columns % size == 0
    return size if fits else 0


def activation(config: ModelConfig) -> Callable[[Tensor], Tensor | Quantized]:
    """Of the first product of a gated MLP, [num_tokens, 2 * inter], what its second one takes: `row_parallel`'s in FP8
    takes silu's result quantized, from the same launch."""
    of = config.quantization
    if of is None or config.hidden_act != "silu":
        return ACTIVATIONS[config.hidden_act]

    def silu_in_fp8(x: Tensor) -> Quantized:
        q, scale = ops.silu_and_mul_per_token_group_quant_fp8(x, of.weight_block_size[1], of.scale_ue8m0)
        return Quantized(q, scale, x.dtype)

    return silu_in_fp8


class Scales:
    """The scales [..., rows / block rows, columns / block columns] of a weight, as kernels take them and as they are
    stored. starts: rows at which one of the checkpoint's weights begins, here or, for a slice of one, there."""

    def __init__(self, stored_block: tuple[int, int], starts: Iterable[int]):
        self.stored_rows, self.columns = stored_block
        self.rows = math.gcd(self.stored_rows, *starts)
        self._staged: list[tuple[Tensor, Tensor, int]] = []

    @property
    def block_shape(self) -> list[int]:
        return [self.rows, self.columns]

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-columns // self.columns)

    def stored(self, scale: Tensor, first: int, rows: Slice, columns: Slice) -> tuple[Tensor, Shard | None]:
        """The tensor to fill with the checkpoint's scales of a weight's slice, which lies here from row `first` on, and
        the shard of them that belongs there."""
        part = scale[first // self.rows : -(-(first + rows.size) // self.rows)]
        begin, end = rows.begin // self.stored_rows, -(-rows.end // self.stored_rows)
        shard = Slice(begin, end, -(-rows.whole // self.stored_rows)).shard(0)
        if columns.size < columns.whole:
            shard = Shard(1, columns.begin // self.columns, -(-columns.end // self.columns))
        if self.rows == self.stored_rows:
            return part, shard
        staged = torch.empty(end - begin, part.shape[1], dtype=part.dtype, device=part.device)
        self._staged.append((staged, part, rows.begin % self.stored_rows))
        return staged, shard

    def finish(self) -> None:
        for staged, part, offset in self._staged:
            of = (torch.arange(len(part), device=part.device) * self.rows + offset) // self.stored_rows
            part.copy_(staged[of])
        self._staged.clear()


def as_multiplied(stored: nn.Parameter, scale: nn.Parameter) -> nn.Parameter:
    """A weight as it is stored, in OCP's FP8, as the architecture multiplies it, with the row stride that it reads
    fastest; its scales are changed to fit."""
    own = stored.data
    if quant.fp8_dtype() != own.dtype:
        own, own_scale = quant.fn_to_fnuz(own, scale.data)
        scale.data.copy_(own_scale)
    return nn.Parameter(quant.pad_rows(own), requires_grad=False)


class Fp8Linear(Layer):
    """`linear` with a weight in FP8. fp32 accumulation; the result has the dtype of x, which may be quantized already,
    in groups of a block's columns."""

    def __init__(self, in_features: int | Slice, parts: Mapping[str, int | Slice], quantization: QuantConfig,
                 scale_name: str = "weight_scale_inv", bias: bool = False):
        super().__init__()
        self.scale_name = scale_name
        self.columns, self.scale_ue8m0 = Slice.of(in_features), quantization.scale_ue8m0
        self.parts = {name: Slice.of(rows) for name, rows in parts.items()}
        self.widths = [rows.size for rows in self.parts.values()]
        starts = (*itertools.accumulate(self.widths[:-1]), *(rows.begin for rows in self.parts.values()))
        self.scales = Scales(quantization.weight_block_size, starts)
        self.weight = weight(sum(self.widths), self.columns.size, dtype=torch.float8_e4m3fn)
        self.weight_scale = weight(*self.scales.shape(*self.weight.shape), dtype=torch.float32)
        self.bias = weight(sum(self.widths)) if bias else None

    def checkpoint(self, name: str) -> Iterator[Stored]:
        first = 0
        for part, rows in self.parts.items():
            view, stored = self.weight.data[first : first + rows.size], self.sibling(name, part)
            yield f"{stored}.weight", view, self.columns.shard(1) or rows.shard(0)
            yield f"{stored}.{self.scale_name}", *self.scales.stored(self.weight_scale.data, first, rows, self.columns)
            if self.bias is not None:
                yield f"{stored}.bias", self.bias.data[first : first + rows.size], rows.shard(0)
            first += rows.size

    def finish(self) -> None:
        self.scales.finish()
        self.weight = as_multiplied(self.weight, self.weight_scale)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if not isinstance(x, Quantized):
            x = Quantized(*ops.per_token_group_quant_fp8(x, self.scales.columns, self.scale_ue8m0), x.dtype)
        y = ops.fp8_block_scaled_mm(x.q, self.weight, x.scale, self.weight_scale, self.scales.block_shape, x.dtype)
        return y if self.bias is None or self.columns.begin else y.add_(self.bias)


class Experts(Layer):
    """The gated MLPs of a mixture, [num_experts, ...] in one tensor for each product; the last one may be shared. Of
    each that this rank holds it has some intermediate features; of the others it computes nothing."""

    expert_map: Tensor | None

    def __init__(self, config: ModelConfig, ranks: Ranks, num_experts: int, inter: int, shared: bool):
        super().__init__()
        self.hidden, self.names = config.hidden_size, [f"experts.{e}" for e in range(num_experts)]
        self.inter = ranks.expert_features(inter, block_columns(config))
        self.held = ranks.experts(num_experts)
        if shared:
            self.names.append("shared_experts")
            self.held = Slice.of(num_experts + 1)
        count = self.held.size
        local = [e - self.held.begin if self.held.begin <= e < self.held.end else -1 for e in range(len(self.names))]
        self.register_buffer("expert_map", torch.tensor(local, dtype=torch.int32) if -1 in local else None, False)
        self.activation, self.scales = config.hidden_act, None
        self.scale_ue8m0 = bool(config.quantization and config.quantization.scale_ue8m0)
        dtype = torch.float8_e4m3fn if config.quantization else None
        self.w13 = weight(count, 2 * self.inter.size, self.hidden, dtype=dtype)
        self.w2 = weight(count, self.hidden, self.inter.size, dtype=dtype)
        self.w13_scale = self.w2_scale = None
        if config.quantization:
            self.scales = Scales(config.quantization.weight_block_size, (self.inter.size, self.inter.begin))
            self.w13_scale = weight(count, *self.scales.shape(*self.w13.shape[1:]), dtype=torch.float32)
            self.w2_scale = weight(count, *self.scales.shape(*self.w2.shape[1:]), dtype=torch.float32)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        hidden, inter, parent = Slice.of(self.hidden), self.inter, name.rpartition(".")[0]
        for e, expert in enumerate(self.names):
            here = e - self.held.begin if self.held.begin <= e < self.held.end else None
            for part, of, scale, first, rows, columns in (
                    ("gate_proj", self.w13, self.w13_scale, 0, inter, hidden),
                    ("up_proj", self.w13, self.w13_scale, inter.size, inter, hidden),
                    ("down_proj", self.w2, self.w2_scale, 0, hidden, inter)):
                name = f"{parent}.{expert}.{part}.weight"
                if here is None:  # none of their bytes are read, but they have to be there
                    yield name, of.data.new_empty(0, columns.whole), Shard(0, 0, 0)
                else:
                    view = of.data[here, first : first + rows.size]
                    yield name, view, columns.shard(1) or rows.shard(0)
                if scale is not None and self.scales is not None:
                    if here is None:
                        blocks = -(-columns.whole // self.scales.columns)
                        yield f"{name}_scale_inv", scale.data.new_empty(0, blocks), Shard(0, 0, 0)
                    else:
                        yield f"{name}_scale_inv", *self.scales.stored(scale.data[here], first, rows, columns)

    def finish(self) -> None:
        if self.scales is not None:
            assert self.w13_scale is not None
            assert self.w2_scale is not None
            self.scales.finish()
            self.w13 = as_multiplied(self.w13, self.w13_scale)
            self.w2 = as_multiplied(self.w2, self.w2_scale)
        self.w13, self.w2 = (layouts.as_read_by(ops.fused_moe, each) for each in (self.w13, self.w2))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [num_tokens, hidden], the router's weights and ids [num_tokens, top_k]."""
        return ops.fused_moe(x, self.w13, self.w2, weights, ids, self.w13_scale, self.w2_scale,
                             self.scales and self.scales.block_shape, self.activation,
                             expert_map=self.expert_map, scale_ue8m0=self.scale_ue8m0)


class UpProjection(Layer):
    """MLA's keys and values out of latents: per head W_uk [nope, rank], and below it W_uv [v_head_dim, rank].

    One tensor serves both directions, so it has the model's dtype even if it is stored in FP8."""

    def __init__(self, config: ModelConfig, heads: Slice, rank: int, nope: int, v_head_dim: int):
        super().__init__()
        self.nope, self.v_head_dim, self.num_heads = nope, v_head_dim, heads.size
        self.rows = heads.times(nope + v_head_dim)
        self.weight = weight(self.rows.size, rank)
        self._quantization = config.quantization
        self._stored: tuple[Tensor, Tensor, Scales] | None = None

    def checkpoint(self, name: str) -> Iterator[Stored]:
        if self._quantization is None:
            yield f"{name}.weight", self.weight.data, self.rows.shard(0)
            return
        scales = Scales(self._quantization.weight_block_size, (self.rows.begin,))
        stored = torch.empty(self.weight.shape, dtype=torch.float8_e4m3fn, device=self.weight.device)
        scale = torch.empty(scales.shape(*stored.shape), dtype=torch.float32, device=self.weight.device)
        self._stored = stored, scale, scales
        yield f"{name}.weight", stored, self.rows.shard(0)
        yield f"{name}.weight_scale_inv", *scales.stored(scale, 0, self.rows, Slice.of(stored.shape[1]))

    def finish(self) -> None:
        if self._stored is not None:
            stored, scale, scales = self._stored
            scales.finish()
            self.weight.data.copy_(quant.dequantize(stored, scale, scales.block_shape))
            self._stored = None

    def _heads(self) -> tuple[Tensor, Tensor]:
        keys, values = self.weight.unflatten(0, (self.num_heads, -1)).split((self.nope, self.v_head_dim), dim=1)
        return keys, values

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [num_tokens, rank] -> keys and values, [num_tokens, num_heads, nope and v_head_dim]"""
        both = nn.functional.linear(latents, self.weight).unflatten(-1, (self.num_heads, -1))
        keys, values = both.split((self.nope, self.v_head_dim), dim=-1)
        return keys, values

    def queries_to_latents(self, q_nope: Tensor) -> Tensor:
        """q_nope [num_tokens, num_heads, nope] -> [num_tokens, num_heads, rank], whose product with a latent is that of
        q_nope with its key."""
        return torch.bmm(q_nope.transpose(0, 1), self._heads()[0]).transpose(0, 1)

    def latents_to_values(self, x: Tensor) -> Tensor:
        """x [num_tokens, num_heads, rank] -> [num_tokens, num_heads, v_head_dim]"""
        return torch.bmm(x.transpose(0, 1), self._heads()[1].transpose(1, 2)).transpose(0, 1)
