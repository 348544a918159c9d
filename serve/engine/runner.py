"""The runner: turns a Schedule into a Batch, owns the KV pool, runs the model and samples. Tensors start here.

What a step needs is computed in numpy, on arrays that live as long as the runner where they can, and crosses to the
device as one tensor per field. On a GPU, steps that only decode replay captured graphs (graphs.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wave64.serve.engine import sampler
from wave64.serve.engine.graphs import DecodeGraphs
from wave64.serve.engine.memory import kv_cache
from wave64.serve.engine.schedule import LAST_SAMPLED, Sampled, Sampling, Schedule
from wave64.serve.model import FAMILIES
from wave64.serve.model.batch import Batch
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.parallel import ONE, Ranks


class Runner:
    """Owns the KV pool of one rank and the page table of its running sequences, `max_running` rows."""

    def __init__(
        self, model: nn.Module, config: ModelConfig, kv_dtype: torch.dtype, device: torch.device, num_pages: int,
        page_size: int, max_running: int, capture: bool, *, ranks: Ranks = ONE,
    ) -> None:  # fmt: skip
        self.model, self.device, self.page_size = model, device, page_size
        self._reads_prefixes = FAMILIES[config.architecture].reads_prefixes
        self.kv_cache = kv_cache(config, num_pages, page_size, kv_dtype, device, ranks)
        max_pages = -(-config.context_length // page_size)
        self._page_table = np.zeros((max_running, min(max_pages, num_pages)), dtype=np.int32)
        self._group, groups = ranks.data.rank, ranks.data.size
        self._last_sampled = torch.zeros(groups, max_running, dtype=torch.int64, device=device)  # by page table's row
        self._graphs = None
        if capture:
            self._graphs = DecodeGraphs(model, self.kv_cache, device, max_running, self._page_table.shape[1])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights; tied ones count once."""
        return sum(weight.nbytes for weight in self.model.parameters())

    def run(self, step: Schedule, sampling: Sampling) -> Sampled:
        """Run one step: the model, then the sampler."""
        return self.run_groups([step], [sampling])[0]

    def run_groups(self, steps: list[Schedule], samplings: list[Sampling]) -> list[Sampled]:
        """The same of a step of each attention group."""
        logits, rows = self.forward(*steps), max(sum(step.logits) for step in steps)
        return [sampler.sample(logits[i * rows : i * rows + sum(step.logits)], sampling, self._last_sampled[i])
                for i, (step, sampling) in enumerate(zip(steps, samplings, strict=True))]

    @torch.inference_mode()
    def forward(self, *steps: Schedule) -> Tensor:
        """Run the model over this rank's step, one of those of all attention groups, and return the logits,
        [sum(step.logits), vocab_size] float32; of several groups, below each other, each padded to the longest.

        They are valid until the next call.
        """
        step = steps[self._group]
        replaced = self._replaced(step)
        if self._graphs is not None and step.num_decodes == len(step.rows):
            return self._graphs.replay(self._batch(step, torch.device("cpu")), replaced)
        batch = self._batch(step, self.device)
        if len(steps) > 1:
            batch.gathered_tokens = max(len(each.tokens) for each in steps)
            batch.gathered_logits = max(sum(each.logits) for each in steps)
        if replaced is not None:
            batch.input_ids[replaced[0]] = replaced[1]
        return self.model(batch, self.kv_cache)

    def _replaced(self, step: Schedule) -> tuple[Tensor, Tensor] | None:
        """Where the step says LAST_SAMPLED, and the tokens to read there, both on the device; None if it never does."""
        if LAST_SAMPLED not in step.tokens:
            return None
        where = np.flatnonzero(np.array(step.tokens) == LAST_SAMPLED)
        rows = np.repeat(step.rows, step.counts)[where]
        tokens = self._last_sampled[self._group][torch.from_numpy(rows).to(self.device)]
        return torch.from_numpy(where).to(self.device), tokens

    def _batch(self, step: Schedule, device: torch.device) -> Batch:
        for row, first, pages in step.pages:
            self._page_table[row, first : first + len(pages)] = pages
        rows, starts, counts = (np.array(each, dtype=np.int64) for each in (step.rows, step.starts, step.counts))
        seq_lens = starts + counts
        table = self._page_table[rows, : -(-int(seq_lens.max(initial=1)) // self.page_size)]
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
            # LAST_SAMPLED is replaced on the device. Padding rows of a later replay read what stays here: a valid id.
            "input_ids": np.maximum(np.array(step.tokens, dtype=np.int64), 0),
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
        tensors: dict[str, Any] = {name: torch.from_numpy(array).to(device) for name, array in fields.items()}
        return Batch(num_decodes=step.num_decodes, max_seqlen_q=longest, max_prefix=int(before.max(initial=0)),
                     **tensors)

    def _slots(self, table: NDArray, rows: NDArray, positions: NDArray) -> NDArray[np.int64]:
        """The slots of these positions, each in its row of `table`."""
        size = self.page_size
        return table[rows, positions // size].astype(np.int64) * size + positions % size


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
