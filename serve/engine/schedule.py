"""What crosses inside the engine, in plain Python: `Schedule` (scheduler -> every rank), `Sampling` (scheduler -> the
rank that samples) and `Sampled` (back to the scheduler). `Batch` (runner -> model) holds tensors, in model/batch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from wave64.serve.engine.grammar import Grammar
from wave64.serve.messages import TokenLogprob

LAST_SAMPLED = -1  # in Schedule.tokens: the token that the row sampled last, which only the runner needs to know


@dataclass(slots=True)
class Schedule:
    """One step in plain ints, column by column, B sequences and T tokens; all that a rank needs to take part in it.

    A row is a sequence's row of the runner's page table, from admission until it ends or is preempted.
    Decodes come first.
    """

    num_decodes: int = 0
    rows: list[int] = field(default_factory=list)  # [B]
    starts: list[int] = field(default_factory=list)  # [B] position of the sequence's first token in this step
    counts: list[int] = field(default_factory=list)  # [B] its tokens in this step
    logits: list[int] = field(default_factory=list)  # [B] logits are computed for the last so many of them
    tokens: list[int] = field(default_factory=list)  # [T] token ids, or LAST_SAMPLED
    pages: list[tuple[int, int, list[int]]] = field(default_factory=list)  # (row, first index, pages) newly allocated
    stores: list[tuple[int, int]] = field(default_factory=list)  # (page, host page): to be copied to the host
    loads: list[tuple[int, int]] = field(default_factory=list)  # (host page, page): to be copied to the device
    reads_loads: bool = False  # whether this step reads what it loads; otherwise the next one does, first

    def one_by_one(self) -> Iterator[tuple[Schedule, bool]]:
        """Of each token a step that decodes it alone, and whether its logits are wanted; the first has all pages."""
        pages, tokens = self.pages, iter(self.tokens)
        for row, start, count, logits in zip(self.rows, self.starts, self.counts, self.logits, strict=True):
            for i in range(count):
                yield Schedule(1, [row], [start + i], [1], [1], [next(tokens)], pages), i >= count - logits
                pages = []

    def split(self) -> tuple[Schedule, Schedule]:
        """The decodes, with all the pages, and the prompts: two steps that do what this one does."""
        n = self.num_decodes
        return (replace(self, rows=self.rows[:n], starts=self.starts[:n], counts=self.counts[:n],
                        logits=self.logits[:n], tokens=self.tokens[:n]),
                Schedule(0, self.rows[n:], self.starts[n:], self.counts[n:], self.logits[n:], self.tokens[n:]))


class Penalties(NamedTuple):
    """What one sequence's logits are penalized by: every token that it holds already."""

    index: int  # of the sequence, in the columns of Sampling
    presence: float
    frequency: float
    repetition: float
    num_prompt: int
    num_output: int  # so many tokens are generated
    ids: list[int] | None = None  # all of them, where its row is new; else the sampler has noted them


class Scored(NamedTuple):
    """A run of prompt tokens whose logprobs a request asked for."""

    index: int  # of the sequence, in the columns of Schedule
    first_row: int  # of the step's logits: this row scores ids[0], the next one ids[1]
    ids: list[int]
    top: int  # how many of the most likely tokens go with each
    asked: list[int] = []  # tokens whose logprobs go with each, too


@dataclass(slots=True)
class Sampling:
    """How the tokens of one step are chosen: column by column, S sequences, in the order of the Schedule."""

    rows: list[int] = field(default_factory=list)  # [S] of the runner's page table
    logit_rows: list[int] = field(default_factory=list)  # [S] rows of the step's logits
    temperature: list[float] = field(default_factory=list)  # [S] 0: the most likely token
    top_k: list[int] = field(default_factory=list)  # [S] <= 0: all
    top_p: list[float] = field(default_factory=list)  # [S]
    min_p: list[float] = field(default_factory=list)  # [S]
    uniform: list[float] = field(default_factory=list)  # [S] in [0, 1): the random number that chooses
    top_logprobs: list[int] = field(default_factory=list)  # [S] -1: no logprobs; k: the chosen token's and the k best
    asked: dict[int, list[int]] = field(default_factory=dict)  # index -> tokens whose logprobs go with its token's
    penalties: list[Penalties] = field(default_factory=list)  # of the sequences that have any
    biases: list[tuple[int, int, float]] = field(default_factory=list)  # (index, token, what is added to its logit)
    forbidden: list[tuple[int, int]] = field(default_factory=list)  # (index, token): early stops, ends of bad words
    scored: list[Scored] = field(default_factory=list)
    grammars: list[tuple[int, Grammar]] = field(default_factory=list)  # (index, its state): read between run and choice


@dataclass(slots=True)
class Sampled:
    """What came of one step, in the order of its Sampling. Scheduler.commit() writes it to the sequences."""

    ids: list[int] = field(default_factory=list)  # [S]
    logprobs: list[TokenLogprob | None] = field(default_factory=list)  # [S] None where none were asked for
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)  # for each of Sampling.scored
