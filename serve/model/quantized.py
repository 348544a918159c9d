"""Layers whose weights may be stored in FP8 with a scale per block, as DeepSeek-V3's are, or unquantized.

Such a weight is stored as numbers and, under `..._scale_inv`, what to multiply each block with; activations are
quantized in front of the product, each token in groups of a block's columns. If several stored weights are merged in
one tensor and do not begin at a block boundary, blocks are made smaller until they do, and scales are repeated.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wave64 import ops, quant
from wave64.serve.model.config import ModelConfig, QuantConfig
from wave64.serve.model.layers import Layer, MergedLinear, Stored, weight


def linear(config: ModelConfig, in_features: int, parts: dict[str, int]) -> nn.Module:
    """y = x @ weight.T of one or several projections of the same input, side by side, without bias.

    parts  {name in the checkpoint: out_features}, in order
    """
    if config.quantization is None:
        return MergedLinear(in_features, parts)
    return Fp8Linear(in_features, parts, config.quantization)


class Scales:
    """The scales [..., rows / block rows, columns / block columns] of a weight, as kernels take them and as they are
    stored. starts: rows at which one of the checkpoint's weights begins."""

    def __init__(self, stored_block: tuple[int, int], starts: tuple[int, ...]):
        self.stored_rows, self.columns = stored_block
        self.rows = math.gcd(self.stored_rows, *starts)
        self._staged: list[tuple[Tensor, Tensor]] = []

    @property
    def block_shape(self) -> list[int]:
        return [self.rows, self.columns]

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-columns // self.columns)

    def view(self, scale: Tensor, first: int, rows: int) -> Tensor:
        """The tensor to fill with the checkpoint's scales of `rows` rows from `first` on."""
        part = scale[first // self.rows : -(-(first + rows) // self.rows)]
        if self.rows == self.stored_rows:
            return part
        staged = torch.empty(-(-rows // self.stored_rows), part.shape[1], dtype=part.dtype, device=part.device)
        self._staged.append((staged, part))
        return staged

    def finish(self) -> None:
        for staged, part in self._staged:
            of = torch.arange(len(part), device=part.device) * self.rows // self.stored_rows
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
    """`linear` with a weight in FP8. fp32 accumulation; the result has the dtype of x."""

    def __init__(self, in_features: int, parts: dict[str, int], quantization: QuantConfig):
        super().__init__()
        self.parts, self.scale_ue8m0 = parts, quantization.scale_ue8m0
        ends = [sum(list(parts.values())[: i + 1]) for i in range(len(parts))]
        self.scales = Scales(quantization.weight_block_size, tuple(ends[:-1]))
        self.weight = weight(ends[-1], in_features, dtype=torch.float8_e4m3fn)
        self.weight_scale = weight(*self.scales.shape(ends[-1], in_features), dtype=torch.float32)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        parent, first = name.rpartition(".")[0], 0
        for part, rows in self.parts.items():
            yield f"{parent}.{part}.weight", self.weight.data[first : first + rows], None
            yield f"{parent}.{part}.weight_scale_inv", self.scales.view(self.weight_scale.data, first, rows), None
            first += rows

    def finish(self) -> None:
        self.scales.finish()
        self.weight = as_multiplied(self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        q, scale = ops.per_token_group_quant_fp8(x, self.scales.columns, self.scale_ue8m0)
        return ops.fp8_block_scaled_mm(q, self.weight, scale, self.weight_scale, self.scales.block_shape, x.dtype)


class Experts(Layer):
    """The gated MLPs of a mixture, [num_experts, ...] in one tensor for each product; the last one may be shared."""

    def __init__(self, config: ModelConfig, num_experts: int, inter: int, shared: bool):
        super().__init__()
        hidden = config.hidden_size
        self.names = [f"experts.{e}" for e in range(num_experts)] + ["shared_experts"] * shared
        num_experts = len(self.names)
        self.inter, self.activation, self.scales = inter, config.hidden_act, None
        self.scale_ue8m0 = bool(config.quantization and config.quantization.scale_ue8m0)
        dtype = torch.float8_e4m3fn if config.quantization else None
        self.w13 = weight(num_experts, 2 * inter, hidden, dtype=dtype)
        self.w2 = weight(num_experts, hidden, inter, dtype=dtype)
        self.w13_scale = self.w2_scale = None
        if config.quantization:
            self.scales = Scales(config.quantization.weight_block_size, (inter,))
            self.w13_scale = weight(num_experts, *self.scales.shape(2 * inter, hidden), dtype=torch.float32)
            self.w2_scale = weight(num_experts, *self.scales.shape(hidden, inter), dtype=torch.float32)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        hidden, parent = self.w2.shape[1], name.rpartition(".")[0]
        for e, expert in enumerate(self.names):
            for part, of, scale, first, rows in (
                    ("gate_proj", self.w13, self.w13_scale, 0, self.inter),
                    ("up_proj", self.w13, self.w13_scale, self.inter, self.inter),
                    ("down_proj", self.w2, self.w2_scale, 0, hidden)):
                yield f"{parent}.{expert}.{part}.weight", of.data[e, first : first + rows], None
                if scale is not None and self.scales is not None:
                    view = self.scales.view(scale.data[e], first, rows)
                    yield f"{parent}.{expert}.{part}.weight_scale_inv", view, None

    def finish(self) -> None:
        if self.scales is not None:
            assert self.w13_scale is not None
            assert self.w2_scale is not None
            self.scales.finish()
            self.w13 = as_multiplied(self.w13, self.w13_scale)
            self.w2 = as_multiplied(self.w2, self.w2_scale)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [num_tokens, hidden], the router's weights and ids [num_tokens, top_k]."""
        return ops.fused_moe(x, self.w13, self.w2, weights, ids, self.w13_scale, self.w2_scale,
                             self.scales and self.scales.block_shape, self.activation,
                             scale_ue8m0=self.scale_ue8m0)


class UpProjection(Layer):
    """MLA's keys and values out of latents: per head W_uk [nope, rank], and below it W_uv [v_head_dim, rank].

    One tensor serves both directions, so it has the model's dtype even if it is stored in FP8."""

    def __init__(self, config: ModelConfig, num_heads: int, rank: int, nope: int, v_head_dim: int):
        super().__init__()
        self.nope, self.v_head_dim, self.num_heads = nope, v_head_dim, num_heads
        self.weight = weight(num_heads * (nope + v_head_dim), rank)
        self._stored: tuple[Tensor, Tensor, list[int]] | None = None
        self._block = config.quantization and list(config.quantization.weight_block_size)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        if self._block is None:
            yield from super().checkpoint(name)
            return
        rows, columns = self.weight.shape
        shape = [-(-n // block) for n, block in zip((rows, columns), self._block, strict=True)]
        stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=self.weight.device)
        self._stored = stored, torch.empty(shape, dtype=torch.float32, device=self.weight.device), self._block
        yield f"{name}.weight", stored, None
        yield f"{name}.weight_scale_inv", self._stored[1], None

    def finish(self) -> None:
        if self._stored is not None:
            self.weight.data.copy_(quant.dequantize(*self._stored))
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
