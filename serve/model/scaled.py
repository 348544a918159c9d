"""Linear layers of FP8 checkpoints, each as its scheme says, and the scales of keys and values.

A weight's scales are kept as a number per output feature, also where it has one for all of it: projections that are
merged keep each its own, and nothing is rounded a second time. Their input is quantized once, so that of their stored
input scales the largest counts, with which no number saturates that would not with its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wave64 import ops, quant
from wave64.ops.fused_add_rms_norm_quant_fp8 import GROUP_SIZES, PER_TOKEN
from wave64.ops.silu_and_mul_per_token_group_quant_fp8 import MAX_ROW
from wave64.serve.model.config import ModelConfig, QuantConfig
from wave64.serve.model.linear import ACTIVATIONS, Layer, Linear, MergedLinear, Quantized, Stored, weight
from wave64.serve.model.parallel import Ranks, Slice
from wave64.serve.model.quantized import Fp8Linear, as_multiplied
from wave64.serve.model.schemes import CacheScheme, Scheme


def projections(config: ModelConfig, where: str, in_features: int, parts: Mapping[str, int | Slice],
                bias: bool = False) -> nn.Module:
    """y = x @ weight.T + bias of several projections of the same input, their outputs concatenated.

    where  name of the module that the checkpoint has them in, within the layer
    parts  {name there: out_features}, in order
    """
    schemes = {name: config.scheme(f"{where}.{name}") for name in parts}
    if len(set(schemes.values())) == 1:
        return _merged(config, next(iter(schemes.values())), in_features, parts, bias)
    return SideBySide([_merged(config, schemes[name], in_features, {name: rows}, bias) for name, rows in parts.items()])


def row_parallel(config: ModelConfig, ranks: Ranks, where: str, name: str, in_features: Slice, out_features: int,
                 bias: bool = False) -> nn.Module:
    """y = x @ weight.T + bias of one projection, of which this rank has some columns: its part of a sum over ranks.

    Raises ConfigError for columns that are not whole blocks of an FP8 weight.
    """
    scheme = config.scheme(f"{where}.{name}")
    if scheme is None:
        return Linear(in_features, out_features, bias)
    if scheme.block:
        ranks.on_borders(f"columns of {name}", in_features, scheme.block[1])
    return _linear(config, scheme, in_features, {name: out_features}, bias)


def head(config: ModelConfig, rows: Slice, tied: nn.Parameter | None) -> nn.Module:
    """The projection on the vocabulary; a tied one is the embedding, which is not quantized."""
    scheme = config.scheme("lm_head")
    if scheme is None or tied is not None:
        return Linear(config.hidden_size, rows, tied=tied)
    return _linear(config, scheme, config.hidden_size, {"lm_head": rows}, False)


def _merged(config: ModelConfig, scheme: Scheme | None, in_features: int, parts: Mapping[str, int | Slice],
            bias: bool) -> "MergedLinear | Fp8Linear | ScaledLinear":
    if scheme is None:
        return MergedLinear(in_features, parts, bias)
    return _linear(config, scheme, in_features, parts, bias)


def _linear(config: ModelConfig, scheme: Scheme, in_features: int | Slice, parts: Mapping[str, int | Slice],
            bias: bool) -> "Fp8Linear | ScaledLinear":
    if scheme.block:
        return Fp8Linear(in_features, parts, QuantConfig(scheme.block, scheme.ue8m0), scheme.scale_name, bias)
    assert config.schemes is not None
    return ScaledLinear(in_features, parts, scheme, bias, config.schemes.online)


def norm_groups(config: ModelConfig, where: str, names: Iterable[str]) -> int:
    """RMSNorm's group_size in front of `projections`: the groups in which the launch that makes the norm quantizes it;
    0 where they take the norm itself."""
    schemes = {config.scheme(f"{where}.{name}") for name in names}
    scheme = schemes.pop()
    if schemes or scheme is None or scheme.bound is not None:
        return 0
    if scheme.activations == "token":
        return PER_TOKEN
    size = scheme.block[1] if scheme.block else 0
    return size if size in GROUP_SIZES and not scheme.ue8m0 and config.hidden_size % size == 0 else 0


def activation(config: ModelConfig, where: str, name: str, columns: int) -> Callable[[Tensor], Tensor | Quantized]:
    """Of gate and up, [num_tokens, 2 * columns], what `row_parallel`'s projection takes of so many columns: silu's
    result in FP8, from the same launch, where it is quantized by rows or by groups of columns."""
    plain, scheme = ACTIVATIONS[config.hidden_act], config.scheme(f"{where}.{name}")
    if config.hidden_act != "silu" or scheme is None or scheme.bound is not None or scheme.activations == "static":
        return plain
    size = scheme.block[1] if scheme.block else PER_TOKEN
    if columns > MAX_ROW if size == PER_TOKEN else size > 1024 or size & (size - 1):
        return plain

    def silu_in_fp8(x: Tensor) -> Quantized:
        return Quantized(*ops.silu_and_mul_per_token_group_quant_fp8(x, size, scheme.ue8m0), x.dtype)

    return silu_in_fp8


class SideBySide(nn.Module):
    """Projections of the same input that are stored in different ways: one product each."""

    def __init__(self, layers: "Sequence[MergedLinear | Fp8Linear | ScaledLinear]"):
        super().__init__()
        for layer in layers:
            layer.levels = 3  # down from this module's name
        self.layers = nn.ModuleList(layers)
        self.widths = [width for layer in layers for width in layer.widths]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


class ScaledLinear(Layer):
    """y = x @ weight.T + bias of one or several projections side by side, weights in FP8 with a scale per output
    feature. fp32 accumulation; the result has the dtype of x.

    online  the stored weights are plain: they are quantized while they are loaded
    """

    def __init__(self, in_features: int | Slice, parts: Mapping[str, int | Slice], scheme: Scheme, bias: bool = False,
                 online: bool = False):
        super().__init__()
        self.scheme, self.online, self.columns = scheme, online, Slice.of(in_features)
        self.parts = {name: Slice.of(rows) for name, rows in parts.items()}
        self.widths = [rows.size for rows in self.parts.values()]
        held = sum(rows.held for rows in self.parts.values())
        self.weight = weight(held, self.columns.size, dtype=torch.float8_e4m3fn)
        self.weight_scale = weight(held, dtype=torch.float32)
        self.input_scale = weight(1, dtype=torch.float32) if scheme.activations == "static" else None
        self.bias = weight(held) if bias else None
        self._of_tensors: list[tuple[Tensor, Tensor]] = []
        self._of_inputs: list[Tensor] = []

    def checkpoint(self, name: str) -> Iterator[Stored]:
        first = 0
        for part, rows in self.parts.items():
            stored, end = self.sibling(name, part), first + rows.size
            view, scale = self.weight.data[first:end], self.weight_scale.data[first:end]
            shard = self.columns.shard(1) or rows.shard(0)
            if self.online:
                yield f"{stored}.weight", view, shard, scale
            else:
                yield f"{stored}.weight", view, shard
                yield f"{stored}.{self.scheme.scale_name}", *self._scales(scale, rows)
            if self.input_scale is not None:
                self._of_inputs.append(torch.empty_like(self.input_scale.data))
                yield f"{stored}.input_scale", self._of_inputs[-1], None
            if self.bias is not None:
                yield f"{stored}.bias", self.bias.data[first:end], rows.shard(0)
            first = end

    def _scales(self, scale: Tensor, rows: Slice) -> tuple:
        """What to fill with the stored scales of one projection, and their shard."""
        if self.scheme.weight == "channel":
            return scale, rows.shard(0)
        one = torch.empty_like(scale[:1])
        self._of_tensors.append((one, scale))
        return one, None

    def finish(self) -> None:
        for one, scale in self._of_tensors:
            scale.copy_(one.expand_as(scale))
        if self.input_scale is not None and self._of_inputs:
            self.input_scale.data.copy_(torch.cat(self._of_inputs).amax(0, keepdim=True))
        self._of_tensors.clear()
        self._of_inputs.clear()
        size = sum(self.widths)
        self.weight.data[size:].view(torch.uint8).zero_()
        self.weight_scale.data[size:].fill_(1.0)
        if self.input_scale is not None and quant.fp8_dtype() != self.weight.dtype:
            self.input_scale.data.mul_(2)
        self.weight = as_multiplied(self.weight, self.weight_scale)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x may be quantized already, with a scale per token."""
        if not isinstance(x, Quantized):
            x = self._quantized(x)
        bias = self.bias if self.columns.begin == 0 else None
        return ops.fp8_scaled_mm(x.q, self.weight, x.scale, self.weight_scale, x.dtype, bias)

    def _quantized(self, x: Tensor) -> Quantized:
        if self.scheme.bound is not None:
            x = x.clamp(-self.scheme.bound, self.scheme.bound)
        if self.input_scale is not None:
            return Quantized(*ops.per_tensor_quant_fp8(x, self.input_scale), x.dtype)
        return Quantized(*ops.per_token_quant_fp8(x), x.dtype)


