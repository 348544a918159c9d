"""A scheduler with a runner made of arithmetic around it.

The stand-in model's next token is a function of the whole text so far, which it reads back from the pages it was told
to write: a page that is lost, stale, or shared by other tokens than its own changes the tokens.
"""

import random
from collections.abc import Callable
from typing import Any

from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.prefix_cache import Node
from wave64.serve.engine.schedule import LAST_SAMPLED, Sampled, Schedule
from wave64.serve.engine.scheduler import PROMPT_LOGITS_PER_STEP, Scheduler, Sequence
from wave64.serve.messages import Output, Request, SamplingParams, TokenLogprob

PAGE = 4
STOP = 7


def next_token(text: list[int]) -> int:
    return hash(tuple(text)) % 50


def sequence(rid: str, prompt: list[int], max_new: int, scored: bool = False) -> Sequence:
    request = Request(rid, prompt, SamplingParams(max_new_tokens=max_new), prompt_logprobs=scored)
    return Sequence(request, frozenset([STOP]), random.Random(0))


def alone(prompt: list[int], max_new: int) -> list[int]:
    """What the stand-in model says to a prompt."""
    text = list(prompt)
    while len(text) - len(prompt) < max_new:
        text.append(next_token(text))
        if text[-1] == STOP:
            break
    return text[len(prompt) :]


def prompt_without_stop(length: int, max_new: int = 4, first: int = 0) -> list[int]:
    """One whose answer has max_new tokens."""
    return next(text for start in range(first, first + 900, 100)
                if len(alone(text := list(range(start, start + length)), max_new)) == max_new)


