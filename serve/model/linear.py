"""Linear layers with plain weights, what every layer with weights is, and what stands between gated products."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wave64 import ops
from wave64.serve.model.checkpoint import Shard
from wave64.serve.model.cpu import choose_product
from wave64.serve.model.parallel import Slice

ACTIVATIONS = {"silu": ops.silu_and_mul, "gelu": ops.gelu_and_mul, "gelu_tanh": ops.gelu_tanh_and_mul}

#: (name in the checkpoint, view to fill, shard of the stored tensor), and where the view is FP8 and what is stored is
#: not, the scales to fill, a number per row
Stored = tuple[str, Tensor, Shard | None] | tuple[str, Tensor, Shard | None, Tensor]


class Quantized(NamedTuple):
    """An activation in FP8, as products take it: q [num_tokens, hidden], the architecture's FP8, and scale
    [num_tokens, hidden / group_size], fp32. dtype is that of what was quantized, and of products."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


class Layer(nn.Module):
    """A module that holds weights and knows under which names a checkpoint stores them."""

    levels = 1  # components at the end of this module's name that are not in its weights' names

    def sibling(self, name: str, part: str) -> str:
        """The name under which the checkpoint stores a part of this module, which is called `name` in the model."""
        return ".".join((*name.split(".")[: -self.levels], part))

    def checkpoint(self, name: str) -> Iterator[Stored]:
        """Yields, for each weight, its name in the checkpoint, the contiguous view to fill, and the shard of the stored
        tensor that belongs there, None for all of it.

        name  of this module within the model
        """
        for own_name, parameter in self.named_parameters(recurse=False):
            yield f"{name}.{own_name}", parameter.data, None

    def finish(self) -> None:
        """Called once, when all weights are loaded."""


def weight(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(Layer):
    """y = x @ weight.T + bias, weight [out_features, in_features]; `tied` is the weight of an Embedding to use.

    Of sliced in_features y is this rank's part of a sum over ranks, to which the first one adds the bias.
    """

    def __init__(self, in_features: int | Slice, out_features: int | Slice, bias: bool = False,
                 tied: nn.Parameter | None = None):
        super().__init__()
        self.columns, self.rows = Slice.of(in_features), Slice.of(out_features)
        self.weight = weight(self.rows.held, self.columns.size) if tied is None else tied
        self.bias = weight(self.rows.held) if bias else None
        self.is_tied, self.product = tied is not None, F.linear

    def checkpoint(self, name: str) -> Iterator[Stored]:
        for own_name, parameter in self.named_parameters(recurse=False):
            columns = self.columns.shard(1) if parameter.ndim == 2 else None
            yield f"{name}.{own_name}", parameter.data[: self.rows.size], columns or self.rows.shard(0)

    def finish(self) -> None:
        """Choose the product, and the layout of the weight that it reads fastest. A tied weight stays plain, because
        the embedding looks up its rows."""
        self.weight.data[self.rows.size :].zero_()
        self.product, self.weight = choose_product(self.weight, self.is_tied)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias if self.columns.begin == 0 else None)


class MergedLinear(Linear):
    """Several projections of the same input in one matrix product, their outputs concatenated in the last dimension;
    the checkpoint stores each under its own name.

    parts  {name in the checkpoint, instead of the last part of this module's name: out_features}, in order
    """

    def __init__(self, in_features: int, parts: Mapping[str, int | Slice], bias: bool = False):
        self.parts = {name: Slice.of(rows) for name, rows in parts.items()}
        self.widths = [rows.size for rows in self.parts.values()]
        super().__init__(in_features, sum(self.widths), bias)

    def checkpoint(self, name: str) -> Iterator[Stored]:
        for own_name, parameter in self.named_parameters(recurse=False):
            for (part, rows), view in zip(self.parts.items(), parameter.data.split(self.widths), strict=True):
                yield f"{self.sibling(name, part)}.{own_name}", view, rows.shard(0)
