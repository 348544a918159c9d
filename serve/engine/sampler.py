"""From logits to tokens and logprobs, for the sequences of one step. Only the rank that samples has one.

What no sequence of the step asks for is not computed: an all-greedy step is one maximum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wave64 import ops
from wave64.serve.engine.scheduler import Sequence
from wave64.serve.messages import TokenLogprob
from wave64.serve.model.batch import Schedule

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))  # a double just under 1 rounds to 1 in single precision


@torch.inference_mode()
def sample(logits: Tensor, step: Schedule, batch: list[Sequence], sampling: list[Sequence]) -> list[int]:
    """The next token of each of `sampling`; logprobs that were asked for are added to the sequences.

    logits    [sum(step.logits), vocab_size] float32, changed in place; a sequence that samples has its row last
    batch     the sequences of the step, in its order
    sampling  those of them that sample, in the same order
    """
    if logits.shape[0] > len(sampling):
        logits = _score_prompts(logits, step, batch)
    if not sampling:
        return []
    scored = [i for i, seq in enumerate(sampling) if seq.request.top_logprobs >= 0]
    raw = torch.log_softmax(_pick(logits, scored), dim=-1) if scored else None
    _penalise(logits, sampling)
    _forbid_early_stops(logits, sampling)
    ids = _choose(logits, sampling)
    if raw is not None:
        rows = [sampling[i] for i in scored]
        most = [seq.request.top_logprobs for seq in rows]
        for seq, entry in zip(rows, _logprobs(raw, [ids[i] for i in scored], most), strict=True):
            seq.logprobs.append(entry)
    return ids


def _choose(logits: Tensor, sampling: list[Sequence]) -> list[int]:
    if all(seq.request.params.temperature == 0 for seq in sampling):
        return logits.max(dim=-1).indices.tolist()  # the lowest index of a tie; on a CPU thrice as fast as argmax
    params = [seq.request.params for seq in sampling]
    device, vocab = logits.device, logits.shape[1]
    uniform = np.array([seq.random.random() for seq in sampling], dtype=np.float32)
    return ops.sample(
        logits,
        torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        torch.tensor([p.top_k if 0 < p.top_k < vocab else 0 for p in params], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
        torch.from_numpy(np.minimum(uniform, BELOW_ONE)).to(device),
    ).tolist()


def _penalise(logits: Tensor, sampling: list[Sequence]) -> None:
    rows = [i for i, seq in enumerate(sampling) if seq.penalised]
    if not rows:
        return
    seqs = [sampling[i] for i in rows]
    params = [seq.request.params for seq in seqs]
    picked = _pick(logits, rows)
    values = [
        torch.tensor(column, dtype=torch.float32, device=logits.device)
        for column in (
            [p.presence_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.repetition_penalty for p in params],
        )
    ]
    prompts = _padded([seq.tokens[: seq.num_prompt] for seq in seqs], logits.device)
    outputs = _padded([seq.tokens[seq.num_prompt :] for seq in seqs], logits.device)
    ops.apply_penalties(picked, prompts, outputs, *values)
    if picked is not logits:
        logits[rows] = picked


def _forbid_early_stops(logits: Tensor, sampling: list[Sequence]) -> None:
    """No stop token before min_new_tokens."""
    pairs = [
        (i, token)
        for i, seq in enumerate(sampling)
        if seq.num_generated < seq.request.params.min_new_tokens
        for token in seq.stop_ids
    ]
    if pairs:
        rows, tokens = torch.tensor(pairs, device=logits.device).T
        logits[rows, tokens] = -torch.inf


def _score_prompts(logits: Tensor, step: Schedule, batch: list[Sequence]) -> Tensor:
    """Record the prompt's logprobs in this step's logits; returns the rows that sample, if any."""
    keep, end = [], 0
    for seq, start, count, wanted in zip(batch, step.starts, step.counts, step.logits, strict=True):
        first, end = end, end + wanted
        samples = start + count == len(seq.tokens)
        if samples:
            keep.append(end - 1)
        if scored := wanted - samples:
            known = len(seq.prompt_logprobs)
            raw = torch.log_softmax(logits[first : first + scored], dim=-1)
            most = [max(seq.request.top_logprobs, 0)] * scored
            seq.prompt_logprobs += _logprobs(raw, seq.tokens[known : known + scored], most)
    return logits[keep]


def _logprobs(raw: Tensor, ids: list[int], most: list[int]) -> list[TokenLogprob]:
    """For each row of raw [N, vocab_size], the logprob of its id and of its most[i] best, best first."""
    chosen = raw.gather(1, torch.tensor(ids, device=raw.device)[:, None])[:, 0].tolist()
    values, indices = raw.topk(min(max(most), raw.shape[1]), dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(i, p, top[:k]) for i, p, top, k in zip(ids, chosen, tops, most, strict=True)]


def _pick(logits: Tensor, rows: list[int]) -> Tensor:
    """The given rows: `logits` itself when they are all of them, else a copy."""
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _padded(lists: list[list[int]], device: torch.device) -> Tensor:
    """[len(lists), longest] int64, -1 after the end of each."""
    table = np.full((len(lists), max(map(len, lists))), -1, dtype=np.int64)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(table).to(device)
