"""From logits to tokens and logprobs, for the sequences of one step. Only the rank that samples calls it.

What no sequence of the step asks for is not computed: an all-greedy step is one maximum. Nothing here waits for the
device: `sample` queues its work behind the model's, and `Chosen.wait` has the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wave64 import ops
from wave64.serve.engine.crossing import Fetched
from wave64.serve.engine.grammar import bitmask
from wave64.serve.engine.history import History
from wave64.serve.engine.schedule import Sampled, Sampling
from wave64.serve.messages import TokenLogprob

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))  # a double just under 1 rounds to 1 in single precision

Cross = Callable[[dict[str, NDArray]], dict[str, Tensor]]


class Chosen:
    """The tokens and logprobs of a step, on their way from the device."""

    def __init__(self, sampling: Sampling, ids: list[Tensor], logprobs: list[list[Tensor]]) -> None:
        """ids: one tensor, if any sequence samples. logprobs: what `_logprobs` gives, for each of sampling.scored and
        then for all that want their token's."""
        self._sampling = sampling
        self._samples, self._num_runs = bool(ids), len(sampling.scored)
        self._fetched = Fetched(ids + [tensor for run in logprobs for tensor in run])

    def wait(self) -> Sampled:
        """Wait until the device has computed them."""
        tensors = [tensor.tolist() for tensor in self._fetched.wait()]
        sampled = Sampled(tensors.pop(0) if self._samples else [])
        sampled.logprobs = [None] * len(sampled.ids)
        runs = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        for run, found in zip(self._sampling.scored, runs, strict=False):
            count = len(run.ids)
            sampled.prompt_logprobs.append(_entries(run.ids, [run.top] * count, [len(run.asked)] * count, *found))
        for found in runs[self._num_runs :]:
            wanted = _wanted(self._sampling)
            tops = [self._sampling.top_logprobs[i] for i in wanted]
            asked = [len(self._sampling.asked.get(i, ())) for i in wanted]
            entries = _entries([sampled.ids[i] for i in wanted], tops, asked, *found)
            for i, entry in zip(wanted, entries, strict=True):
                sampled.logprobs[i] = entry
        return sampled


@torch.inference_mode()
def sample(logits: Tensor, sampling: Sampling, last_sampled: Tensor, history: History, cross: Cross) -> Chosen:
    """Choose the tokens of one step.

    logits        [sum(step.logits), vocab_size] float32, changed in place
    last_sampled  [max_running] int64 on the same device; the chosen tokens are written at `sampling.rows`
    history       of the same rows; the chosen tokens of those that are penalized are appended
    cross         takes arrays to that device, all of the step's at once
    """
    arrays = _arrays(sampling, *logits.shape)
    if not arrays:
        return Chosen(sampling, [], [])
    there = cross(arrays)
    found = [_logprobs(torch.log_softmax(logits[run.first_row : run.first_row + len(run.ids)], dim=-1),
                       there[f"scored {i}"], run.top, there.get(f"asked {i}"))
             for i, run in enumerate(sampling.scored)]  # fmt: skip
    if not sampling.rows:
        return Chosen(sampling, [], found)
    if "logit_rows" in there:
        logits = logits[there["logit_rows"]]
    raw = None
    if wanted := _wanted(sampling):
        raw = torch.log_softmax(logits[there["wanted"]] if "wanted" in there else logits, dim=-1)
    _penalize(logits, sampling, there, history)
    if "biased" in there:
        rows, tokens = there["biased"]
        logits[rows, tokens] += there["biases"]
    if "bitmask" in there:
        ops.apply_token_bitmask(logits, there["bitmask"])
    elif "forbidden" in there:
        rows, tokens = there["forbidden"]
        logits[rows, tokens] = -torch.inf
    ids = _choose(logits, there)
    last_sampled[there["rows"]] = ids
    if sampling.penalties:
        longest = max(each.num_output for each in sampling.penalties)
        history.note(there["penalized_rows"], there["num_output"], ids[there["penalized"]], longest)
    if raw is not None:
        chosen = ids[there["wanted"]] if "wanted" in there else ids
        found.append(_logprobs(raw, chosen, max(sampling.top_logprobs[i] for i in wanted), there.get("asked")))
    return Chosen(sampling, [ids], found)


