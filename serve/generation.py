"""From prompts to choices: what a request asks for becomes engine requests, and tokens that come back become text."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import uuid4

from wave64.serve.args import ServerArgs
from wave64.serve.client import EngineClient
from wave64.serve.detokenizer import Detokenizer, StopStrings
from wave64.serve.messages import Output, Ready, Request, SamplingParams, TokenLogprob
from wave64.serve.protocol import MAX_CHOICES, ApiError, Sampling
from wave64.serve.tokenizer import Tokenizer, TokenizerError

LONG_TEXT = 4096  # characters; a longer one is tokenized in a thread, so that streams go on meanwhile


@dataclass(slots=True)
class Delta:
    """What became certain of a choice since the last one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # with where in the text the token begins

    def __iadd__(self, other: "Delta") -> "Delta":
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        return self


class Choice:
    """One completion of one prompt: an engine request and what has come of it."""

    def __init__(self, index: int, prompt_ids: list[int], params: SamplingParams, tokenizer: Tokenizer,
                 body: Sampling, top_logprobs: int, prompt_logprobs: bool,
                 stop_tokens: dict[int, str] | None = None) -> None:  # fmt: skip
        """stop_tokens: special tokens whose text is among the request's stop strings."""
        self.index = index
        self.prompt_ids = prompt_ids
        self.request = Request(uuid4().hex, prompt_ids, params, top_logprobs, prompt_logprobs)
        self.all = Delta()
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.finish_reason: str | None = None
        self.matched: int | str | None = None  # the stop token or stop string that ended it
        self.new = Delta()  # not yet streamed
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, body.skip_special_tokens is not False)
        self._stops = StopStrings(body.stop_strings, keep=bool(body.no_stop_trim))
        self._keep_stop = bool(body.no_stop_trim)
        self._stop_tokens = stop_tokens or {}
        self._skips_special = body.skip_special_tokens is not False
        self._decoded = 0  # characters so far, those held back by the stop strings among them
        self._held: list[tuple[int, TokenLogprob]] = []  # logprobs of tokens whose text is held back

    def feed(self, output: Output) -> None:
        """Take what a step of the engine gave."""
        delta = Delta()
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        for i, token in enumerate(output.token_ids):
            delta.token_ids.append(token)
            if output.logprobs:
                self._held.append((self._decoded, output.logprobs[i]))
            is_stop = output.finish_reason == "stop" and i == len(output.token_ids) - 1
            if not is_stop or self._keep_stop:
                delta.text += self._show(self._detokenizer.push([token]), len(self.all.token_ids) + i + 1)
            if self._stops.matched:
                break
        if output.finish_reason and not self._stops.matched:
            delta.text += self._show(self._detokenizer.flush(), len(self.all.token_ids) + len(delta.token_ids))
        if self._stops.matched:
            self.finish_reason, self.matched = "stop", self._stops.matched
        elif output.finish_reason:
            self.finish_reason = output.finish_reason
            self.matched = self._stop_tokens.get(output.matched_stop, output.matched_stop)
            delta.text += self._stops.flush()
            if self._keep_stop and self._skips_special:
                delta.text += self._stop_tokens.get(output.matched_stop, "")
        delta.logprobs = self._release(len(self.all.text) + len(delta.text))
        self.all += delta
        self.new += delta

    def take_new(self) -> Delta:
        """What is new since the last call."""
        new, self.new = self.new, Delta()
        return new

    def _show(self, text: str, num_tokens: int) -> str:
        """What may be shown of `text`, which the last of `num_tokens` tokens completed."""
        self._decoded += len(text)
        return self._stops.push(text, may_stop=num_tokens > self.request.params.min_new_tokens)

    def _release(self, shown: int) -> list[tuple[int, TokenLogprob]]:
        """The logprobs of tokens that begin within the first `shown` characters; of all, if no text is held back."""
        nothing_held = not self._stops.matched and shown == self._decoded
        count = len(self._held) if nothing_held else sum(start < shown for start, _ in self._held)
        released, self._held = self._held[:count], self._held[count:]
        return released


