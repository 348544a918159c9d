"""What the server asks of a model family; `wave64.serve.model` lists the families by architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wave64.serve.model.config import Keys, ModelConfig
from wave64.serve.model.layers import CausalLM
from wave64.serve.model.parallel import Ranks

#: shapes of the tensors in which a rank caches tokens of one layer: (config, ranks, num_pages, page_size) -> one each
KVShapes = Callable[[ModelConfig, Ranks, int, int], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Family:
    """One model family: how its config.json is read, what it caches and how it is built.

    read_config     (architecture, keys of config.json) -> ModelConfig; raises ConfigError for a key or value that
                    changes the mathematics and is not supported
    kv_shapes       see KVShapes; each shape begins with [num_pages, page_size]
    build           (config, ranks) -> the model, or the rank's part of it, weights uninitialized, on the default device
                    and in the default dtype; raises ConfigError where it cannot be split so
    reads_prefixes  prefill reads the cached tokens of earlier chunks by `Batch.prefix_slots`, not by the page table
    """

    read_config: Callable[[str, Keys], ModelConfig]
    kv_shapes: KVShapes
    build: Callable[[ModelConfig, Ranks], CausalLM]
    reads_prefixes: bool = False


def keys_and_values(config: ModelConfig, ranks: Ranks, num_pages: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    """`kv_shapes` of attention with keys and values per KV head."""
    return ((num_pages, page_size, ranks.kv_heads(config.num_kv_heads).size, config.head_dim),) * 2
