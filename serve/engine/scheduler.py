"""Which sequences take part in the next step, and with how many tokens. Pure Python: ints in, a Schedule out.

First come, first served. A step holds one token of every sequence that decodes, then prompt chunks up to a budget,
the oldest prompt first; a prompt that does not finish within the budget ends the step, so first tokens leave in the
order of arrival. When pages run out, the latest arrival that runs is preempted: its pages are freed and it goes back
to the head of the queue, and what it has generated is recomputed as part of its prompt.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from wave64.serve.engine.pages import PagePool
from wave64.serve.messages import Request, TokenLogprob
from wave64.serve.model.batch import Schedule

# A row of logits of a large vocabulary is half a megabyte: prompts whose logprobs are wanted go in small chunks.
PROMPT_LOGITS_PER_STEP = 128


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its tokens, how far they are in the KV pool, and where."""

    request: Request
    stop_ids: frozenset[int]  # the tokens that end it: the model's, unless ignored, and the request's
    random: random.Random  # its own stream, one number per sampled token
    tokens: list[int] = field(init=False)  # prompt and what was generated
    num_prompt: int = field(init=False)
    computed: int = 0  # tokens whose keys and values are in the pool
    row: int = -1  # of the runner's page table; -1: waiting
    pages: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of generated tokens, not sent yet
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # of tokens[:len(...)]
    finish_reason: str | None = None
    matched_stop: int | None = None

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
    def penalised(self) -> bool:
        """Whether what was seen so far changes its logits."""
        params = self.request.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)

    def append(self, token: int) -> None:
        """Take the sampled token and see whether it is the last."""
        params = self.request.params
        if params.max_new_tokens:
            self.tokens.append(token)
        if params.max_new_tokens and token in self.stop_ids:
            self.finish_reason, self.matched_stop = "stop", token
        elif self.num_generated >= params.max_new_tokens:
            self.finish_reason = "length"


class Scheduler:
    """schedule() -> (the runner runs) -> commit(tokens), again and again; add() and abort() in between.

    Every added sequence must fit into the pool alone (the engine refuses others on arrival), so the oldest one always
    goes on, and nothing waits forever.
    """

    def __init__(self, pool: PagePool, max_running: int, prefill_budget: int) -> None:
        self.pool = pool
        self.prefill_budget = prefill_budget  # prompt tokens per step
        self.waiting: deque[Sequence] = deque()  # oldest first; all arrived later than all that run
        self.running: list[Sequence] = []  # oldest first
        self.batch: list[Sequence] = []  # of the scheduled step, in its order
        self.sampling: list[Sequence] = []  # those of them that get a token by it
        self._step = Schedule()
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
        most = seq.num_prompt + seq.request.params.max_new_tokens
        if most > self.pool.num_tokens:
            raise ValueError(f"request {seq.request.rid!r}: {most} tokens do not fit a pool of {self.pool.num_tokens}")
        self._live[seq.request.rid] = seq
        self.waiting.append(seq)

    def abort(self, rid: str) -> Sequence | None:
        """Forget a request at once; None if there is none of that name."""
        seq = self._live.get(rid)
        if seq is not None:
            self._remove(seq)
        return seq

    def schedule(self) -> Schedule:
        """The next step; one without rows if there is nothing to do."""
        self._step = step = Schedule()
        self.batch, self.sampling = [], []
        self._add_decodes(step)
        self._add_prompts(step)
        return step

    def commit(self, sampled: list[int]) -> list[Sequence]:
        """Record that the scheduled step ran; `sampled` holds one token for each sequence of `self.sampling`.

        Returns those sequences; one that has a finish_reason now is already forgotten.
        """
        for seq, count in zip(self.batch, self._step.counts, strict=True):
            seq.computed += count
        for seq, token in zip(self.sampling, sampled, strict=True):
            seq.append(token)
            if seq.finish_reason is not None:
                self._remove(seq)
        return self.sampling

    def drop(self) -> list[Sequence]:
        """The scheduled step failed: forget the sequences that took part in it, and return them."""
        for seq in self.batch:
            self._remove(seq)
        return self.batch

    def _add_decodes(self, step: Schedule) -> None:
        for seq in list(self.running):
            if seq.row < 0:
                break  # preempted below, as everything younger was
            if len(seq.tokens) - seq.computed == 1 and self._grow(seq, step):
                self.batch.append(seq)
        self.sampling = list(self.batch)
        step.num_decodes = len(self.batch)
        step.rows = [seq.row for seq in self.batch]
        step.starts = [seq.computed for seq in self.batch]
        step.tokens = [seq.tokens[-1] for seq in self.batch]
        step.counts = [1] * len(self.batch)
        step.logits = [1] * len(self.batch)

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
        self.batch.append(seq)
        if samples:
            self.sampling.append(seq)

    def _grow(self, seq: Sequence, step: Schedule) -> bool:
        """Give `seq` the page that its newest token needs, preempting the youngest; False if that was `seq` itself."""
        if len(seq.tokens) <= len(seq.pages) * self.pool.page_size:
            return True
        while not self.pool.num_free:
            victim = self.running.pop()
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
