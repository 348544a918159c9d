"""From prompts to choices: make engine requests of a request's prompts, and text of the tokens that come back."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from wave64.serve.args import ServerArgs
from wave64.serve.http.detokenizer import Detokenizer, StopStrings
from wave64.serve.http.engine_client import EngineClient
from wave64.serve.http.grammar import Forced, Grammars
from wave64.serve.http.metrics import Metrics, Watch
from wave64.serve.http.reasoning import PARSERS as REASONING_PARSERS
from wave64.serve.http.replicas import Replicas
from wave64.serve.http.schemas import MAX_CHOICES, ApiError, Message, Sampling, Tool
from wave64.serve.http.template_process import TemplateProcess
from wave64.serve.http.templates import TemplateError
from wave64.serve.http.tokenizer import Tokenizer, TokenizerError
from wave64.serve.http.tools import parser_of
from wave64.serve.messages import (
    BadRequest,
    Output,
    Ready,
    Request,
    SamplingParams,
    TokenLogprob,
    check_request,
    too_long,
)

log = logging.getLogger("wave64")

SHORT_TEXT = 2048  # characters of one prompt that are tokenized at once, without the detour through a thread
MAX_LOGGED = 2048  # characters of a text with --log-requests
SLICE = 1 << 18  # characters that a thread tokenizes before it looks whether anyone still waits

Prompt = str | list[int]


class Logprobs(NamedTuple):
    """Which logprobs a request asks for."""

    top: int = -1  # -1: none; k: with each new token those of the k most likely ones
    prompt: int = -1  # the same, with each token of the prompt
    ids: list[int] = []  # tokens whose logprobs go with each


NO_LOGPROBS = Logprobs()


@dataclass(slots=True)
class Delta:
    """The part of a choice that became certain since the last one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # with where in the text the token begins

    def __iadd__(self, other: "Delta") -> "Delta":
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        return self


class Choice:
    """One completion of one prompt: an engine request and its results so far."""

    def __init__(self, index: int, prompt_ids: list[int], params: SamplingParams, tokenizer: Tokenizer,
                 body: Sampling, logprobs: Logprobs, *,
                 grammar: str | None = None, is_marked: bool = False,
                 stop_tokens: dict[int, str] | None = None) -> None:  # fmt: skip
        """is_marked: special tokens may mark calls and thoughts. stop_tokens: special tokens whose text is among the
        request's stop strings."""
        self.index = index
        self.prompt_ids = prompt_ids
        self.request = Request(uuid4().hex, prompt_ids, params, logprobs.top, logprobs.prompt >= 0,
                               max(logprobs.prompt, 0), logprobs.ids, grammar)  # fmt: skip
        self.all = Delta()
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.cached_tokens = 0  # of the prompt, in the engine's prefix cache
        self.finish_reason: str | None = None
        self.matched: int | str | None = None  # the stop token or stop string that ended it
        self.new = Delta()  # not yet streamed
        self._skips_special = body.skip_special_tokens is not False and not is_marked
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, self._skips_special)
        self._stops = StopStrings(body.stop_strings, keep=body.keeps_stop)
        self._keep_stop = body.keeps_stop
        self._stop_tokens = stop_tokens or {}
        self._decoded = 0  # characters so far, those held back by the stop strings among them
        self._held: list[tuple[int, TokenLogprob]] = []  # logprobs of tokens whose text is held back

    def feed(self, output: Output) -> None:
        """Add the output of one step of the engine."""
        delta = Delta()
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.cached_tokens += output.cached_tokens
        for i, token in enumerate(output.token_ids):
            delta.token_ids.append(token)
            if output.logprobs:
                self._held.append((self._decoded, output.logprobs[i]))
            is_stop = output.matched_stop is not None and i == len(output.token_ids) - 1
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
            stop = output.matched_stop
            self.matched = None if stop is None else self._stop_tokens.get(stop, stop)
            delta.text += self._stops.flush()
            if self._keep_stop and self._skips_special and stop is not None:
                delta.text += self._stop_tokens.get(stop, "")
        delta.logprobs = self._release(len(self.all.text) + len(delta.text))
        self.all += delta
        self.new += delta

    def described(self) -> dict[str, Any]:
        """For the log: all that was asked and answered, long texts cut."""
        prompt = self._tokenizer.decode(self.prompt_ids[:MAX_LOGGED], skip_special_tokens=False)
        return {"prompt": prompt[:MAX_LOGGED], "parameters": msgspec.to_builtins(self.request.params),
                "answer": self.all.text[:MAX_LOGGED], "finish_reason": self.finish_reason}  # fmt: skip

    def take_new(self) -> Delta:
        """The new part since the last call."""
        new, self.new = self.new, Delta()
        return new

    def _show(self, text: str, num_tokens: int) -> str:
        """The part of `text` that may be shown; the last of `num_tokens` tokens completed it."""
        self._decoded += len(text)
        return self._stops.push(text, may_stop=num_tokens > self.request.params.min_new_tokens)

    def _release(self, shown: int) -> list[tuple[int, TokenLogprob]]:
        """The logprobs of tokens that begin within the first `shown` characters; of all, if no text is held back."""
        nothing_held = not self._stops.matched and shown == self._decoded
        count = len(self._held) if nothing_held else sum(start < shown for start, _ in self._held)
        released, self._held = self._held[:count], self._held[count:]
        return released


