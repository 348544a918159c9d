"""The runner: turns a Schedule into a Batch, owns the KV pool, runs the model and samples. Tensors start here.

What a step needs is computed in numpy and crosses to the device at once (crossing.py). On a GPU, steps that only decode
and those with few prompt tokens replay captured graphs (graphs.py, prompt_graphs.py). Neither forward() nor sample()
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wave64 import ops
from wave64.serve.engine import sampler
from wave64.serve.engine.crossing import Crossing
from wave64.serve.engine.graphs import DecodeGraphs, batch_sizes
from wave64.serve.engine.history import History
from wave64.serve.engine.host_tier import HostTier
from wave64.serve.engine.memory import kv_cache
from wave64.serve.engine.prompt_graphs import MAX_DECODES, PromptGraphs, max_rows
from wave64.serve.engine.schedule import LAST_SAMPLED, Sampled, Sampling, Schedule
from wave64.serve.model import FAMILIES
from wave64.serve.model.batch import Batch
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.parallel import ONE, Ranks

#: A step with more prompt tokens than are captured replays a graph for its decodes, if they are so few: that reads the
#: weights twice, and launches little while the device waits. On an H200, with a prompt of 128 tokens and Llama-3.1-8B's
#: shape, 64 decodes take 16.9 ms so and 25.2 ms in one batch, and 255 take 22.9 and 20.2 ms, where one graph of both
#: takes 9.5 and 19.7 (tests/bench/engine_steps.py mixed).
SPLIT_DECODES = 128


class Runner:
    """Owns the KV pool of one rank and the page table of its running sequences, `max_running` rows."""

    def __init__(
        self, model: nn.Module, config: ModelConfig, kv_dtype: torch.dtype, device: torch.device, num_pages: int,
        page_size: int, max_running: int, capture: bool, *, ranks: Ranks = ONE, graph_sizes: Sequence[int] = (),
        prompt_tokens: int = 0, host_pages: int = 0, one_by_one: bool = False,
    ) -> None:  # fmt: skip
        """capture: decode graphs, of these sizes where some are given, and of steps with up to so many prompt tokens,
        where the model's attention reads prefixes by the page table. host_pages: of the prefix cache's host tier.
        one_by_one: every token is computed alone, so that nothing else in its step can change a bit of its logits.
        """
        self.model, self.device, self.page_size = model, device, page_size
        self._reads_prefixes = FAMILIES[config.architecture].reads_prefixes
        self.kv_cache = kv_cache(config, num_pages, page_size, kv_dtype, device, ranks)
        self._host_tier = None
        if host_pages:
            host = kv_cache(config, host_pages, page_size, kv_dtype, torch.device("cpu"), ranks, device.type == "cuda")
            self._host_tier = HostTier(self.kv_cache, host, device)
        max_pages = -(-config.context_length // page_size)
        self._page_table = np.zeros((max_running, min(max_pages, num_pages)), dtype=np.int32)
        self._table = torch.from_numpy(self._page_table)  # the same memory, or a copy on the device
        if device.type != "cpu":
            self._table = self._table.to(device)
        self._group, groups, self._world = ranks.data.rank, ranks.data.size, ranks.world
        # By row of the page table; the last is of rows that only fill a graph.
        self._last_sampled = torch.zeros(groups, max_running + 1, dtype=torch.int64, device=device)
        self._histories = [History(max_running, device) for _ in range(groups)]
        self._cross = Crossing(device)
        self._graphs = self._prompt_graphs = None
        if capture:
            width = self._page_table.shape[1]
            largest, last_sampled = batch_sizes(max_running, graph_sizes)[-1], self._last_sampled[self._group]
            decodes = min(largest, MAX_DECODES)
            captures_prompts = prompt_tokens and not self._reads_prefixes and not one_by_one and ranks.world.size == 1
            logits = None
            if groups == 1:
                rows = max(largest, max_rows(decodes, prompt_tokens) if captures_prompts else 0)
                logits = torch.zeros(rows, config.vocab_size, device=device)
            self._graphs = DecodeGraphs(model, self.kv_cache, device, max_running, width, graph_sizes, last_sampled,
                                        logits)
            if captures_prompts:
                self._prompt_graphs = PromptGraphs(model, self.kv_cache, device, decodes, width, prompt_tokens,
                                                   self._graphs.memory, logits)
        self._chosen: Tensor | None = None  # by the graph of the last forward()
        self._one_by_one, self._vocab = one_by_one, config.vocab_size
        self.max_split = SPLIT_DECODES if groups == 1 else 0

    @property
    def chooses(self) -> bool:
        """Whether forward() may choose the tokens, too."""
        return self._graphs is not None and self._graphs.chooses

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights; tied ones count once."""
        return sum(weight.nbytes for weight in self.model.parameters())

    def run(self, step: Schedule, sampling: Sampling) -> Sampled:
        """Run one step and wait for what it samples."""
        return self.sample(self.forward(step), [step], [sampling])[0].wait()

    def sample(self, logits: Tensor, steps: list[Schedule], samplings: list[Sampling]) -> list[sampler.Chosen]:
        """The tokens of a step of each attention group: chosen of the logits that forward() has returned, or by it."""
        if self._chosen is not None:
            chosen, self._chosen = self._chosen, None
            return [sampler.Chosen(samplings[0], [chosen], [])]
        rows = len(logits) // len(steps)
        return [sampler.sample(logits[i * rows : i * rows + sum(step.logits)], sampling, self._last_sampled[i],
                               self._histories[i], self._cross)
                for i, (step, sampling) in enumerate(zip(steps, samplings, strict=True))]  # fmt: skip

    @torch.inference_mode()
    def forward(self, *steps: Schedule, sampling: Sampling | None = None) -> Tensor:
        """Run the model over this rank's step, one of those of all attention groups, and return the logits,
        [sum(step.logits), vocab_size] float32; of several groups, below each other, each padded to the same length.

        They are valid until the next call. sampling: how the tokens are chosen, where that is known already; if it
        `chooses` and a graph holds the step, that is launched, too, and sample() has them.
        """
        self._chosen = None
        if self._world.size > 1 and any(LAST_SAMPLED in each.tokens for each in steps):  # rank 0 has sampled them
            groups = len(self._last_sampled)
            self._last_sampled.copy_(ops.all_gather(self._last_sampled, self._world.name)[:groups])
        if self._host_tier is not None:
            self._host_tier.copy(steps[self._group])
        if self._one_by_one:
            computed = [(self._forward(each).clone(), wanted) for each, wanted in steps[0].one_by_one()]
            return torch.cat([computed[0][0][:0], *(logits for logits, wanted in computed if wanted)])
        if (self._graphs is not None and 0 < steps[0].num_decodes < len(steps[0].rows)
                and steps[0].num_decodes <= min(self._graphs.largest, self.max_split)
                and self._graph_for(steps)[0] is None):
            return torch.cat([self._forward(each) for each in steps[0].split()])
        return self._forward(*steps, sampling=sampling)

    def _graph_for(self, steps: Sequence[Schedule]) -> tuple[DecodeGraphs | PromptGraphs | None, Any]:
        """The graphs of which one holds this step of all groups, and which of them; or none."""
        if self._graphs is None:
            return None, None
        if any(each.num_decodes < len(each.rows) for each in steps):
            size = self._prompt_graphs.size_of(steps[0]) if self._prompt_graphs is not None else None
            return (self._prompt_graphs, size) if size is not None else (None, None)
        largest = max(len(each.rows) for each in steps)
        return (self._graphs, largest) if largest <= self._graphs.largest else (None, None)

    def _forward(self, *steps: Schedule, sampling: Sampling | None = None) -> Tensor:
        """One Batch for each group; a replay where a graph holds them."""
        step = steps[self._group]
        arrays, sizes = self._inputs(step)
        graphs, size = self._graph_for(steps)
        if graphs is not None:
            if sampling is not None:
                arrays |= sampler.choice(sampling, self._vocab)
            arrays = graphs.pack(arrays, size)
        there = self._cross(arrays)
        if "cells" in there:
            self._table.view(-1)[there.pop("cells")] = there.pop("pages")
        table = self._table[:, : sizes.pop("width")][there.pop("rows")]
        replaced = None
        if "named" in there:
            replaced = there.pop("named"), self._last_sampled[self._group][there.pop("named_rows")]
        if isinstance(graphs, PromptGraphs):
            return graphs.replay(there["packed"], table, size, replaced)[: sum(step.logits)]
        if graphs is not None:
            logits = graphs.replay(there["packed"], table, size)
            if sampling is not None:
                ids = graphs.choose(size)[:size]
                self._chosen = ids if self.device.type == "cuda" else ids.clone()  # on a GPU its copy is queued
            return logits if len(steps) > 1 else logits[:size]
        fields: dict[str, Any] = {**sizes, **there}
        batch = Batch(page_table=table, num_decodes=step.num_decodes, **fields)
        if len(steps) > 1:
            batch.gathered_tokens = max(len(each.tokens) for each in steps)
            batch.gathered_logits = max(sum(each.logits) for each in steps)
        if replaced is not None:
            batch.input_ids[replaced[0]] = replaced[1]
        return self.model(batch, self.kv_cache)

    def _inputs(self, step: Schedule) -> tuple[dict[str, NDArray], dict[str, int]]:
        """The arrays of a step's Batch, with what is taken from the device itself: `rows` of the page table, after its
        `cells` have changed to `pages`, and where tokens are `named`, those that `named_rows` sampled last. And the
        Batch's numbers, with the `width` of its page table."""
        rows, starts, counts = (np.array(each, dtype=np.int64) for each in (step.rows, step.starts, step.counts))
        seq_lens = starts + counts
        arrays = self._take_pages(step) | {"rows": rows}
        if step.num_decodes == len(rows):
            positions, index = starts, rows
            logit_rows = np.arange(len(rows))
            cu_seqlens, longest = np.zeros(1, dtype=np.int32), 0
        else:
            logits, ends = np.array(step.logits), np.cumsum(counts)
            positions, index = _ranges(starts, counts), np.repeat(rows, counts)
            logit_rows = _ranges(ends - logits, logits)
            prompts = counts[step.num_decodes :]
            cu_seqlens, longest = np.append(0, np.cumsum(prompts)).astype(np.int32), int(prompts.max())
        ids = np.array(step.tokens, dtype=np.int64)
        named = np.flatnonzero(ids == LAST_SAMPLED)
        if len(named):
            arrays |= {"named": named, "named_rows": index[named]}
            ids[named] = 0  # padding rows of a later replay read what stays here: a valid id
        arrays |= {
            "input_ids": ids,
            "positions": positions,
            "slot_mapping": self._slots(index, positions),
            "seq_lens": seq_lens.astype(np.int32),
            "cu_seqlens_q": cu_seqlens,
            "logit_rows": logit_rows,
        }
        before = starts[step.num_decodes :] if self._reads_prefixes else np.zeros(1, dtype=np.int64)
        if before.any():
            whose = np.repeat(rows[step.num_decodes :], before)
            arrays["prefix_slots"] = self._slots(whose, _ranges(np.zeros_like(before), before))
            arrays["cu_seqlens_prefix"] = np.append(0, np.cumsum(before)).astype(np.int32)
        width = -(-int(seq_lens.max(initial=1)) // self.page_size)
        return arrays, dict(width=width, max_seqlen_q=longest, max_prefix=int(before.max(initial=0)))

    def _take_pages(self, step: Schedule) -> dict[str, NDArray]:
        """Write a step's pages to the page table; what its copy on the device has to change."""
        table = self._page_table
        for row, first, pages in step.pages:
            table[row, first : first + len(pages)] = pages
        if self.device.type == "cpu" or not step.pages:
            return {}
        width = table.shape[1]
        # A cell may be written twice, and would be in any order on a device.
        cells = np.unique(np.concatenate([np.arange(len(pages)) + (row * width + first)
                                          for row, first, pages in step.pages]))  # fmt: skip
        return {"cells": cells, "pages": table.reshape(-1)[cells]}

    def _slots(self, rows: NDArray, positions: NDArray) -> NDArray[np.int64]:
        """The slots of these positions, each in its row of the page table."""
        size = self.page_size
        return self._page_table[rows, positions // size].astype(np.int64) * size + positions % size


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
