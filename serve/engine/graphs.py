"""Decode steps as captured device graphs (HIP, CUDA, or an emulated device's): one graph per batch size, replayed with
new inputs.

A decode step of a small batch is hundreds of kernels that each take less time than their launch; a replay launches
them all at once. A batch runs in the smallest graph that holds it: the rows beyond it write no key (slot -1), attend
to nothing (length 0), and their logits are cut off. Tokens that only the device has are read inside of it, and where
nothing else is wanted of the logits, a second graph behind it chooses the next ones. With data-parallel attention the
ranks of all groups replay the graph that holds the largest group's batch, since they exchange tokens inside of it.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wave64 import ops, platform
from wave64.backends import peers
from wave64.serve.engine.schedule import LAST_SAMPLED
from wave64.serve.model.batch import Batch
from wave64.serve.model.layers import KVCache

log = logging.getLogger("wave64")

NOTE_S = 5.0  # how often the log says how far capturing is
#: What changes of a decoding sequence at every step: its part of a Batch, its row of what was sampled last, and how its
#: token is chosen.
FIELDS = {"input_ids": torch.int64, "positions": torch.int64, "slot_mapping": torch.int64, "rows": torch.int64,
          "seq_lens": torch.int32, "top_k": torch.int32, "temperature": torch.float32, "top_p": torch.float32,
          "min_p": torch.float32, "uniform": torch.float32}  # fmt: skip
ROW_BYTES = sum(dtype.itemsize for dtype in FIELDS.values())
CHOICE = ("temperature", "top_k", "top_p", "min_p", "uniform")  # as ops.sample takes them


def batch_sizes(largest: int, wanted: Sequence[int] = ()) -> list[int]:
    """The sizes to capture: those `wanted` up to `largest`, or else 1, 2, 4, then multiples of 8, wider apart as they
    grow, and `largest` itself. Larger batches are launched kernel by kernel."""
    if wanted:
        return sorted({min(size, largest) for size in wanted})
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 64)]
    return [size for size in sizes if size < largest] + [largest]


def free_bytes(device: torch.device) -> int:
    """Of the device's memory; torch's own caches are not counted as free. 0 where graphs take the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def capture(run: Callable[[], Tensor], memory: Any) -> tuple[Any, Tensor]:
    """A graph of what run() launches, and its result. memory: shared with other graphs, of which none runs at the same
    time; None: its own."""
    gpu = platform.streams()
    if platform.emulated() is None:  # which executes nothing while it captures, and takes seconds for a step
        side = gpu.Stream()
        side.wait_stream(gpu.current_stream())
        with torch.inference_mode(), gpu.stream(side):
            run()  # compiles what is compiled at the first call, which a capture must not do
        gpu.current_stream().wait_stream(side)
    graph = gpu.CUDAGraph()
    with torch.inference_mode(), gpu.graph(graph, pool=memory):
        result = run()
    return graph, result


def _fields(memory: Tensor, rows: int) -> dict[str, Tensor]:
    """Of ROW_BYTES a row, the FIELDS."""
    parts = memory.split([rows * dtype.itemsize for dtype in FIELDS.values()])
    return {name: part.view(dtype) for (name, dtype), part in zip(FIELDS.items(), parts, strict=True)}