class Generator:
    """What every endpoint that generates needs: the tokenizer, the engine, the model's sampling defaults."""

    def __init__(
        self, args: ServerArgs, client: EngineClient, tokenizer: Tokenizer, defaults: dict[str, float]
    ) -> None:
        self.args = args
        self.client = client
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.is_serving = False  # after the warm-up

    async def warm_up(self) -> None:
        """Generate one token. Raises ApiError when that fails."""
        request = Request(uuid4().hex, [0], SamplingParams(max_new_tokens=1, temperature=0.0))
        async for _ in self.client.stream([request]):
            pass

    @property
    def ready(self) -> Ready:
        """The engine's limits. Raises ApiError (503) while there is no engine."""
        if self.client.ready is None or self.client.lost is not None:
            raise ApiError(f"the engine is not there: {self.client.lost or 'the model is still loading'}", status=503)
        return self.client.ready

    async def encode(self, prompt: str | list[int], where: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of one prompt, checked. Raises ApiError that names the field `where`."""
        limit, what = self._limit()
        if isinstance(prompt, str) and len(prompt) > limit * self.tokenizer.longest_token:
            raise ApiError(f"{where}: a text of {len(prompt)} characters is more than {what} can hold", where,
                           "context_length_exceeded")  # fmt: skip
        if isinstance(prompt, str):
            ids = await self._tokenize(prompt, where, add_special_tokens)
        else:
            ids = prompt
        if not ids:
            raise ApiError(f"{where}: empty, expected at least one token", where, "empty_prompt")
        vocab = self.ready.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise ApiError(f"{where}: expected token ids from 0 to {vocab - 1}, got {bad}", where, "invalid_token")
        return ids

    async def _tokenize(self, text: str, where: str, add_special_tokens: bool) -> list[int]:
        try:
            if len(text) > LONG_TEXT:
                return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
            return self.tokenizer.encode(text, add_special_tokens)
        except TokenizerError as error:
            raise ApiError(f"{where}: {error}", where, "invalid_value") from None

    def _limit(self) -> tuple[int, str]:
        """How many tokens a prompt and its completion may have, and what sets the limit."""
        context, pool = self.ready.context_length, self.ready.max_total_num_tokens
        if pool < context:
            return pool, f"the KV pool of {pool} tokens (--max-total-tokens)"
        return context, f"the context length of {context} tokens"

    def room(self, num_prompt: int, asked: int | None, default: int | None, name: str, where: str) -> int:
        """How many tokens to generate: what was `asked` for in the field `name`, else `default`, else all there is
        room for. Raises ApiError when the prompt, or the two together, are too long."""
        limit, what = self._limit()
        if num_prompt + (asked != 0) > limit:
            raise ApiError(f"{where}: {num_prompt} tokens and at least one new one are more than {what}", where,
                           "context_length_exceeded")  # fmt: skip
        room = limit - num_prompt
        if asked is None:
            return room if default is None else min(default, room)
        if asked > room:
            raise ApiError(f"{name}: {num_prompt} prompt tokens and {asked} new ones are {num_prompt + asked} in all, "
                           f"more than {what}; ask for at most {room}", name, "context_length_exceeded")  # fmt: skip
        return asked

    def choices(self, prompt_ids: list[int], body: Sampling, max_new_tokens: int, first_index: int = 0,
                top_logprobs: int = -1, prompt_logprobs: bool = False) -> list[Choice]:  # fmt: skip
        """`body.n` choices of one prompt, each with a seed of its own."""
        vocab = self.ready.vocab_size
        if (ids := body.stop_token_ids) and max(ids) >= vocab:
            raise ApiError(f"stop_token_ids: expected token ids from 0 to {vocab - 1}, got {max(ids)}",
                           "stop_token_ids", "invalid_token")  # fmt: skip
        if first_index + (body.n or 1) > MAX_CHOICES:
            raise ApiError(f"n: prompts times n may be at most {MAX_CHOICES}", "n", "invalid_value")
        added = self.tokenizer.added_ids
        named = {added[stop]: stop for stop in body.stop_strings if added.get(stop, vocab) < vocab}
        made = []
        for i in range(body.n or 1):
            params = body.sampling_params(self.defaults, max_new_tokens=max_new_tokens)
            ends = set() if params.ignore_eos else {token for token in self.tokenizer.end_ids if token < vocab}
            params.stop_token_ids = sorted({*params.stop_token_ids, *named, *ends})
            if params.seed is not None:
                params.seed += i
            choice = Choice(first_index + i, prompt_ids, params, self.tokenizer, body, top_logprobs, prompt_logprobs,
                            named)  # fmt: skip
            made.append(choice)
        return made

    async def run(self, choices: list[Choice]) -> AsyncIterator[Choice]:
        """Generate; yields a choice whenever it has something new. Closing the iterator aborts what is unfinished."""
        by_rid = {choice.request.rid: choice for choice in choices}
        async with aclosing(self.client.stream([choice.request for choice in choices])) as outputs:
            async for output in outputs:
                choice = by_rid[output.rid]
                if choice.finish_reason is not None:
                    continue  # tokens after a stop string
                choice.feed(output)
                if choice.finish_reason is not None and output.finish_reason is None:
                    self.client.abort(output.rid)
                if choice.finish_reason is not None or len(choice.new.token_ids) >= self.args.stream_interval:
                    yield choice
