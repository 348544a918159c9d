"""How many prompt tokens a step that also decodes may have: what that costs is measured, step by step, so that the gap
between two tokens of an answer stays bounded while prompts arrive.

No model of the device: a step of n prompt tokens took so long, beyond a step that only decodes; so `limit / that` times
n tokens take as long as is allowed. What a token costs depends on the chunk itself (launches) and on the text before it
(attention), and each step that uses its chunk corrects both.

Where few tokens wait, chunks are shorter than is allowed: a few are computed while the weights are read for the
decodes, and cost a step next to nothing. Those that wait are spread over some steps, so that none is much longer than
the others, and prompts get on as fast as they come. Where requests wait for others to end, what counts is how much the
engine does in all: then chunks are as long as is allowed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Prompts get on by at least so many tokens, however slow the device is. Chunks are multiples of it: kernels compute
# whole tiles, and Triton compiles others for numbers that are no multiples of 16.
MIN_CHUNK = 64
SHORT_CHUNK = 128  # prompt tokens that a step has in any case: next to 64 decodes products still wait for the weights
SPREAD = 16  # over so many steps, each of what waits then
GROWTH = 2.0  # at most so many times the chunk before: one step that was measured short is no reason for a long one
SMOOTHING = 0.25  # weight of the newest step among those that only decode


class Pace:
    """begin() a step when it is launched and end() it when its results are there: with two on their way the oldest one
    ends. `chunk` is the longest for the next step in which something decodes."""

    def __init__(self, limit_ms: float, largest: int, clock: Callable[[], float] = time.monotonic) -> None:
        """limit_ms: by how much prompts may prolong a step; 0: by any time. largest: the chunk to begin with."""
        self.chunk = self._largest = largest
        self._limit, self._clock = limit_ms / 1e3, clock
        self._steps: deque[tuple[float, bool, int]] = deque()  # (launched, whether it decodes, its prompt tokens)
        self._ended = 0.0
        self._decoding = 0.0  # seconds of a step that only decodes

    def chunk_of(self, waiting: int) -> int:
        """For the next step in which something decodes, where so many prompt tokens wait."""
        if not self._limit:
            return self.chunk
        return min(self.chunk, max(SHORT_CHUNK, -(-waiting // (SPREAD * MIN_CHUNK)) * MIN_CHUNK))

    def begin(self, decodes: bool, prompt: int) -> None:
        """A step is launched, with so many prompt tokens."""
        self._steps.append((self._clock(), decodes, prompt))

    def drop(self) -> None:
        """The step launched last has failed."""
        self._steps.pop()

    def end(self) -> None:
        """The oldest step has ended."""
        launched, decodes, prompt = self._steps.popleft()
        now = self._clock()
        seconds = now - max(launched, self._ended)
        self._ended = now
        if not prompt:
            self._decoding += (SMOOTHING if self._decoding else 1.0) * (seconds - self._decoding)
        elif self._limit:
            self._learn(prompt, seconds - self._decoding * decodes)

    def _learn(self, prompt: int, seconds: float) -> None:
        if seconds <= self._limit and 2 * prompt < self.chunk:
            return  # so few tokens are mostly launches, and say nothing of a chunk
        fitting = int(prompt * self._limit / seconds) if seconds > 0 else self._largest
        if fitting < self._largest:
            fitting = fitting // MIN_CHUNK * MIN_CHUNK
        self.chunk = max(MIN_CHUNK, min(fitting, int(GROWTH * self.chunk), self._largest))
