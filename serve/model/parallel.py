"""How a model is split over ranks: which slice of each dimension one rank holds, and where slices meet.

Heads, the MLPs' intermediate features and the vocabulary are split; what follows a split dimension is a sum over the
ranks (Shoeybi et al. 2019, Megatron-LM). Experts are split by number, by intermediate features, or both. With
data-parallel attention the ranks form groups that attend to sequences of their own, and meet at the MLPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wave64.distributed import ALONE, Group
from wave64.ops import (
    all_gather,
    all_reduce,
    fused_add_rms_norm,
    fused_all_reduce_rms_norm,
    fused_all_reduce_rms_norm_quant_fp8,
    reduce_scatter,
)
from wave64.ops.all_reduce import is_quantized
from wave64.serve.model.checkpoint import Shard
from wave64.serve.model.config import ConfigError


@dataclass(frozen=True)
class Slice:
    """Elements [begin, end) of a dimension that has `whole` of them, with padding behind them up to `padded`."""

    begin: int
    end: int
    whole: int
    padded: int = 0

    @classmethod
    def of(cls, size: int | Slice) -> Slice:
        """A size stands for all of a dimension."""
        return cls(0, size, size) if isinstance(size, int) else size

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return self.end - self.begin

    @property
    def held(self) -> int:
        """Elements in memory."""
        return max(self.size, self.padded)

    def times(self, width: int) -> Slice:
        """The same slice of a dimension that has `width` elements in place of each."""
        return Slice(self.begin * width, self.end * width, self.whole * width)

    def shard(self, dim: int) -> Shard | None:
        """What to read of a stored tensor whose dimension `dim` this is."""
        return None if self.size == self.whole else Shard(dim, self.begin, self.end)


@dataclass(frozen=True)
class Ranks:
    """Where one rank stands among those that hold a model together. The default is a rank alone.

    world      all of them
    attention  those that attend to the same sequences, with some heads each; all, without data-parallel attention
    data       with data-parallel attention, one rank of each of those groups
    ep_size    parts of the set of experts; the ranks of one part split its experts' intermediate features
    quantize   what large sums are sent as (all_reduce)
    """

    world: Group = ALONE
    attention: Group = ALONE
    data: Group = ALONE
    ep_size: int = 1
    quantize: str = "none"

    def query_heads(self, count: int) -> Slice:
        """This rank's of `count` heads. Raises ConfigError if ranks do not divide them."""
        size = self.attention.size
        if count % size:
            raise self._refused("num_attention_heads", count, [n for n in range(1, count + 1) if count % n == 0])
        return _even(count, self.attention)

    def kv_heads(self, count: int) -> Slice:
        """This rank's of `count` KV heads; if ranks are more, several hold the same one. Raises ConfigError where
        neither divides the other."""
        size, rank = self.attention.size, self.attention.rank
        if count % size and size % count:
            fit = [n for n in range(1, max(count, size)) if count % n == 0 or n % count == 0]
            raise self._refused("num_key_value_heads", count, sorted({*fit, count}))
        if size <= count:
            return _even(count, self.attention)
        first = rank * count // size
        return Slice(first, first + 1, count)

    def vocabulary(self, count: int) -> Slice:
        """This rank's of `count` tokens, padded to the same number on every rank."""
        each = -(-count // self.world.size)
        begin, end = (min(n * each, count) for n in (self.world.rank, self.world.rank + 1))
        return Slice(begin, end, count, each)

    def features(self, count: int, block: int = 1) -> Slice:
        """This rank's of an MLP's intermediate features, in whole blocks. Raises ConfigError for fewer than ranks."""
        return self._blocks("intermediate_size", count, block, self.world)

    def shared_features(self, count: int, block: int = 1) -> Slice:
        """As `features`, of a shared expert, which the ranks of an attention group apply to their own tokens."""
        return self._blocks("moe_intermediate_size of shared experts", count, block, self.attention)

    def expert_features(self, count: int, block: int = 1) -> Slice:
        """As `features`, of an expert that this rank holds a part of."""
        size = self.world.size // self.ep_size
        return self._blocks("moe_intermediate_size", count, block, Group("", self.world.rank % size, size))

    def experts(self, count: int) -> Slice:
        """The experts that this rank holds, or holds a part of. Raises ConfigError for fewer than parts."""
        if count < self.ep_size:
            raise ConfigError(f"--ep-size: expected at most {count}, the number of experts, got {self.ep_size}")
        size = self.world.size // self.ep_size
        return _even(count, Group("", self.world.rank // size, self.ep_size))

    def on_borders(self, name: str, columns: Slice, block: int) -> Slice:
        """`columns`, if they begin and end at borders of FP8 blocks. Raises ConfigError otherwise: activations are
        quantized by such blocks."""
        if columns.begin % block or columns.end % block and columns.end != columns.whole:
            units = -(-columns.whole // block)
            fit = [n for n in range(1, units + 1) if columns.whole % n == 0 and columns.whole // n % block == 0]
            raise self._refused(f"{name} in blocks of {block}", columns.whole, fit or [1])
        return columns

    def sum_attention(self, x: Tensor) -> Tensor:
        """Adds up what the ranks of an attention group have computed of the same tokens."""
        return x if self.attention.size == 1 else all_reduce(x, self.attention.name, self.quantize)

    def sums_exactly(self, x: Tensor) -> bool:
        """Whether ranks send x itself, and no codes."""
        return not is_quantized(x, self.quantize)

    def norm_of_sum(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds up as `sum_attention`, adds that to the residual stream, in place, and returns the norm of the sum."""
        if self.sums_exactly(x):
            return fused_all_reduce_rms_norm(x, residual, weight, eps, self.attention.name)
        x = self.sum_attention(x)
        fused_add_rms_norm(x, residual, weight, eps)
        return x

    def quantized_norm_of_sum(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float,
                              group_size: int) -> tuple[Tensor, Tensor]:
        """As `norm_of_sum`, where ranks send no codes; returns the norm in FP8, with a scale for each group."""
        return fused_all_reduce_rms_norm_quant_fp8(x, residual, weight, eps, group_size, self.attention.name)

    def gather(self, x: Tensor, rows: int) -> Tensor:
        """x [num_tokens, ...] of each attention group, padded with zeros to `rows`, below each other; x itself if there
        is one group."""
        if self.data.size == 1:
            return x
        if x.shape[0] < rows:
            x, short = x.new_zeros(rows, *x.shape[1:]), x
            x[: short.shape[0]] = short
        return all_gather(x, self.data.name)

    def own(self, gathered: Tensor) -> Tensor:
        """This rank's rows of what `gather` returned, a view."""
        return gathered if self.data.size == 1 else gathered.chunk(self.data.size)[self.data.rank]

    def sum_mlp(self, x: Tensor, num_tokens: int) -> Tensor:
        """Adds up what all ranks have computed of the tokens of all; returns the first rows of this rank's."""
        if self.data.size > 1:
            x = reduce_scatter(x, self.data.name)
        return self.sum_attention(x)[:num_tokens]

    def whole_vocabulary(self, logits: Tensor, count: int) -> Tensor:
        """Logits [R, slice of the vocabulary] of all ranks -> [R, count]"""
        if self.world.size == 1:
            return logits
        parts = all_gather(logits, self.world.name).unflatten(0, (self.world.size, -1))
        return parts.transpose(0, 1).flatten(1)[:, :count]

    def _blocks(self, name: str, count: int, block: int, group: Group) -> Slice:
        units = -(-count // block)
        if units < group.size:
            what = name if block == 1 else f"{name} in blocks of {block}"
            raise self._refused(what, count, list(range(1, units + 1)), group.size)
        begin, end = _even(units, group).begin * block, _even(units, group).end * block
        return Slice(begin, min(end, count), count)

    def _refused(self, what: str, count: int, fit: list[int], size: int | None = None) -> ConfigError:
        flags = "--tp-size" if self.data.size == 1 else "--tp-size divided by --dp-size"
        if size is not None and self.ep_size > 1:
            flags = "--tp-size divided by --ep-size"
        return ConfigError(f"{flags}: {what}, {count}, can be split over {', '.join(map(str, fit))} ranks, got "
                           f"{size or self.attention.size}")


ONE = Ranks()


def _even(count: int, group: Group) -> Slice:
    """Nearly equal slices, the same where the group divides `count`."""
    return Slice(count * group.rank // group.size, count * (group.rank + 1) // group.size, count)