class DecodeGraphs:
    """Graphs of `model` over fixed input tensors, for batches of up to `largest` sequences of up to `max_pages` pages
    each."""

    def __init__(
        self, model: nn.Module, kv_cache: list[KVCache], device: torch.device, max_batch: int,
        max_pages: int, sizes: Sequence[int] = (), last_sampled: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        """max_batch: of what runs. sizes: of the batches that are captured; none: batch_sizes(max_batch). last_sampled:
        int64, of each row of the page table and of one more, for padding. logits: where those of every graph go, [rows,
        vocab_size] fp32, and of which other graphs choose(); None: each graph has its own."""
        self._sizes = batch_sizes(max_batch, sizes)
        self.largest = max_batch = self._sizes[-1]
        # What changes at every step lies in one piece of memory, here and on the device.
        self._there = torch.zeros(max_batch * ROW_BYTES, dtype=torch.uint8, device=device)
        self._host = np.zeros(max_batch * ROW_BYTES, dtype=np.uint8)
        self._fixed = fixed = _fields(self._there, max_batch)
        if last_sampled is None:
            last_sampled = torch.zeros(max_batch + 1, dtype=torch.int64, device=device)
        self._last_sampled, self._logits = last_sampled, logits
        self._staged = {name: field.numpy() for name, field in _fields(torch.from_numpy(self._host), max_batch).items()}
        fixed["slot_mapping"].fill_(-1)
        self._inputs = Batch(
            input_ids=fixed["input_ids"],
            positions=fixed["positions"],
            slot_mapping=fixed["slot_mapping"],
            seq_lens=fixed["seq_lens"],
            page_table=torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device),
            num_decodes=max_batch,
            cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=device),
            max_seqlen_q=0,
            logit_rows=torch.arange(max_batch, device=device),
            gathered_tokens=max_batch,
            gathered_logits=max_batch,
        )
        self.chooses = logits is not None
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._choices: dict[int, tuple[Any, Tensor]] = {}
        started = noted = time.perf_counter()
        free = free_bytes(device)
        memory: Any = None  # shared by all: only one runs at a time; the largest first, so that it sets the size
        for size in reversed(self._sizes):
            graph, logits = capture(lambda size=size: model(self._cut(size), kv_cache), memory)
            memory = graph.pool()
            self._graphs[size] = (graph, logits)
            if self.chooses:
                self._choices[size] = capture(lambda size=size, logits=logits: self._choose(logits, size), memory)
            if time.perf_counter() - noted > NOTE_S:
                noted = time.perf_counter()
                log.info("decode graphs: %d of %d batch sizes captured", len(self._graphs), len(self._sizes))
        self.memory = memory
        log.info("decode graphs: %d batch sizes up to %d, %.0f MiB in all, in %.1f s", len(self._sizes), max_batch,
                 (free - free_bytes(device)) / 2**20, time.perf_counter() - started)

    def pack(self, arrays: dict[str, NDArray], largest: int) -> dict[str, NDArray]:
        """The arrays of a batch that only decodes, its changing fields `packed` as replay() takes them. largest: the
        sequences of the attention group that has the most."""
        count, size = len(arrays["seq_lens"]), self._size(largest)
        for name, staged in self._staged.items():
            if name in arrays:
                staged[:count] = arrays[name]
        if "named" in arrays:
            self._staged["input_ids"][arrays["named"]] = LAST_SAMPLED
        self._staged["slot_mapping"][count:size] = -1
        self._staged["seq_lens"][count:size] = 0
        self._staged["temperature"][count:size] = 0
        self._staged["rows"][count:size] = len(self._last_sampled) - 1
        return {"packed": self._host} | {name: arrays[name] for name in ("rows", "cells", "pages") if name in arrays}

    def replay(self, packed: Tensor, page_table: Tensor, largest: int) -> Tensor:
        """The logits [rows of the graph, vocab_size] of a batch that only decodes, its tensors on the device, the first
        B rows its own; of several attention groups, below each other. Valid until the next.

        packed      what pack() has made
        page_table  [B, max_pages]
        largest     as for pack()
        """
        count, width = page_table.shape
        self._there.copy_(packed)
        self._inputs.page_table[:count, :width].copy_(page_table)
        size = self._size(largest)
        peers.note_replay(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def choose(self, largest: int) -> Tensor:
        """The ids [rows of the graph] chosen of the logits of the last replay(), as what pack() took says; they are
        written to last_sampled, too. Valid until the next."""
        graph, ids = self._choices[self._size(largest)]
        graph.replay()
        return ids

    def _choose(self, logits: Tensor, size: int) -> Tensor:
        ids = ops.sample(logits, *(self._fixed[name][:size] for name in CHOICE))
        self._last_sampled[self._fixed["rows"][:size]] = ids
        return ids

    def _size(self, count: int) -> int:
        """Rows of the smallest graph that holds so many."""
        return self._sizes[bisect.bisect_left(self._sizes, count)]

    def _cut(self, size: int) -> Batch:
        """The first `size` rows of the fixed inputs, with the tokens that only the device has."""
        whole, ids = self._inputs, self._inputs.input_ids[:size]
        return Batch(
            input_ids=torch.where(ids == LAST_SAMPLED, self._last_sampled[self._fixed["rows"][:size]], ids),
            positions=whole.positions[:size],
            slot_mapping=whole.slot_mapping[:size],
            page_table=whole.page_table[:size],
            seq_lens=whole.seq_lens[:size],
            num_decodes=size,
            cu_seqlens_q=whole.cu_seqlens_q,
            max_seqlen_q=0,
            logit_rows=whole.logit_rows[:size],
            gathered_tokens=size,
            gathered_logits=size,
            logits=self._logits[:size] if self._logits is not None else None,
        )
