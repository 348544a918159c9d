"""The runner: turns a Schedule into a Batch, keeps the KV pool, and runs the model. Tensors start here.

What a step needs is computed in numpy, on arrays that live as long as the runner where they can, and crosses to the
device as one tensor per field. On a GPU, steps that only decode replay captured graphs (graphs.py).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wave64.serve.engine.graphs import DecodeGraphs
from wave64.serve.engine.memory import kv_cache
from wave64.serve.model import FAMILIES
from wave64.serve.model.batch import Batch, Schedule
from wave64.serve.model.config import ModelConfig


class Runner:
    """Owns the KV pool of one rank and the page table of its running sequences, `max_running` rows."""

    def __init__(
        self, model: nn.Module, config: ModelConfig, kv_dtype: torch.dtype, device: torch.device, num_pages: int,
        page_size: int, max_running: int, capture: bool,
    ) -> None:  # fmt: skip
        self.model, self.device, self.page_size = model, device, page_size
        self._reads_prefixes = FAMILIES[config.architecture].reads_prefixes
        self.kv_cache = kv_cache(config, num_pages, page_size, kv_dtype, device)
        max_pages = -(-config.context_length // page_size)
        self._page_table = np.zeros((max_running, min(max_pages, num_pages)), dtype=np.int32)
        self._graphs = None
        if capture:
            self._graphs = DecodeGraphs(model, self.kv_cache, device, max_running, self._page_table.shape[1])

    @property
    def weight_bytes(self) -> int:
        """What the model's weights take; shared ones count once."""
        return sum(weight.nbytes for weight in self.model.parameters())

    @torch.inference_mode()
    def run(self, step: Schedule) -> Tensor:
        """Run the model over the step and return the wanted logits, [sum(step.logits), vocab_size] float32.

        They are valid until the next call.
        """
        if self._graphs is not None and step.num_decodes == len(step.rows):
            return self._graphs.replay(self._batch(step, torch.device("cpu")))
        return self.model(self._batch(step, self.device), self.kv_cache)

    def _batch(self, step: Schedule, device: torch.device) -> Batch:
        for row, first, pages in step.pages:
            self._page_table[row, first : first + len(pages)] = pages
        rows, starts, counts = np.array(step.rows), np.array(step.starts), np.array(step.counts)
        seq_lens = starts + counts
        table = self._page_table[rows, : -(-int(seq_lens.max()) // self.page_size)]
        if step.num_decodes == len(rows):
            positions, index = starts, np.arange(len(rows))
            logit_rows = index
            cu_seqlens, longest = np.zeros(1, dtype=np.int32), 0
        else:
            logits, ends = np.array(step.logits), np.cumsum(counts)
            positions, index = _ranges(starts, counts), np.repeat(np.arange(len(rows)), counts)
            logit_rows = _ranges(ends - logits, logits)
            prompts = counts[step.num_decodes :]
            cu_seqlens, longest = np.append(0, np.cumsum(prompts)).astype(np.int32), int(prompts.max())
        fields = {
            "input_ids": np.array(step.tokens),
            "positions": positions,
            "slot_mapping": self._slots(table, index, positions),
            "page_table": table,
            "seq_lens": seq_lens.astype(np.int32),
            "cu_seqlens_q": cu_seqlens,
            "logit_rows": logit_rows,
        }
        before = starts[step.num_decodes :] if self._reads_prefixes else np.zeros(1, dtype=np.int64)
        if before.any():
            earlier = _ranges(np.zeros_like(before), before)
            whose = np.repeat(np.arange(step.num_decodes, len(rows)), before)
            fields["prefix_slots"] = self._slots(table, whose, earlier)
            fields["cu_seqlens_prefix"] = np.append(0, np.cumsum(before)).astype(np.int32)
        tensors = {name: torch.from_numpy(array).to(device) for name, array in fields.items()}
        return Batch(num_decodes=step.num_decodes, max_seqlen_q=longest, max_prefix=int(before.max(initial=0)),
                     **tensors)

    def _slots(self, table: NDArray, rows: NDArray, positions: NDArray) -> NDArray[np.int64]:
        """Where in the pool the positions of `rows` of the page table lie."""
        size = self.page_size
        return table[rows, positions // size].astype(np.int64) * size + positions % size


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
