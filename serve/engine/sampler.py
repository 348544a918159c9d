"""From logits to tokens and logprobs, for the sequences of one step. Only the rank that samples calls it.

What no sequence of the step asks for is not computed: an all-greedy step is one maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wave64 import ops
from wave64.serve.engine.grammar import bitmask
from wave64.serve.engine.schedule import Sampled, Sampling
from wave64.serve.messages import TokenLogprob

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))  # a double just under 1 rounds to 1 in single precision


@torch.inference_mode()
def sample(logits: Tensor, sampling: Sampling, last_sampled: Tensor) -> Sampled:
    """Choose the tokens of one step.

    logits        [sum(step.logits), vocab_size] float32, changed in place
    last_sampled  [max_running] int64 on the same device; the chosen tokens are written at `sampling.rows`
    """
    sampled = Sampled(prompt_logprobs=[
        _logprobs(torch.log_softmax(logits[run.first_row : run.first_row + len(run.ids)], dim=-1), run.ids,
                  [run.top] * len(run.ids))
        for run in sampling.scored
    ])  # fmt: skip
    if not sampling.rows:
        return sampled
    logits = _pick(logits, sampling.logit_rows)
    wanted = [i for i, top in enumerate(sampling.top_logprobs) if top >= 0]
    raw = torch.log_softmax(_pick(logits, wanted), dim=-1) if wanted else None
    _penalize(logits, sampling)
    if sampling.biases:
        rows, tokens, biases = zip(*sampling.biases, strict=True)
        logits[list(rows), list(tokens)] += _column(biases, logits)
    if sampling.grammars:  # the device may still run the model
        ops.apply_token_bitmask(logits, torch.from_numpy(bitmask(sampling, logits.shape[1])).to(logits.device))
    elif sampling.forbidden:
        rows, tokens = torch.tensor(sampling.forbidden, device=logits.device).T
        logits[rows, tokens] = -torch.inf
    ids = _choose(logits, sampling)
    last_sampled[torch.tensor(sampling.rows, device=logits.device)] = ids
    sampled.ids = ids.tolist()
    sampled.logprobs = [None] * len(sampled.ids)
    if raw is not None:
        entries = _logprobs(raw, [sampled.ids[i] for i in wanted], [sampling.top_logprobs[i] for i in wanted])
        for i, entry in zip(wanted, entries, strict=True):
            sampled.logprobs[i] = entry
    return sampled


def _choose(logits: Tensor, sampling: Sampling) -> Tensor:
    """The chosen token of each row, [S] int64."""
    if not any(sampling.temperature):
        return logits.max(dim=-1).indices  # the lowest index of a tie; on a CPU three times as fast as argmax
    vocab = logits.shape[1]
    uniform = np.minimum(np.array(sampling.uniform, dtype=np.float32), BELOW_ONE)
    return ops.sample(
        logits,
        _column(sampling.temperature, logits),
        torch.tensor([k if 0 < k < vocab else 0 for k in sampling.top_k], dtype=torch.int32, device=logits.device),
        _column(sampling.top_p, logits),
        _column(sampling.min_p, logits),
        torch.from_numpy(uniform).to(logits.device),
    )


def _penalize(logits: Tensor, sampling: Sampling) -> None:
    if not sampling.penalties:
        return
    rows, presence, frequency, repetition, prompts, outputs = zip(*sampling.penalties, strict=True)
    picked = _pick(logits, rows)
    ops.apply_penalties(
        picked, _padded(prompts, logits.device), _padded(outputs, logits.device),
        _column(presence, logits), _column(frequency, logits), _column(repetition, logits),
    )  # fmt: skip
    if picked is not logits:
        logits[list(rows)] = picked


def _logprobs(raw: Tensor, ids: list[int], top: list[int]) -> list[TokenLogprob]:
    """For each row of raw [N, vocab_size], the logprob of its id and of its top[i] best, best first."""
    chosen = raw.gather(1, torch.tensor(ids, device=raw.device)[:, None])[:, 0].tolist()
    values, indices = raw.topk(min(max(top), raw.shape[1]), dim=-1)
    best = [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(i, p, row[:k]) for i, p, row, k in zip(ids, chosen, best, top, strict=True)]


def _pick(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """The given rows, in ascending order: `logits` itself when they are all of them, else a copy."""
    return logits if len(rows) == logits.shape[0] else logits[list(rows)]


def _column(values: Sequence[float], logits: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=logits.device)


def _padded(lists: Sequence[list[int]], device: torch.device) -> Tensor:
    """[len(lists), longest] int64, -1 after the end of each."""
    table = np.full((len(lists), max(map(len, lists))), -1, dtype=np.int64)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(table).to(device)