class World:
    """A scheduler, and a runner that remembers what was written where.

    overlap: a step is scheduled and computed before the one in front of it is committed. host_pages: of the host tier.
    late: a step's copies to and from it are done as late as they may be, behind the step, or else in front of it.
    early: how tokens are chosen is said before the step in front is committed, where it can be.
    """

    def __init__(self, num_pages: int, max_running: int, budget: int, overlap: bool = False, policy: str = "fcfs",
                 reuse: bool = True, host_pages: int = 0, late: bool = True, early: bool = False) -> None:  # fmt: skip
        self.early, self.num_early, self.max_running = early, 0, max_running
        self.pool = PagePool(num_pages, PAGE)
        self.host_pool = PagePool(host_pages, PAGE) if host_pages else None
        self.scheduler = Scheduler(self.pool, max_running, budget, policy=policy, reuse_prefixes=reuse,
                                   host_pool=self.host_pool)
        self.late, self.copies, self.loaded = late, list[Schedule](), 0
        self.host_memory: dict[int, list[int | None]] = {}
        self.overlap, self.in_order = overlap, policy == "fcfs"
        self.memory: list[int | None] = [None] * (num_pages * PAGE)
        self.table: dict[int, list[int]] = {}  # row -> pages
        self.last_sampled: dict[int, int] = {}  # by row
        self.running_step: Sampled | None = None  # not committed yet
        self.generated: dict[str, list[int]] = {}
        self.prompt_scores: dict[str, list[int | None]] = {}
        self.cached: dict[str, int] = {}
        self.first_tokens: list[str] = []
        self.arrivals: list[str] = []
        self.let_in: list[tuple[str, str]] = []  # (who was, the oldest that waited), each time
        admit = self.scheduler._admit
        self.scheduler._admit = lambda step: self._noted(admit, step)
        self.computed = 0  # tokens

    def add(self, rid: str, prompt: list[int], max_new: int, scored: bool = False) -> None:
        self.scheduler.add(sequence(rid, prompt, max_new, scored))
        self.arrivals.append(rid)

    @property
    def has_work(self) -> bool:
        return bool(len(self.scheduler)) or self.running_step is not None

    def run(self) -> None:
        while self.has_work:
            self.step()

    def step(self, max_prompt_tokens: int | None = None) -> Schedule:
        scheduler = self.scheduler
        step = scheduler.schedule(max_prompt_tokens)
        self._check(step)
        if not step.rows:
            assert scheduler.drop() == []
            self._commit()
            return step
        self.num_early += self.early and scheduler.early_sampling() is not None
        texts, ends = self._forward(step)
        if self.overlap:
            self._commit()
        sampled = self._sample(step, texts, ends)
        assert self.running_step is None
        self.running_step = sampled
        if not self.overlap:
            self._commit()
        self.check_pages()
        return step

    def _noted(self, admit: Callable[[Any], Sequence | None], step: Any) -> Sequence | None:
        oldest = self.scheduler.waiting[0].request.rid if self.scheduler.waiting else ""
        if seq := admit(step):
            self.let_in.append((seq.request.rid, oldest))
        return seq

    def _forward(self, step: Schedule) -> tuple[dict[int, list[int]], dict[int, int]]:
        """The text of each row, and its last row of logits."""
        self.copies.append(step)
        while self.copies and (self.copies[0] is not step or step.reads_loads or not self.late):
            self._copy(self.copies.pop(0))
        for row, first, pages in step.pages:
            old = self.table.get(row, [])
            self.table[row] = old[:first] + pages + old[first + len(pages) :]
        texts, ends, tokens, end = {}, {}, iter(step.tokens), 0
        for row, start, count, logits in zip(step.rows, step.starts, step.counts, step.logits, strict=True):
            slots = [self.table[row][p // PAGE] * PAGE + p % PAGE for p in range(start + count)]
            for slot in slots[start:]:
                token = next(tokens)
                self.memory[slot] = self.last_sampled[row] if token == LAST_SAMPLED else token
            texts[row] = [self.memory[slot] for slot in slots]
            end += logits
            ends[row] = end - 1
        self.computed += len(step.tokens)
        return texts, ends

    def _copy(self, step: Schedule) -> None:
        for page, host in step.stores:
            self.host_memory[host] = self.memory[page * PAGE : (page + 1) * PAGE]
        for host, page in step.loads:
            self.memory[page * PAGE : (page + 1) * PAGE] = self.host_memory[host]
        self.loaded += len(step.loads)

    def _sample(self, step: Schedule, texts: dict[int, list[int]], ends: dict[int, int]) -> Sampled:
        live = {seq.row: seq for seq in self.scheduler.running}
        before = self._state()
        sampling = self.scheduler.sampling()
        assert sampling.logit_rows == [ends[row] for row in sampling.rows]
        sampled = Sampled([next_token(texts[row]) for row in sampling.rows], [None] * len(sampling.rows))
        self.last_sampled |= zip(sampling.rows, sampled.ids, strict=True)
        for run in sampling.scored:
            row, logits = step.rows[run.index], step.logits[run.index]
            position = step.starts[run.index] + step.counts[run.index] - logits  # of the first logits
            assert run.first_row == ends[row] + 1 - logits
            assert position == len(live[row].prompt_logprobs) - 1, "logits continue where the last ones ended"
            assert run.ids == live[row].tokens[position + 1 : position + 1 + logits - (row in sampling.rows)]
            sampled.prompt_logprobs.append([TokenLogprob(token, 0.0) for token in run.ids])
        assert before == self._state(), "only commit() writes to sequences"
        return sampled

    def _state(self) -> list[tuple[list[int], list]]:
        return [(list(seq.tokens), list(seq.prompt_logprobs)) for seq in self.scheduler.running]

    def _commit(self) -> None:
        sampled, self.running_step = self.running_step, None
        for output in self.scheduler.commit(sampled) if sampled is not None else ():
            self._answer(output)

    def _answer(self, output: Output) -> None:
        if output.rid not in self.generated:
            self.first_tokens.append(output.rid)
            self.cached[output.rid] = output.cached_tokens
        else:
            assert output.cached_tokens == 0, "it is said once"
        self.generated.setdefault(output.rid, []).extend(output.token_ids)
        if output.prompt_logprobs:
            assert output.rid not in self.prompt_scores, "they are sent once"
            self.prompt_scores[output.rid] = [entry and entry.id for entry in output.prompt_logprobs]

    def _check(self, step: Schedule) -> None:
        scheduler = self.scheduler
        if self.running_step is None:
            assert bool(step.rows) == bool(len(scheduler))  # whoever waits, somebody goes on
        assert step.counts[: step.num_decodes] == [1] * step.num_decodes
        assert sum(step.counts[step.num_decodes :]) <= scheduler.prefill_budget
        assert sum(step.logits) <= len(step.rows) + PROMPT_LOGITS_PER_STEP
        assert sum(step.counts) == len(step.tokens)
        assert len(set(step.rows)) == len(step.rows)
        assert self.overlap or LAST_SAMPLED not in step.tokens
        assert all(not seq.pages for seq in scheduler.waiting)
        for at in (0, 1):  # a page is on its way in one direction only, and once; so is a host page
            touched = [pair[at] for pair in step.stores] + [pair[1 - at] for pair in step.loads]
            assert len(touched) == len(set(touched))
        for queue in (scheduler.running, scheduler.waiting):
            assert [seq.arrival for seq in queue] == sorted(seq.arrival for seq in queue)
        if self.in_order:
            queue = [seq.request.rid for seq in (*scheduler.running, *scheduler.waiting)]
            assert queue == [rid for rid in self.arrivals if rid in scheduler]
        self.check_pages()

    def check_pages(self) -> None:
        """Every page is free, of the tree or of one sequence; users and the order of eviction are right."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        nodes = nodes_of(cache._root)
        owned = [page for seq in scheduler.running for page in seq.pages[len(seq.path) :]]
        kept = [node.page for node in nodes if node.page >= 0]
        assert sorted([*owned, *kept, *self.pool._free]) == list(range(self.pool.num_pages))
        assert cache.num_pages == len(kept)
        self._check_host(nodes)
        assert cache.enabled or not nodes
        users: dict[int, int] = {}
        for seq in scheduler.running:
            assert [node.page for node in seq.path] == seq.pages[: len(seq.path)]
            text = [token for node in seq.path for token in node.key]
            assert text == seq.tokens[: len(text)], "its own tokens"
            for parent, node in zip([cache._root, *seq.path], seq.path, strict=False):
                assert node.parent is parent
                users[node.page] = users.get(node.page, 0) + 1
        assert all(node.users == users.get(node.page, 0) for node in nodes)
        assert {node.page for node in cache._unused} == {
            node.page for node in nodes if not node.users and node.page >= 0}
        order = {node.page: i for i, node in enumerate(cache._unused)}
        for node in cache._unused:
            assert all(order[child.page] < order[node.page] for child in node.children.values() if child.page >= 0)

    def _check_host(self, nodes: list[Node]) -> None:
        """Every host page is free or of one node; what has no other page comes behind all that have, and goes first."""
        cache, pool = self.scheduler.cache, self.host_pool
        copies = [node.host for node in nodes if node.host >= 0]
        assert sorted(copies + (pool._free if pool else [])) == list(range(pool.num_pages if pool else 0))
        assert set(cache._hosted) == {node for node in nodes if node.page < 0}
        assert all(node.page >= 0 for node in cache.storing)
        order = {node: i for i, node in enumerate(cache._hosted)}
        for node in cache._hosted:
            assert node.host >= 0
            assert all(order[child] < order[node] for child in node.children.values())

    def check_end(self) -> None:
        """Nothing runs any more: all that is not free is the tree's, and a flush frees it."""
        assert not [*self.scheduler.running, *self.scheduler.waiting]
        assert self.scheduler.cache.num_available == self.pool.num_pages
        assert self.scheduler.flush()
        assert self.pool.num_free == self.pool.num_pages
        assert self.host_pool is None or self.host_pool.num_free == self.host_pool.num_pages
        assert sorted(self.scheduler._free_rows) == list(range(self.max_running))
        assert not len(self.scheduler)
        assert not self.scheduler._steps


def nodes_of(node: Node) -> list[Node]:
    """All below a node of the prefix cache's tree."""
    return [each for child in node.children.values() for each in (child, *nodes_of(child))]
