"""Decode steps as captured device graphs (HIP, CUDA, or an emulated device's): one graph per batch size, replayed with
new inputs.

A decode step of a small batch is hundreds of kernels that each take less time than their launch; a replay launches
them all at once. A batch runs in the smallest graph that holds it: the rows beyond it write no key (slot -1), attend
to nothing (length 0), and their logits are cut off.
"""

from __future__ import annotations

import bisect
import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from wave64 import platform
from wave64.serve.model.batch import Batch
from wave64.serve.model.layers import KVCache

log = logging.getLogger("wave64")


def batch_sizes(largest: int) -> list[int]:
    """The sizes to capture: 1, 2, 4, then multiples of 8, wider apart as they grow, and `largest` itself."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 64)]
    return [size for size in sizes if size < largest] + [largest]


def _fields(memory: Tensor, rows: int) -> dict[str, Tensor]:
    """Of 28 bytes a row, the fields of a decoding Batch that change at every step."""
    names = ("input_ids", "positions", "slot_mapping", "seq_lens")
    parts = memory.split([8 * rows, 8 * rows, 8 * rows, 4 * rows])
    return {name: part.view(torch.int32 if name == "seq_lens" else torch.int64)
            for name, part in zip(names, parts, strict=True)}


class DecodeGraphs:
    """Graphs of `model` over fixed input tensors, for up to `max_batch` sequences of up to `max_pages` pages each."""

    def __init__(
        self, model: nn.Module, kv_cache: list[KVCache], device: torch.device, max_batch: int,
        max_pages: int,
    ) -> None:  # fmt: skip
        # What changes at every step lies in one piece of memory, here and on the device, so that one copy brings it
        # over; the page table, which seldom changes and is large, comes in another.
        gpu, pins = platform.streams(), device.type == "cuda"
        self._host = torch.zeros(max_batch * 28, dtype=torch.uint8, pin_memory=pins)
        self._there = torch.zeros_like(self._host, device=device, pin_memory=False)
        self._copied = gpu.Event()
        self._staged, fixed = _fields(self._host, max_batch), _fields(self._there, max_batch)
        self._table = torch.zeros(0, 0, dtype=torch.int32)
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
        )
        self._sizes = batch_sizes(max_batch)
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        started = time.perf_counter()
        memory = None  # shared by all: only one of them runs at a time; the largest first, so that it sets the size
        for size in reversed(self._sizes):
            batch = self._cut(size)
            if platform.emulated() is None:  # which executes nothing while it captures, and takes seconds for a step
                side = gpu.Stream()
                side.wait_stream(gpu.current_stream())
                with torch.inference_mode(), gpu.stream(side):
                    model(batch, kv_cache)  # compiles what is compiled at the first call, which a capture must not do
                gpu.current_stream().wait_stream(side)
            graph = gpu.CUDAGraph()
            with torch.inference_mode(), gpu.graph(graph, pool=memory):
                logits = model(batch, kv_cache)
            memory = graph.pool()
            self._graphs[size] = (graph, logits)
        seconds = time.perf_counter() - started
        log.info("decode graphs: %d batch sizes up to %d in %.1f s", len(self._sizes), max_batch, seconds)

    def replay(self, batch: Batch, replaced: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The logits [B, vocab_size] of a batch that only decodes, its tensors in main memory; valid until the next.

        replaced  indices into batch.input_ids and the token ids to read there instead, both on the device
        """
        count, width = batch.page_table.shape
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        self._copied.synchronize()  # of the step before: what it reads must not change under it
        for name, staged in self._staged.items():
            staged[:count].copy_(getattr(batch, name))
        self._staged["slot_mapping"][count:size].fill_(-1)
        self._staged["seq_lens"][count:size].zero_()
        self._there.copy_(self._host, non_blocking=True)
        self._copied.record()
        if replaced is not None:
            self._inputs.input_ids[replaced[0]] = replaced[1]
        if not torch.equal(batch.page_table, self._table):
            self._inputs.page_table[:count, :width].copy_(batch.page_table)
            self._table = batch.page_table.clone()  # the caller may write to its own
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _cut(self, size: int) -> Batch:
        """The first `size` rows of the fixed inputs."""
        whole = self._inputs
        return Batch(
            input_ids=whole.input_ids[:size],
            positions=whole.positions[:size],
            slot_mapping=whole.slot_mapping[:size],
            page_table=whole.page_table[:size],
            seq_lens=whole.seq_lens[:size],
            num_decodes=size,
            cu_seqlens_q=whole.cu_seqlens_q,
            max_seqlen_q=0,
            logit_rows=whole.logit_rows[:size],
        )
