"""Steps with prompts as captured device graphs: one for each pair of a number of decodes and a number of prompt tokens.

The weights are read once for both, and few tokens take less time than their kernels' launches. A step runs in the
smallest graph that holds it: decodes first, padded as in graphs.py, then the prompts' tokens, and behind them those of
one more sequence, which pads: they write no key (slot -1) and attend to nothing (length 0).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wave64.backends import peers
from wave64.serve.engine.graphs import capture, free_bytes
from wave64.serve.engine.schedule import Schedule
from wave64.serve.model.batch import Batch
from wave64.serve.model.layers import KVCache

log = logging.getLogger("wave64")

DECODES = (0, 16, 64, 128, 192, 256)  # few graphs, and few rows that pad
MAX_DECODES = DECODES[-1]  # where more decode, products take longer than their launches
MIN_TOKENS = 64
TOKENS_PER_PROMPT = 16  # at least so many on average, else a larger graph holds them: each costs attention a block
Size = tuple[int, int]  # decodes, prompt tokens


def sizes(max_decodes: int, max_tokens: int) -> list[Size]:
    """Of the graphs to capture for steps of up to so many decodes and prompt tokens."""
    decodes = [count for count in DECODES if count < max_decodes] + [max_decodes]
    tokens = [max_tokens]
    while tokens[0] >= 2 * MIN_TOKENS:
        tokens.insert(0, tokens[0] // 2)
    return [(count, length) for length in tokens for count in decodes]


def max_rows(max_decodes: int, max_tokens: int) -> int:
    """Of logits, at most, of such graphs."""
    return max_decodes + _prompts((max_decodes, max_tokens))


def _prompts(size: Size) -> int:
    """How many prompts a graph holds."""
    return max(1, size[1] // TOKENS_PER_PROMPT)


class PromptGraphs:
    """Graphs of `model` over fixed input tensors, for steps of up to `max_decodes` decodes and `max_tokens` prompt
    tokens, of sequences of up to `max_pages` pages each."""

    def __init__(self, model: nn.Module, kv_cache: list[KVCache], device: torch.device, max_decodes: int,
                 max_pages: int, max_tokens: int, memory: Any = None,
                 logits: Tensor | None = None) -> None:  # fmt: skip
        """memory: of graphs of which none runs at the same time. logits: as for DecodeGraphs."""
        self._sizes = sizes(max_decodes, max_tokens)
        self._logits, largest = logits, self._sizes[-1]
        self._there = torch.zeros(_bytes(largest), dtype=torch.uint8, device=device)
        self._host = np.zeros(_bytes(largest), dtype=np.uint8)
        here = torch.from_numpy(self._host)
        self._staged = {size: {name: field.numpy() for name, field in _fields(here, size).items()}
                        for size in self._sizes}  # fmt: skip
        self._inputs = {size: _fields(self._there, size) for size in self._sizes}
        rows = max_decodes + _prompts(largest) + 1
        self._page_table = torch.zeros(rows, max_pages, dtype=torch.int32, device=device)
        self._graphs: dict[Size, tuple[Any, Tensor]] = {}
        started, free = time.perf_counter(), free_bytes(device)
        for size in reversed(self._sizes):
            self._pad(size)
            self._there.copy_(here)
            graph, logits = capture(lambda size=size: model(self._batch(size), kv_cache), memory)
            memory = graph.pool()
            self._graphs[size] = (graph, logits)
        log.info("prompt graphs: %d, up to %d prompt tokens next to %d decodes, %.0f MiB in all, in %.1f s",
                 len(self._sizes), max_tokens, max_decodes, (free - free_bytes(device)) / 2**20,
                 time.perf_counter() - started)  # fmt: skip

    def size_of(self, step: Schedule) -> Size | None:
        """Of the smallest graph that holds a step with prompts; None if no graph does."""
        decodes, prompts = step.num_decodes, len(step.rows) - step.num_decodes
        if max(step.logits[decodes:]) > 1:
            return None
        wanted = max(len(step.tokens) - decodes, prompts * TOKENS_PER_PROMPT)
        fitting = [size for size in self._sizes if size[0] >= decodes and size[1] >= wanted]
        return min(fitting, key=sum, default=None)

    def pack(self, arrays: dict[str, NDArray], size: Size) -> dict[str, NDArray]:
        """The arrays of a step that a graph of this size holds: its changing fields `packed` as replay() takes them,
        and the `rows` of the page table, padded."""
        count, staged = size[0], self._staged[size]
        prompts = len(arrays["cu_seqlens_q"]) - 1
        decodes, tokens = len(arrays["rows"]) - prompts, int(arrays["cu_seqlens_q"][-1])
        self._pad(size)
        for name in ("input_ids", "positions", "slot_mapping"):
            staged[name][:decodes] = arrays[name][:decodes]
            staged[name][count : count + tokens] = arrays[name][decodes:]
        rows = np.zeros(len(staged["seq_lens"]), dtype=np.int64)
        for padded, given in ((staged["seq_lens"], arrays["seq_lens"]), (rows, arrays["rows"])):
            padded[:decodes] = given[:decodes]
            padded[count : count + prompts] = given[decodes:]
        staged["cu_seqlens_q"][: prompts + 1] = arrays["cu_seqlens_q"]
        gap = count - decodes  # between decodes and prompts
        logit_rows = arrays["logit_rows"]
        staged["logit_rows"][: len(logit_rows)] = logit_rows + gap * (logit_rows >= decodes)
        packed = {"packed": self._host[: _bytes(size)], "rows": rows}
        if "named" in arrays:
            packed["named"] = arrays["named"] + gap * (arrays["named"] >= decodes)
        return packed | {name: arrays[name] for name in ("cells", "pages", "named_rows") if name in arrays}

    def replay(self, packed: Tensor, page_table: Tensor, size: Size,
               replaced: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The logits [rows of the graph, vocab_size] of a step, its tensors on the device, first those that are wanted
        of it. Valid until the next.

        packed      what pack() has made
        page_table  [rows of pack(), any width]
        replaced    indices into input_ids and the token ids to read there instead
        """
        self._there[: len(packed)].copy_(packed)
        if replaced is not None:
            self._inputs[size]["input_ids"][replaced[0]] = replaced[1]
        self._page_table[: len(page_table), : page_table.shape[1]].copy_(page_table)
        decodes, tokens = size
        peers.note_replay(decodes + tokens)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def _pad(self, size: Size) -> None:
        """Stage a step without sequences."""
        self._host[:] = 0
        staged = self._staged[size]
        staged["slot_mapping"][:] = -1
        staged["cu_seqlens_q"][1:] = size[1]

    def _batch(self, size: Size) -> Batch:
        decodes, tokens = size
        fields: dict[str, Any] = {**self._inputs[size]}
        logits = None if self._logits is None else self._logits[: len(fields["logit_rows"])]
        return Batch(**fields, page_table=self._page_table[: len(fields["seq_lens"])], num_decodes=decodes,
                     max_seqlen_q=tokens, logits=logits)  # fmt: skip


def _fields(memory: Tensor, size: Size) -> dict[str, Tensor]:
    """The fields of a Batch that change at every step, one behind the other in `memory`."""
    found, end = {}, 0
    for name, count in _lengths(size).items():
        dtype = torch.int32 if name in ("seq_lens", "cu_seqlens_q") else torch.int64
        found[name] = memory[end : end + count * dtype.itemsize].view(dtype)
        end += count * dtype.itemsize
    return found


def _lengths(size: Size) -> dict[str, int]:
    """Of the fields; those of 8 bytes first."""
    (decodes, tokens), prompts = size, _prompts(size)
    return {"input_ids": decodes + tokens, "positions": decodes + tokens, "slot_mapping": decodes + tokens,
            "logit_rows": decodes + prompts, "seq_lens": decodes + prompts + 1, "cu_seqlens_q": prompts + 2}


def _bytes(size: Size) -> int:
    lengths = _lengths(size)
    return sum(lengths.values()) * 8 - 4 * (lengths["seq_lens"] + lengths["cu_seqlens_q"])
