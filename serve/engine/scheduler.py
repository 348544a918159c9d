"""Which sequences take part in the next step, and with how many tokens. Pure Python: ints in, ints out.

A step holds one token of every sequence that decodes, then prompt chunks up to a budget, the oldest prompt first; a
prompt that does not finish within the budget ends the step. Waiting sequences are let in first come, first served, or
by how much of them the prefix cache has. When pages run out, the latest arrival that runs is preempted: it waits again,
and what the prefix cache has not kept of its pages is recomputed, what it has generated as part of its prompt.

Up to two steps may be on their way: the one that runs and the one scheduled behind it. What the first samples is not
known yet when the second is scheduled; `Sequence.pending` counts it.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.prefix_cache import Node, PrefixCache
from wave64.serve.engine.schedule import LAST_SAMPLED, Sampled, Sampling, Schedule, Scored
from wave64.serve.engine.sequence import Sequence, add_sampling, output_of
from wave64.serve.messages import Output

# A row of logits of a large vocabulary is half a megabyte: prompts whose logprobs are wanted go in small chunks.
PROMPT_LOGITS_PER_STEP = 128
LPM_WINDOW = 128  # so many of the oldest that wait are looked at for what the prefix cache has of them,
MAX_OVERTAKES = 64  # and so many younger ones are let in before the oldest
# By how many requests a group may exceed the one that has the fewest, to take one whose prefix it has: by so many,
MIN_IMBALANCE = 4
RELATIVE_IMBALANCE = 0.125  # or by this part of the other's


@dataclass(slots=True)
class _Step:
    """A step on its way: the sequences that take part, in its order, and how their tokens are chosen."""

    schedule: Schedule = field(default_factory=Schedule)
    batch: list[Sequence] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    sampled: list[Sequence] = field(default_factory=list)  # in the order of `sampling`
    arriving: list[Node] = field(default_factory=list)  # what it loads from the host tier,
    loading: list[Sequence] = field(default_factory=list)  # and who has that among its pages
    stored: list[Node] = field(default_factory=list)  # what it stores there


class Scheduler:
    """schedule() -> the runner computes logits -> sampling() -> the runner samples -> commit(sampled), for one step
    after another; schedule() may be called for the next one before this one's commit(), and add() and abort() at any
    time.

    Every sequence fits into the pool alone (add() refuses others), so the oldest one always makes progress once it
    runs; while it waits, at most MAX_OVERTAKES others are let in before it. So no sequence waits forever. Only commit()
    writes the results of a step to the sequences.
    """

    def __init__(self, pool: PagePool, max_running: int, prefill_budget: int, *, policy: str = "fcfs",
                 reuse_prefixes: bool = True, host_pool: PagePool | None = None) -> None:  # fmt: skip
        """policy: "fcfs", or "lpm": the longest prefix match goes first. host_pool: of the prefix cache's host tier."""
        self.pool = pool
        self.cache = PrefixCache(pool, reuse_prefixes, host_pool)
        self.prefill_budget = prefill_budget  # prompt tokens per step
        self.waiting: deque[Sequence] = deque()  # oldest first
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = self.cached_tokens = 0  # so far
        self._policy = policy
        self._arrivals = 0
        self._overtakes = 0  # sequences let in before the oldest that waits, since the last time that it was let in
        self._steps: deque[_Step] = deque()  # on their way, oldest first
        self._moved: list[tuple[int, int, list[int]]] = []  # entries of page tables for the next step to change
        self._live: dict[str, Sequence] = {}
        self._free_rows = list(range(max_running - 1, -1, -1))

    def __contains__(self, rid: str) -> bool:
        return rid in self._live

    def __len__(self) -> int:
        return len(self._live)

    def cached_pages(self, seq: Sequence) -> int:
        """How many of its first pages the prefix cache has, of the host tier or not."""
        path: list[Node] = []
        self.cache.match(path, seq.tokens, seq.reusable)
        return len(path) + len(self.cache.hosted(path, seq.tokens, seq.reusable))

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises ValueError if its rid is taken or if it could never fit into the pool."""
        if seq.request.rid in self._live:
            raise ValueError(f"request {seq.request.rid!r} is already there; every live request needs its own rid")
        max_tokens = seq.num_prompt + seq.request.params.max_new_tokens
        if max_tokens > self.pool.num_tokens:
            pool = self.pool.num_tokens
            raise ValueError(f"request {seq.request.rid!r}: {max_tokens} tokens do not fit a pool of {pool}")
        self._live[seq.request.rid] = seq
        seq.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(seq)

    def abort(self, rid: str) -> Sequence | None:
        """Forget a request at once; None if no live one has that name."""
        seq = self._live.get(rid)
        if seq is not None:
            seq.finish_reason = "abort"
            self._remove(seq)
        return seq

    def flush(self) -> bool:
        """Empty the prefix cache, if no request is there; whether it was done."""
        if self._live:
            return False
        self.cache.clear()
        return True

    @property
    def is_decoding(self) -> bool:
        """Whether a sequence decodes in the next step, unless it ends or is preempted."""
        return any(len(seq.tokens) + seq.pending - seq.computed == 1 for seq in self.running)

    @property
    def is_full(self) -> bool:
        """Whether more sequences wait than there are rows for."""
        return len(self.waiting) > len(self._free_rows)

    @property
    def prompt_tokens(self) -> int:
        """Of what runs, and of what waits and has a row, so many are still to be computed; but for what the prefix
        cache has."""
        size = self.pool.page_size
        return sum(len(seq.tokens) - seq.computed for seq in self.running if len(seq.tokens) - seq.computed > 1) + sum(
            len(seq.tokens) - len(seq.path) * size for seq in islice(self.waiting, len(self._free_rows)))

    def schedule(self, max_prompt_tokens: int | None = None) -> Schedule:
        """The next step; without rows if there is nothing to do. sampling() and commit(), or drop(), follow.

        max_prompt_tokens: of this step, where that is less than of any.
        """
        self._steps.append(step := _Step())
        step.schedule.pages, self._moved = self._moved, []
        preemptions = self.preemptions
        self._add_decodes(step)
        budget = min(self.prefill_budget, max_prompt_tokens or self.prefill_budget)
        self._add_prompts(step, budget, can_admit=self.preemptions == preemptions)
        self._add_copies(step)
        return step.schedule

    def early_sampling(self) -> Sampling | None:
        """As sampling(), where that can be said while a step before is not committed: of a step in which all decode
        and none of their tokens so far matters. Those of sequences that end meanwhile are chosen for nothing."""
        step = self._steps[-1]
        if not step.batch or step.schedule.num_decodes < len(step.batch) or not all(
                seq.is_plain for seq in step.batch):
            return None
        step.sampled, count = list(step.batch), len(step.batch)
        params = [seq.request.params for seq in step.batch]
        step.sampling = Sampling(
            list(step.schedule.rows), list(range(count)), [each.temperature for each in params],
            [each.top_k for each in params], [each.top_p for each in params], [each.min_p for each in params],
            [seq.random.random() if each.temperature else 0.0 for seq, each in zip(step.batch, params, strict=True)],
            [-1] * count)  # fmt: skip
        return step.sampling

    def sampling(self) -> Sampling:
        """How the tokens of the step scheduled last are chosen: of its sequences that have not ended meanwhile. Every
        step before it is committed."""
        step = self._steps[-1]
        if step.sampled:  # by early_sampling()
            return step.sampling
        sampling, end = step.sampling, 0
        for i, (seq, start, count, wanted) in enumerate(
            zip(step.batch, step.schedule.starts, step.schedule.counts, step.schedule.logits, strict=True)
        ):
            first, end = end, end + wanted
            if not wanted or seq.finish_reason is not None:
                continue
            samples = start + count == len(seq.tokens)
            if scored := wanted - samples:
                known = len(seq.prompt_logprobs)
                sampling.scored.append(Scored(i, first, seq.tokens[known : known + scored],
                                              seq.request.top_prompt_logprobs, seq.request.logprob_ids))  # fmt: skip
            if samples:
                step.sampled.append(seq)
                add_sampling(sampling, seq, end - 1)
        return sampling

    def commit(self, sampled: Sampled) -> list[Output]:
        """Write the results of the oldest step on its way to its sequences, and hand full pages to the prefix cache.

        Returns what each sequence that sampled is answered; one that has a finish_reason now is already forgotten.
        """
        step = self._steps.popleft()
        if self.cache.enabled:
            self._keep_full_pages(step)
        for run, entries in zip(step.sampling.scored, sampled.prompt_logprobs, strict=True):
            step.batch[run.index].prompt_logprobs += entries
        outputs = []
        for seq, token, logprob in zip(step.sampled, sampled.ids, sampled.logprobs, strict=True):
            if seq.finish_reason is not None:  # aborted
                continue
            seq.append(token)
            if seq.finish_reason is not None:
                self._remove(seq)
            outputs.append(output_of(seq, logprob))
        return outputs

    def drop(self) -> list[Sequence]:
        """The step scheduled last has failed, or is not run: forget the sequences that take part in it, and return
        them. Pages that it has for others go with the next step: it may have failed before they were written down."""
        step = self._steps.pop()
        failed = [seq for seq in dict.fromkeys([*step.batch, *step.loading]) if seq.finish_reason is None]
        for seq in failed:
            seq.finish_reason = "error"
            self._remove(seq)
        self.cache.forget(step.arriving)
        self.cache.storing |= dict.fromkeys(node for node in step.stored if node.page >= 0 <= node.host)
        rows = {seq.row for seq in self.running}
        self._moved = [entry for entry in step.schedule.pages if entry[0] in rows] + self._moved
        return failed

    def _add_decodes(self, step: _Step) -> None:
        batch, schedule = step.batch, step.schedule
        for seq in list(self.running):
            if seq.row < 0:
                break  # preempted below, as everything younger was
            length = len(seq.tokens) + seq.pending
            if length - seq.computed == 1 and length < seq.max_tokens and self._grow(seq, length, schedule):
                batch.append(seq)
        schedule.num_decodes = len(batch)
        schedule.rows = [seq.row for seq in batch]
        schedule.starts = [seq.computed for seq in batch]
        schedule.tokens = [LAST_SAMPLED if seq.pending else seq.tokens[-1] for seq in batch]
        schedule.counts = [1] * len(batch)
        schedule.logits = [1] * len(batch)
        for seq in batch:
            seq.computed += 1
            seq.pending += 1

    def _add_prompts(self, step: _Step, budget: int, can_admit: bool) -> None:
        """can_admit: not where pages have run out in this step. So what is preempted waits until the step that runs is
        committed."""
        scored_budget = PROMPT_LOGITS_PER_STEP
        if self._policy == "lpm" and self._free_rows:
            for seq in islice(self.waiting, LPM_WINDOW):
                self.cache.match(seq.path, seq.tokens, seq.reusable)
        unfinished = [seq for seq in self.running if len(seq.tokens) - seq.computed > 1]
        while budget:
            seq = unfinished.pop(0) if unfinished else self._admit(step) if can_admit else None
            if seq is None:
                break
            if seq in step.loading:
                continue
            count = min(len(seq.tokens) - seq.computed, budget)
            if seq.scores_prompt:
                count = min(count, scored_budget)
                scored_budget -= count
            if count:
                self._take(seq, count, step)
                budget -= count
            if seq.computed < len(seq.tokens):
                break  # a younger one must not overtake it
        if step.loading and not step.batch:  # nothing to compute while the first one's pages come
            seq = step.loading[0]
            count = min(len(seq.tokens) - seq.computed, budget)
            self._take(seq, min(count, scored_budget) if seq.scores_prompt else count, step)
            step.schedule.reads_loads = True

    def _add_copies(self, step: _Step) -> None:
        """What the step copies to and from the host tier. It is settled last: who is evicted for this step is not
        stored by it."""
        step.schedule.loads = [(node.host, node.page) for node in step.arriving]
        step.stored = list(self.cache.storing)
        step.schedule.stores = [(node.page, node.host) for node in step.stored]
        self.cache.storing.clear()

    def _take(self, seq: Sequence, count: int, step: _Step) -> None:
        """Put the next `count` tokens of a prompt into the step; their pages are there."""
        start, end = seq.computed, seq.computed + count
        samples = end == len(seq.tokens)
        logits = int(samples)
        if seq.scores_prompt:  # the logits at p give the logprob of token p + 1
            logits += max(0, min(end, seq.num_prompt - 1) - max(start, len(seq.prompt_logprobs) - 1))
        schedule = step.schedule
        schedule.rows.append(seq.row)
        schedule.starts.append(start)
        schedule.counts.append(count)
        schedule.logits.append(logits)
        schedule.tokens += seq.tokens[start:end]
        step.batch.append(seq)
        seq.computed = end
        seq.pending += samples

    def _keep_full_pages(self, step: _Step) -> None:
        size = self.pool.page_size
        for seq, row, start, count in zip(
            step.batch, step.schedule.rows, step.schedule.starts, step.schedule.counts, strict=True
        ):
            full = (start + count) // size
            if seq.row != row or full <= len(seq.path):  # it has ended or was preempted; or nothing is new
                continue
            for i in range(len(seq.path), full):
                page = self.cache.insert(seq.path, tuple(seq.tokens[i * size : (i + 1) * size]), seq.pages[i])
                if page != seq.pages[i]:
                    seq.pages[i] = page
                    self._moved.append((row, i, [page]))

    def _grow(self, seq: Sequence, length: int, schedule: Schedule) -> bool:
        """Allocate the page that the newest token of `seq` needs, preempting the youngest; False if that was `seq`."""
        if length <= len(seq.pages) * self.pool.page_size:
            return True
        while not self.cache.num_available:
            victim = self.running.pop()
            self.preemptions += 1
            self._release(victim)
            victim.computed = 0
            self._wait_again(victim)
            if victim is seq:
                return False
        schedule.pages.append((seq.row, len(seq.pages), new := self.cache.allocate(1)))
        seq.pages += new
        return True

    def _wait_again(self, victim: Sequence) -> None:
        """Queue it before those that arrived later."""
        index = 0
        while index < len(self.waiting) and self.waiting[index].arrival < victim.arrival:
            index += 1
        self.waiting.insert(index, victim)

    def _admit(self, step: _Step) -> Sequence | None:
        """Let the next waiting sequence run, with pages for all it has; None if it must wait. One that has pages in the
        host tier only, or finds some on their way, computes nothing before the next step."""
        if not self.waiting or not self._free_rows:
            return None
        seq = self._next()
        self.cache.match(seq.path, seq.tokens, seq.reusable)
        missing = self.pool.pages_for(len(seq.tokens)) - len(seq.path)
        # A page is left for each that runs, else the newcomer would be preempted as soon as they grow.
        wanted = missing + len(self.running)
        hosted = self.cache.hosted(seq.path, seq.tokens, seq.reusable)
        if wanted > self.cache.num_available or self._is_on_its_way(seq, len(seq.path) + len(hosted)):
            return None
        self.cache.use(seq.path)
        if wanted > self.cache.num_available:  # its own prefix was among what could have been evicted
            self.cache.release(seq.path)
            return None
        self._overtakes = 0 if seq is self.waiting[0] else self._overtakes + 1
        self.waiting.remove(seq)
        insort(self.running, seq, key=lambda each: each.arrival)
        seq.row = self._free_rows.pop()
        new = self.cache.allocate(missing)
        self.cache.load(seq.path, hosted, new[: len(hosted)])
        step.arriving += hosted
        if step.arriving and any(node in step.arriving for node in seq.path):
            step.loading.append(seq)
        seq.pages = [node.page for node in seq.path] + new[len(hosted) :]
        seq.computed = len(seq.path) * self.pool.page_size
        if seq.cached_tokens < 0:
            seq.cached_tokens = seq.computed
            self.cached_tokens += seq.computed
        step.schedule.pages.append((seq.row, 0, list(seq.pages)))
        return seq

    def _is_on_its_way(self, seq: Sequence, found: int) -> bool:
        """Whether a step that is not committed computes the next page that the prefix cache would have of this waiting
        sequence, behind so many: it is there a step later."""
        size = self.pool.page_size
        end = (found + 1) * size
        if not self.cache.enabled or end > seq.reusable:
            return False
        page, text = seq.tokens[end - size : end], seq.tokens[:end]
        return any(len(other.path) * size < end <= other.computed and other.row >= 0
                   and other.tokens[end - size : end] == page and other.tokens[:end] == text
                   for step in self._steps for other in step.batch[step.schedule.num_decodes :])  # fmt: skip

    def _next(self) -> Sequence:
        """Which of the waiting sequences is let in next."""
        if self._policy == "fcfs" or self._overtakes >= MAX_OVERTAKES:
            return self.waiting[0]
        return max(islice(self.waiting, LPM_WINDOW), key=lambda seq: len(seq.path) + len(  # the oldest of several
            self.cache.hosted(seq.path, seq.tokens, seq.reusable)))

    def _remove(self, seq: Sequence) -> None:
        del self._live[seq.request.rid]
        if seq.row < 0:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        """Take back its pages and its row."""
        self.pool.free(seq.pages[len(seq.path) :])
        self.cache.release(seq.path)
        self._free_rows.append(seq.row)
        seq.pages, seq.row, seq.is_noted = [], -1, False


def group_of(seq: Sequence, groups: list[Scheduler]) -> Scheduler:
    """Which of several takes a new sequence: of those that are not much longer than the shortest, the one whose prefix
    cache has most of it; of several, the shortest."""
    if len(groups) == 1:
        return groups[0]
    fewest = min(map(len, groups))
    limit = fewest + max(MIN_IMBALANCE, int(RELATIVE_IMBALANCE * fewest))
    return max((group for group in groups if len(group) < limit or len(group) == fewest),
               key=lambda group: (group.cached_pages(seq), -len(group)))
