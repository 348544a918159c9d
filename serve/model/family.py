"""What the server asks of a model family; `wave64.serve.model` lists the families by architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wave64.serve.model.config import Keys, ModelConfig
from wave64.serve.model.layers import CausalLM

#: shapes of the tensors in which one layer caches tokens: (config, num_pages, page_size) -> a shape per tensor
KVShapes = Callable[[ModelConfig, int, int], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Family:
    """One model family: how its config.json is read, what it caches and how it is built.

    read_config     (architecture, keys of config.json) -> ModelConfig; raises ConfigError for a key or value that
                    changes the mathematics and is not supported
    kv_shapes       see KVShapes; each shape begins with [num_pages, page_size]
    build           config -> the model, weights uninitialized, on the default device and in the default dtype
    reads_prefixes  prefill reads the cached tokens of earlier chunks by `Batch.prefix_slots`, not by the page table
    """

    read_config: Callable[[str, Keys], ModelConfig]
    kv_shapes: KVShapes
    build: Callable[[ModelConfig], CausalLM]
    reads_prefixes: bool = False


def keys_and_values(config: ModelConfig, num_pages: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    """`kv_shapes` of attention with keys and values per KV head."""
    return ((num_pages, page_size, config.num_kv_heads, config.head_dim),) * 2