def _arrays(sampling: Sampling, num_logits: int, vocab: int) -> dict[str, NDArray]:
    """All that the device has to know, as far as it is asked for."""
    arrays: dict[str, NDArray] = {f"scored {i}": np.array(run.ids, dtype=np.int64)
                                  for i, run in enumerate(sampling.scored)}
    arrays |= {f"asked {i}": np.array([run.asked], dtype=np.int64) for i, run in enumerate(sampling.scored)
               if run.asked}  # fmt: skip
    if not sampling.rows:
        return arrays
    count, wanted = len(sampling.rows), _wanted(sampling)
    arrays["rows"] = np.array(sampling.rows, dtype=np.int64)
    if count < num_logits:
        arrays["logit_rows"] = np.array(sampling.logit_rows, dtype=np.int64)
    if 0 < len(wanted) < count:
        arrays["wanted"] = np.array(wanted, dtype=np.int64)
    if sampling.asked:
        arrays["asked"] = np.maximum(_padded([sampling.asked.get(i, []) for i in wanted]), 0)
    if sampling.penalties:
        index, presence, frequency, repetition, _, num_output, _ = zip(*sampling.penalties, strict=True)
        penalized = np.array(index, dtype=np.int64)
        arrays |= {"penalized": penalized, "penalized_rows": arrays["rows"][penalized],
                   "num_output": np.array(num_output, dtype=np.int64), "presence": _floats(presence),
                   "frequency": _floats(frequency), "repetition": _floats(repetition)}
        if new := [(each.index, each.num_prompt, each.ids) for each in sampling.penalties if each.ids is not None]:
            arrays |= {"new_rows": arrays["rows"][[i for i, _, _ in new]],
                       "prompts": _padded([ids[:prompt] for _, prompt, ids in new]),
                       "outputs": _padded([ids[prompt:] for _, prompt, ids in new])}
    if sampling.biases:
        arrays["biased"] = np.array([pair for *pair, _ in sampling.biases], dtype=np.int64).T.copy()
        arrays["biases"] = _floats([bias for *_, bias in sampling.biases])
    if sampling.grammars:  # a GPU still runs the model
        arrays["bitmask"] = bitmask(sampling, vocab)
    elif sampling.forbidden:
        arrays["forbidden"] = np.array(sampling.forbidden, dtype=np.int64).T.copy()
    if any(sampling.temperature):
        arrays |= choice(sampling, vocab)
    return arrays


def choice(sampling: Sampling, vocab: int) -> dict[str, NDArray]:
    """How ops.sample chooses, [S] each."""
    top_k = np.array([k if 0 < k < vocab else 0 for k in sampling.top_k], dtype=np.int32)
    return {"temperature": _floats(sampling.temperature), "top_k": top_k, "top_p": _floats(sampling.top_p),
            "min_p": _floats(sampling.min_p), "uniform": np.minimum(_floats(sampling.uniform), BELOW_ONE)}


def _choose(logits: Tensor, there: dict[str, Tensor]) -> Tensor:
    """The chosen token of each row, [S] int64."""
    if "temperature" not in there:
        if logits.is_cuda:
            return _greedy(logits)
        return logits.max(dim=-1).indices  # the lowest index of a tie; on a CPU three times as fast as argmax
    return ops.sample(logits, *(there[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform")))


def _greedy(logits: Tensor) -> Tensor:
    """The lowest index of each row's maximum, [S] int64, by the operator: torch's maximum reads a few long rows with a
    few of a GPU's compute units."""
    temperature, top_p, min_p, uniform = logits.new_zeros(4, len(logits))
    return ops.sample(logits, temperature, top_p.int(), top_p, min_p, uniform)


def _penalize(logits: Tensor, sampling: Sampling, there: dict[str, Tensor], history: History) -> None:
    if not sampling.penalties:
        return
    if "new_rows" in there:
        history.take(there["new_rows"], there["prompts"], there["outputs"])
    longest = (max(column) for column in zip(*((p.num_prompt, p.num_output) for p in sampling.penalties), strict=True))
    prompts, outputs = history.of(there["penalized_rows"], *longest)
    rows = there["penalized"]
    picked = logits if len(rows) == len(logits) else logits[rows]
    ops.apply_penalties(picked, prompts, outputs, there["presence"], there["frequency"], there["repetition"])
    if picked is not logits:
        logits[rows] = picked


def _wanted(sampling: Sampling) -> list[int]:
    """The sequences whose tokens' logprobs are wanted."""
    return [i for i, top in enumerate(sampling.top_logprobs) if top >= 0]


def _logprobs(raw: Tensor, ids: Tensor, top: int, asked: Tensor | None) -> list[Tensor]:
    """For each row of raw [N, vocab_size]: the logprob of its id [N], its `top` best logprobs and their ids [N, top],
    best first, and those of the tokens that are asked for, [N or 1, A]: [N, A], or [N, 0]."""
    values, indices = raw.topk(min(top, raw.shape[1]), dim=-1)
    others = raw[:, :0] if asked is None else raw.gather(1, asked.expand(len(raw), -1))
    return [raw.gather(1, ids[:, None])[:, 0], values, indices, others]


def _entries(ids: list[int], top: list[int], asked: list[int], chosen: list[float], values: list[list[float]],
             indices: list[list[int]], others: list[list[float]]) -> list[TokenLogprob]:  # fmt: skip
    """The same on the host; top: how many of the best each row wants; asked: of the tokens asked for."""
    return [TokenLogprob(token, logprob, list(zip(best[:k], found[:k], strict=True)), other[:a])
            for token, k, a, logprob, found, best, other
            in zip(ids, top, asked, chosen, values, indices, others, strict=True)]  # fmt: skip


def _floats(values: Sequence[float]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # to infinity, as torch.tensor() does
        return np.array(values, dtype=np.float64).astype(np.float32)


def _padded(lists: Sequence[list[int]]) -> NDArray[np.int64]:
    """[len(lists), longest] int64, -1 after the end of each."""
    table = np.full((len(lists), max(map(len, lists))), -1, dtype=np.int64)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return table