class CacheScales(Layer):
    """The scales of cached keys and values, a number each, or each one per head: stored = key / k_scale.

    heads  the KV heads that this rank holds
    """

    def __init__(self, scheme: CacheScheme, heads: Slice):
        super().__init__()
        self.names, self.heads = (scheme.k_scale, scheme.v_scale), heads if scheme.per_head else Slice.of(1)
        self.k_scale, self.v_scale = (weight(self.heads.size, dtype=torch.float32) for _ in self.names)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        layer = name.rsplit(".", 2)[0]
        for stored, scale in zip(self.names, (self.k_scale, self.v_scale), strict=True):
            yield f"{layer}.{stored}", scale.data, self.heads.shard(0)

    def finish(self) -> None:
        if quant.fp8_dtype() == torch.float8_e4m3fnuz:
            for scale in (self.k_scale, self.v_scale):
                scale.data.copy_(quant.fn_to_fnuz_kv_scale(scale.data))

    def of(self, cache: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(k_scale, v_scale) as kernels take them: caches in other dtypes than FP8 have none."""
        return (self.k_scale, self.v_scale) if cache.dtype in quant.FP8.values() else (None, None)


class LatentScale(CacheScales):
    """The scale of cached latents, which are keys and values at once: the larger of the two that are stored, with which
    no number saturates that would not with its own."""

    def __init__(self):
        super().__init__(CacheScheme("self_attn.k_scale", "self_attn.v_scale"), Slice.of(1))

    def finish(self) -> None:
        super().finish()
        self.k_scale.data.copy_(torch.maximum(self.k_scale.data, self.v_scale.data))
