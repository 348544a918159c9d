"""Which sequences take part in the next step, and with how many tokens. Pure Python: ints in, ints out.

First come, first served. A step holds one token of every sequence that decodes, then prompt chunks up to a budget,
the oldest prompt first; a prompt that does not finish within the budget ends the step, so first tokens leave in the
order of arrival. When pages run out, the latest arrival that runs is preempted: its pages are freed and it goes back
to the head of the queue, and what it has generated is recomputed as part of its prompt.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from wave64.serve.engine.grammar import Grammar
from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.schedule import Penalties, Sampled, Sampling, Schedule, Scored
from wave64.serve.messages import Output, Request, TokenLogprob

# A row of logits of a large vocabulary is half a megabyte: prompts whose logprobs are wanted go in small chunks.
PROMPT_LOGITS_PER_STEP = 128


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request: its tokens, and which of them have keys and values in which pages of the KV pool."""

    request: Request
    stop_ids: frozenset[int]  # the tokens that end it: the model's, unless ignored, and the request's
    random: random.Random  # its own stream, one number per sampled token
    tokens: list[int] = field(init=False)  # prompt and what was generated
    num_prompt: int = field(init=False)
    computed: int = 0  # tokens whose keys and values are in the pool
    row: int = -1  # of the runner's page table; -1: waiting
    pages: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # of tokens[:len(...)]
    grammar: Grammar | None = None  # what the answer has to be, and how far it is
    finish_reason: str | None = None
    matched_stop: int | None = None
    error: str | None = None  # the reason in words, when finish_reason is "error"

    def __post_init__(self) -> None:
        self.tokens = list(self.request.input_ids)
        self.num_prompt = len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs of prompt tokens are still to be computed."""
        return self.request.prompt_logprobs and len(self.prompt_logprobs) < self.num_prompt

    @property
    def penalized(self) -> bool:
        """Whether its tokens so far change its logits."""
        params = self.request.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)

    def append(self, token: int) -> None:
        """Take the sampled token and see whether it is the last."""
        params = self.request.params
        if params.max_new_tokens:
            self.tokens.append(token)
        if params.max_new_tokens and token in self.stop_ids:
            self.finish_reason, self.matched_stop = "stop", token
        elif self.grammar is not None and params.max_new_tokens and (wrong := self.grammar.accept(token)):
            self.finish_reason, self.error = "error", f"the answer left its grammar: {wrong}"
        elif self.grammar is not None and self.grammar.is_finished:
            self.finish_reason = "stop"
        elif self.num_generated >= params.max_new_tokens:
            self.finish_reason = "length"


class Scheduler:
    """schedule() -> (the runner runs) -> commit(sampled), again and again; add() and abort() in between.

    Every sequence fits into the pool alone (add() refuses others), so the oldest one always makes progress, and no
    sequence waits forever. Only commit() writes the results of a step to the sequences.
    """

    def __init__(self, pool: PagePool, max_running: int, prefill_budget: int) -> None:
        self.pool = pool
        self.prefill_budget = prefill_budget  # prompt tokens per step
        self.waiting: deque[Sequence] = deque()  # oldest first; all arrived later than all that run
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0  # so far
        self._step, self._sampling = Schedule(), Sampling()
        self._batch: list[Sequence] = []  # of the scheduled step, in its order
        self._sampled: list[Sequence] = []  # those of them that sample a token in it
        self._live: dict[str, Sequence] = {}
        self._free_rows = list(range(max_running - 1, -1, -1))

    def __contains__(self, rid: str) -> bool:
        return rid in self._live

    def __len__(self) -> int:
        return len(self._live)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises ValueError if its rid is taken or if it could never fit into the pool."""
        if seq.request.rid in self._live:
            raise ValueError(f"request {seq.request.rid!r} is already there; every live request needs its own rid")
        max_tokens = seq.num_prompt + seq.request.params.max_new_tokens
        if max_tokens > self.pool.num_tokens:
            pool = self.pool.num_tokens
            raise ValueError(f"request {seq.request.rid!r}: {max_tokens} tokens do not fit a pool of {pool}")
        self._live[seq.request.rid] = seq
        self.waiting.append(seq)

    def abort(self, rid: str) -> Sequence | None:
        """Forget a request at once; None if there is none of that name."""
        seq = self._live.get(rid)
        if seq is not None:
            self._remove(seq)
        return seq

    def schedule(self) -> tuple[Schedule, Sampling]:
        """The next step, and how its tokens are chosen; a step without rows if there is nothing to do."""
        self._step = step = Schedule()
        self._batch, self._sampled = [], []
        self._add_decodes(step)
        self._add_prompts(step)
        self._sampling = self._sampling_of(step)
        return step, self._sampling

    def commit(self, sampled: Sampled) -> list[Output]:
        """Write the results of the scheduled step to its sequences.

        Returns what each sequence that sampled is answered; one that has a finish_reason now is already forgotten.
        """
        for seq, count in zip(self._batch, self._step.counts, strict=True):
            seq.computed += count
        for run, entries in zip(self._sampling.scored, sampled.prompt_logprobs, strict=True):
            self._batch[run.index].prompt_logprobs += entries
        outputs = []
        for seq, token, logprob in zip(self._sampled, sampled.ids, sampled.logprobs, strict=True):
            seq.append(token)
            if seq.finish_reason is not None:
                self._remove(seq)
            outputs.append(_output(seq, logprob))
        return outputs

    def drop(self) -> list[Sequence]:
        """The scheduled step failed: forget the sequences that took part in it, and return them."""
        for seq in self._batch:
            self._remove(seq)
        return self._batch

    def _add_decodes(self, step: Schedule) -> None:
        for seq in list(self.running):
            if seq.row < 0:
                break  # preempted below, as everything younger was
            if len(seq.tokens) - seq.computed == 1 and self._grow(seq, step):
                self._batch.append(seq)
        self._sampled = list(self._batch)
        step.num_decodes = len(self._batch)
        step.rows = [seq.row for seq in self._batch]
        step.starts = [seq.computed for seq in self._batch]
        step.tokens = [seq.tokens[-1] for seq in self._batch]
        step.counts = [1] * len(self._batch)
        step.logits = [1] * len(self._batch)

    def _add_prompts(self, step: Schedule) -> None:
        budget, scored_budget = self.prefill_budget, PROMPT_LOGITS_PER_STEP
        unfinished = [seq for seq in self.running if len(seq.tokens) - seq.computed > 1]
        while budget:
            seq = unfinished.pop(0) if unfinished else self._admit(step)
            if seq is None:
                return
            count = min(len(seq.tokens) - seq.computed, budget)
            if seq.scores_prompt:
                count = min(count, scored_budget)
                scored_budget -= count
            if count:
                self._take(seq, count, step)
                budget -= count
            if seq.computed + count < len(seq.tokens):
                return  # a younger one must not overtake it

    def _take(self, seq: Sequence, count: int, step: Schedule) -> None:
        """Put the next `count` tokens of a prompt into the step; their pages are there."""
        start, end = seq.computed, seq.computed + count
        samples = end == len(seq.tokens)
        logits = int(samples)
        if seq.scores_prompt:  # the logits at p give the logprob of token p + 1
            logits += max(0, min(end, seq.num_prompt - 1) - max(start, len(seq.prompt_logprobs) - 1))
        step.rows.append(seq.row)
        step.starts.append(start)
        step.counts.append(count)
        step.logits.append(logits)
        step.tokens += seq.tokens[start:end]
        self._batch.append(seq)
        if samples:
            self._sampled.append(seq)

    def _sampling_of(self, step: Schedule) -> Sampling:
        sampling, end = Sampling(), 0
        for i, (seq, start, count, wanted) in enumerate(
            zip(self._batch, step.starts, step.counts, step.logits, strict=True)
        ):
            first, end = end, end + wanted
            samples = start + count == len(seq.tokens)
            top = seq.request.top_logprobs
            if scored := wanted - samples:
                known = len(seq.prompt_logprobs)
                sampling.scored.append(Scored(i, first, seq.tokens[known : known + scored], max(top, 0)))
            if samples:
                _add_sampling(sampling, seq, end - 1)
        return sampling

    def _grow(self, seq: Sequence, step: Schedule) -> bool:
        """Allocate the page that the newest token of `seq` needs, preempting the youngest; False if that was `seq`."""
        if len(seq.tokens) <= len(seq.pages) * self.pool.page_size:
            return True
        while not self.pool.num_free:
            victim = self.running.pop()
            self.preemptions += 1
            self._release(victim)
            victim.computed = 0
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        step.pages.append((seq.row, len(seq.pages), new := self.pool.allocate(1)))
        seq.pages += new
        return True

    def _admit(self, step: Schedule) -> Sequence | None:
        """Let the oldest waiting sequence run, with pages for all it has; None if it must wait."""
        if not self.waiting or not self._free_rows:
            return None
        seq = self.waiting[0]
        pages = self.pool.pages_for(len(seq.tokens))
        # A page is left for each that runs, else the newcomer would be preempted as soon as they grow.
        if pages + len(self.running) > self.pool.num_free:
            return None
        self.running.append(self.waiting.popleft())
        seq.row = self._free_rows.pop()
        seq.pages = self.pool.allocate(pages)
        step.pages.append((seq.row, 0, list(seq.pages)))
        return seq

    def _remove(self, seq: Sequence) -> None:
        del self._live[seq.request.rid]
        if seq.row < 0:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        """Take back its pages and its row."""
        self.pool.free(seq.pages)
        self._free_rows.append(seq.row)
        seq.pages, seq.row = [], -1


