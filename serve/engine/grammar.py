"""Grammars: which tokens an answer in a prescribed form may go on with, by llguidance.

A grammar is compiled in a thread, once for all requests that bring it, and a request waits for that outside the queue.
Masks are filled on the rank that samples, while the device runs the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wave64.serve.grammar import compiler
from wave64.serve.messages import Vocabulary

if TYPE_CHECKING:
    from wave64.serve.engine.schedule import Sampling

KEPT = 128  # compiled grammars, the latest used
PAUSE_S = 0.002  # how long a step waits for a grammar when there is nothing else to do


class Grammar:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def accept(self, token: int) -> str | None:
        """Go on by a token that the mask allowed; what is wrong, if it cannot."""
        if self.matcher.consume_token(token):
            return None
        return self.matcher.get_error().partition("\n")[0] or "the grammar does not allow this token"

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow but the end."""
        return self.matcher.is_stopped()


class Constrained(Protocol):
    """A sequence that waits for its grammar."""

    grammar: Grammar | None


class Grammars:
    """Compiles grammars. attach() a sequence to one; ready() gives it back when the grammar is there."""

    def __init__(self, vocab_size: int, end_ids: frozenset[int]) -> None:
        """end_ids: the model's, besides which the vocabulary has the tokenizer's."""
        self._vocab_size, self._end_ids = vocab_size, end_ids
        self._tokenizer: Future[Any] | None = None
        self._threads = ThreadPoolExecutor(1, "grammar")
        self._compiled: OrderedDict[str, Future[Any]] = OrderedDict()
        self._waiting: dict[str, tuple[Any, Future[Any]]] = {}  # by rid

    def learn(self, vocabulary: Vocabulary) -> None:
        """Take the tokens' texts, which masks are made of. They come before the first grammar."""
        self._tokenizer = self._threads.submit(compiler, vocabulary, self._vocab_size, self._end_ids)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, rid: str) -> bool:
        return rid in self._waiting

    def attach(self, rid: str, sequence: Constrained, source: str) -> None:
        """Let `ready` give `sequence` back with its grammar. source: in llguidance's own form."""
        if source not in self._compiled:
            self._compiled[source] = self._threads.submit(self._compile, source)
        self._compiled.move_to_end(source)
        self._waiting[rid] = (sequence, self._compiled[source])
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)

    def _compile(self, source: str) -> Any:
        if self._tokenizer is None:
            raise ValueError("a grammar came before the vocabulary")
        return self._tokenizer.result()(source)

    def ready(self, is_idle: bool) -> Iterator[tuple[str, Any, str | None]]:
        """(rid, sequence, what is wrong) of those whose grammar is there, or cannot be. is_idle: there is time to wait
        a little."""
        if self._waiting and is_idle:
            wait([future for _, future in self._waiting.values()], PAUSE_S, "FIRST_COMPLETED")
        for rid, (sequence, future) in list(self._waiting.items()):
            if not future.done():
                continue
            del self._waiting[rid]
            error = future.exception()
            if error is None:
                sequence.grammar = Grammar(future.result().deep_copy())
            yield rid, sequence, error and str(error)

    def forget(self, rid: str) -> None:
        """No longer wait for this one's grammar."""
        self._waiting.pop(rid, None)


@cache
def _threads() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def bitmask(sampling: Sampling, vocab_size: int) -> NDArray[np.int32]:
    """What the sequences of a step may go on with, as ops.apply_token_bitmask takes it. Stops that come too early are
    left out, unless a grammar leaves nothing else."""
    masks = np.full((len(sampling.rows), -(-vocab_size // 32)), -1, dtype=np.int32)
    matchers = [(grammar.matcher, index) for index, grammar in sampling.grammars]
    _threads().unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(masks))
    early: dict[int, list[int]] = {}
    for index, token in sampling.forbidden:
        early.setdefault(index, []).append(token)
    for index, tokens in early.items():
        left = masks[index].view(np.uint32).copy()
        for token in tokens:
            left[token // 32] &= ~np.uint32(1 << token % 32)
        if left.any():
            masks[index] = left.view(np.int32)
    return masks