class Generator:
    """What every generating endpoint uses: the tokenizer, the engine, the model's sampling defaults."""

    def __init__(self, args: ServerArgs, client: EngineClient | Replicas, tokenizer: Tokenizer,
                 model_path: str | None = None, tokenizer_path: str | None = None) -> None:  # fmt: skip
        """`model_path` and `tokenizer_path`: names that a client's transformers can open, if the flags are not."""
        self.args = args
        self.model_path = model_path or args.model_path
        self.tokenizer_path = tokenizer_path or args.tokenizer_path or self.model_path
        self.client = client
        self.tokenizer = tokenizer
        self.templates = TemplateProcess(tokenizer.template_source) if tokenizer.template_source else None
        self.is_serving = False  # after the warm-up
        self.metrics = Metrics(args.model_name, client)
        self._grammars = Grammars(tokenizer, lambda vocabulary: client.tell(vocabulary))
        self.tool_parser = args.tool_call_parser or parser_of(tokenizer.template_source)
        self.reasoning = REASONING_PARSERS[args.reasoning_parser] if args.reasoning_parser else None

    async def warm_up(self) -> None:
        """Generate one token, and have the chat template's process there. Raises ApiError when the first fails."""
        if self.templates is not None:
            try:
                await self.templates.start()
            except TemplateError as error:
                log.warning("%s", error)
        try:
            await self._grammars.learn(self.ready.vocab_size)
        except ApiError as error:
            log.warning("%s", error)
        request = Request(uuid4().hex, [0], SamplingParams(max_new_tokens=1, temperature=0.0))
        async for _ in self.client.stream([request]):
            pass

    async def close(self) -> None:
        """End the chat template's process."""
        if self.templates is not None:
            await self.templates.stop()

    @property
    def ready(self) -> Ready:
        """The engine's limits. Raises ApiError (503) while there is no engine."""
        if self.client.ready is None or self.client.lost is not None:
            raise ApiError(f"the engine is not there: {self.client.lost or 'the model is still loading'}", status=503)
        return self.client.ready

    async def encode(self, prompts: list[Prompt], names: list[str], add_special_tokens: bool = True, *,
                     is_truncated: bool = False) -> list[list[int]]:
        """The token ids of some prompts; `names` says which field each came in; is_truncated: they may be too
        long. Texts are tokenized in a thread, a slice at a time, so that whatever else is served goes on, and
        cancelling ends it. Raises ApiError."""
        limit, _ = self.ready.max_tokens()
        for prompt, name in zip(prompts, names, strict=True):
            if not is_truncated and isinstance(prompt, str) and len(prompt) > limit * self.tokenizer.longest_token:
                said = f"your {name} of {len(prompt)} characters is more than that"
                raise _refusal(too_long(self.ready, said, name, name))
        texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
        found = {i: prompt for i, prompt in enumerate(prompts) if not isinstance(prompt, str)}
        for part in _slices(list(texts), prompts):
            encoded = await self._tokenize([texts[i] for i in part], [names[i] for i in part], add_special_tokens)
            found.update(zip(part, encoded, strict=True))
        return [found[i] for i in range(len(prompts))]

    async def _tokenize(self, texts: list[str], names: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            if len(texts) == 1 and len(texts[0]) <= SHORT_TEXT:
                return [self.tokenizer.encode(texts[0], add_special_tokens)]
            return await asyncio.to_thread(self.tokenizer.encode_batch, texts, add_special_tokens)
        except TokenizerError as error:
            raise ApiError(f"{names[0]}: {error}", names[0], "invalid_value") from None

    async def render(self, messages: list[Message], tools: list[Tool], chosen: dict[str, Any] | None,
                     add_generation_prompt: bool) -> str:  # fmt: skip
        """The prompt text of a conversation, by the model's chat template. chosen: more of the template's variables.
        Raises ApiError."""
        variables = {**(chosen or {}), "add_generation_prompt": add_generation_prompt}
        if tools:
            variables["tools"] = [tool.model_dump(exclude_unset=True) for tool in tools]
        if self.templates is None:
            raise ApiError("messages: this model has no chat template: start the server with --chat-template FILE, "
                           "or use /v1/completions", "messages", "invalid_value")  # fmt: skip
        try:
            wire = [message.on_the_wire() for message in messages]
            return await self.templates.render(wire, self.tokenizer.template_variables(variables))
        except TemplateError as error:
            raise ApiError(f"messages: {error}", "messages", "invalid_value") from None

    async def grammar(self, body: Sampling, forced: Forced | None = None) -> str | None:
        """What the answer has to be, for the engine, which knows then what grammars are made of. forced: as for
        Grammars.of. Raises ApiError."""
        return await self._grammars.of(body, self.ready.vocab_size, forced)

    def check_model(self, name: str | None) -> None:
        """One model is served, under any name; but one that is a single slip away from its own is taken for a slip.
        Raises ApiError (404)."""
        ours = self.args.model_name
        if name is not None and name.casefold() != ours.casefold() and _is_one_slip(name, ours):
            raise ApiError(f"model: {name}: no such model; did you mean {ours}?", "model", "model_not_found", 404)

    def truncated(self, prompt_ids: list[int], count: int | None) -> list[int]:
        """The last `count` tokens of a prompt; -1: as many as leave space for an answer; None: all."""
        count = self.ready.max_tokens()[0] - 1 if count == -1 else count
        return prompt_ids if count is None else prompt_ids[max(0, len(prompt_ids) - count) :]

    def new_tokens(self, num_prompt: int, asked: int | None, default: int | None = None) -> int:
        """The number of tokens to generate: `asked`, else `default` or up to the limit, at least one."""
        if asked is not None:
            return asked
        left = max(1, self.ready.max_tokens()[0] - num_prompt)
        return left if default is None else min(default, left)

    def choices(self, prompt_ids: list[int], body: Sampling, max_new_tokens: int, names: tuple[str, str],
                first_index: int = 0, logprobs: Logprobs = NO_LOGPROBS, *,
                grammar: str | None = None, is_marked: bool = False) -> list[Choice]:
        """`body.n` choices of one prompt, each with a seed of its own.

        names   the fields that the prompt and max_new_tokens came in
        raises  ApiError if the engine cannot serve them, or --max-queued-requests wait already
        """
        self._check_queue()
        vocab, defaults = self.ready.vocab_size, self.ready.sampling_defaults
        settled = {"max_new_tokens": max_new_tokens, "bad_words": self._bad_words(body)}
        try:
            check_request(prompt_ids, body.sampling_params(defaults, **settled), self.ready, *names, logprobs.ids)
        except BadRequest as error:
            raise _refusal(error) from None
        if first_index + (body.n or 1) > MAX_CHOICES:
            raise ApiError(f"n: prompts times n may be at most {MAX_CHOICES}", "n", "invalid_value")
        added = self.tokenizer.added_ids
        named = {added[stop]: stop for stop in body.stop_strings if added.get(stop, vocab) < vocab}
        made = []
        for i in range(body.n or 1):
            params = body.sampling_params(defaults, **settled)
            ends = set() if params.ignore_eos else {token for token in self.tokenizer.end_ids if token < vocab}
            params.stop_token_ids = sorted({*params.stop_token_ids, *named, *ends})
            if params.seed is not None:
                params.seed += i
            choice = Choice(first_index + i, prompt_ids, params, self.tokenizer, body, logprobs, grammar=grammar,
                            is_marked=is_marked, stop_tokens=named)  # fmt: skip
            made.append(choice)
        return made

    def _bad_words(self, body: Sampling) -> list[list[int]]:
        """The tokens of the words that must not be in an answer, at its beginning and behind a space."""
        words = [space + word.lstrip() for word in body.bad_words or () for space in ("", " ")]
        return [ids for word in words if (ids := self.tokenizer.encode(word, add_special_tokens=False))]

    def _check_queue(self) -> None:
        if (limit := self.args.max_queued_requests) is None:
            return
        now = self.client.statistics
        beyond = self.client.num_live - self.args.max_running_requests * self.args.replicas
        if max(beyond, now.waiting if now else 0) >= limit:
            raise ApiError(f"{limit} requests wait already (--max-queued-requests); try again later",
                           code="rate_limit_exceeded", status=429)  # fmt: skip

    async def run(self, choices: list[Choice]) -> AsyncGenerator[Choice, None]:
        """Generate; yields a choice whenever it has new output. Closing the iterator aborts unfinished choices."""
        by_rid = {choice.request.rid: choice for choice in choices}
        watched = {choice.request.rid: Watch(self.metrics, len(choice.prompt_ids)) for choice in choices}
        why, deadline = "abort", None
        if limit := self.args.request_timeout:
            late = f"the request was not done within {limit:g} s (--request-timeout)"
            deadline = asyncio.get_running_loop().call_later(limit, self.client.expire, [*by_rid], late)
        try:
            async with aclosing(self.client.stream([choice.request for choice in choices])) as outputs:
                async for output in outputs:
                    choice = by_rid[output.rid]
                    if choice.finish_reason is not None:
                        continue  # tokens after a stop string
                    before = len(choice.all.token_ids)
                    choice.feed(output)
                    watched[output.rid].tokens(len(choice.all.token_ids) - before)
                    if choice.finish_reason is not None:
                        watched.pop(output.rid).end(choice.finish_reason)
                    if choice.finish_reason is not None and output.finish_reason is None:
                        self.client.abort(output.rid)
                    if choice.finish_reason is not None or len(choice.new.token_ids) >= self.args.stream_interval:
                        yield choice
        except ApiError:
            why = "error"
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
            for each in watched.values():
                each.end(why)


def _slices(indices: list[int], prompts: list[Prompt]) -> Iterator[list[int]]:
    """The indices in groups whose texts have about SLICE characters in total; a very long text is a group."""
    part: list[int] = []
    size = 0
    for i in indices:
        part.append(i)
        size += len(prompts[i])
        if size >= SLICE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _refusal(error: BadRequest) -> ApiError:
    return ApiError(str(error), error.param, error.code)


def _is_one_slip(given: str, name: str) -> bool:
    """Whether one letter more, less, another one, or two swapped make `name` of what was given."""
    short, long = sorted((given, name), key=len)
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(long) - len(short) == 1:
        return short[at:] == long[at + 1 :]
    swapped = short[at : at + 2] == long[at : at + 2][::-1] and short[at + 2 :] == long[at + 2 :]
    return len(long) == len(short) and given != name and (short[at + 1 :] == long[at + 1 :] or swapped)