def _add_sampling(sampling: Sampling, seq: Sequence, logit_row: int) -> None:
    """Add the column of a sequence that samples from this row of the step's logits."""
    params, index = seq.request.params, len(sampling.rows)
    sampling.rows.append(seq.row)
    sampling.logit_rows.append(logit_row)
    sampling.temperature.append(params.temperature)
    sampling.top_k.append(params.top_k)
    sampling.top_p.append(params.top_p)
    sampling.min_p.append(params.min_p)
    sampling.uniform.append(seq.random.random() if params.temperature else 0.0)
    sampling.top_logprobs.append(seq.request.top_logprobs)
    if seq.penalized:
        prompt, output = seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :]
        sampling.penalties.append(Penalties(index, params.presence_penalty, params.frequency_penalty,
                                            params.repetition_penalty, prompt, output))  # fmt: skip
    if seq.grammar is not None:
        sampling.grammars.append((index, seq.grammar))
    if seq.num_generated < params.min_new_tokens:
        sampling.forbidden += [(index, token) for token in seq.stop_ids]


def _output(seq: Sequence, logprob: TokenLogprob | None) -> Output:
    """What the step gave `seq`, whose newest token has this logprob."""
    request = seq.request
    output = Output(request.rid, seq.tokens[-1:] if request.params.max_new_tokens else [], seq.finish_reason,
                    seq.matched_stop, error=seq.error)  # fmt: skip
    if request.top_logprobs >= 0:
        output.logprobs = [logprob] if output.token_ids and logprob is not None else []
    if request.prompt_logprobs and seq.num_generated <= 1:
        output.prompt_logprobs = seq.prompt_logprobs
    return output
