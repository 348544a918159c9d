"""OpenAI's two endpoints that generate: what their answers look like, whole and streamed."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from wave64.serve.generation import Choice, Delta, Generator
from wave64.serve.messages import TokenLogprob
from wave64.serve.protocol import ApiError, ChatRequest, CompletionRequest
from wave64.serve.tokenizer import TokenizerError

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; a chat may go on to the end of the context
LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON has not

Json = dict[str, Any]
Entry = tuple[int, int, TokenLogprob | None]  # where a token begins in the text, its id, what the model thought of it


class Completion:
    """One /v1/completions request."""

    kind = chunk_kind = "text_completion"

    def __init__(self, body: CompletionRequest, generator: Generator) -> None:
        self.body = body
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self.choices: list[Choice] = []

    async def prepare(self) -> None:
        """Check the prompts and make the choices. Raises ApiError."""
        body, prompts = self.body, self.body.prompts
        for i, prompt in enumerate(prompts):
            where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
            ids = await self.generator.encode(prompt, where)
            new = self.generator.room(len(ids), body.max_tokens, COMPLETION_TOKENS, "max_tokens", where)
            top = -1 if body.logprobs is None else body.logprobs
            scored = bool(body.echo and top >= 0)
            self.choices += self.generator.choices(ids, body, new, len(self.choices), top, scored)

    def prompt_text(self, choice: Choice) -> str:
        """What is put before a choice's text: the prompt, where echo asks for it."""
        if not self.body.echo:
            return ""
        prompt = self.body.prompts[choice.index // (self.body.n or 1)]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special_tokens=False)

    def whole(self, choice: Choice) -> Json:
        return self.part(choice, choice.all, is_first=True)

    def part(self, choice: Choice, delta: Delta, is_first: bool) -> Json:
        """A choice, or the part of it that is in `delta`."""
        before = self.prompt_text(choice)
        entries = [(len(before) + start, entry.id, entry) for start, entry in delta.logprobs]
        if is_first and self.body.echo and self.body.logprobs is not None:
            entries = self._prompt_entries(choice) + entries
        logprobs = None if self.body.logprobs is None else self._logprobs(entries)
        return {"text": (before if is_first else "") + delta.text, "logprobs": logprobs}

    def _prompt_entries(self, choice: Choice) -> list[Entry]:
        """The prompt's tokens; one that the tokenizer added in front takes no room in the text."""
        entries, start = [], 0
        for token, entry in zip(choice.prompt_ids, choice.prompt_logprobs, strict=True):
            entries.append((start, token, entry))
            is_special = not self.tokenizer.decode([token])
            start += 0 if is_special else len(self.tokenizer.token_text(token))
        return entries

    def _logprobs(self, entries: list[Entry]) -> Json:
        text = self.tokenizer.token_text
        tops: list[Json | None] = []
        for _, _, entry in entries:
            best: Json = {}
            for token, logprob in [(entry.id, entry.logprob), *entry.top] if entry else []:
                best[text(token)] = max(_finite(logprob), best.get(text(token), LEAST_LOGPROB))
            tops.append(best or None)
        return {
            "tokens": [text(token) for _, token, _ in entries],
            "token_logprobs": [_finite(entry.logprob) if entry else None for _, _, entry in entries],
            "top_logprobs": tops,
            "text_offset": [start for start, _, _ in entries],
        }

    def opening(self, choice: Choice) -> Json | None:
        """What a stream says of a choice before its first token, if anything."""
        return None


class Chat:
    """One /v1/chat/completions request."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, generator: Generator) -> None:
        self.body = body
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self.choices: list[Choice] = []

    async def prepare(self) -> None:
        """Check the messages and make the choices. Raises ApiError."""
        body = self.body
        begin = body.add_generation_prompt is not False
        try:
            text = self.tokenizer.apply_chat_template(
                [message.for_template() for message in body.messages],
                **{"add_generation_prompt": begin, **(body.chat_template_kwargs or {})},
            )
        except TokenizerError as error:
            raise ApiError(f"messages: {error}", "messages", "invalid_value") from None
        ids = await self.generator.encode(text, "messages", add_special_tokens=False)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        new = self.generator.room(len(ids), getattr(body, name), None, name, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else -1
        self.choices = self.generator.choices(ids, body, new, top_logprobs=top)

    def whole(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.all.text}
        return {"message": message, "logprobs": self._logprobs(choice.all)}

    def part(self, choice: Choice, delta: Delta, is_first: bool) -> Json:
        """The part of a choice that is in `delta`."""
        return {"delta": {"content": delta.text} if delta.text else {}, "logprobs": self._logprobs(delta)}

    def opening(self, choice: Choice) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _logprobs(self, delta: Delta) -> Json | None:
        if not self.body.logprobs:
            return None
        content = []
        for _, entry in delta.logprobs:
            tops = [self._token(token, logprob) for token, logprob in entry.top]
            content.append({**self._token(entry.id, entry.logprob), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text, raw = self.tokenizer.token_text(token), self.tokenizer.token_bytes(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


async def answer(job: Completion | Chat) -> Json:
    """The whole answer."""
    async for _ in job.generator.run(job.choices):
        pass
    done = [_with_end(job.whole(choice), choice) for choice in job.choices]
    return _envelope(job, job.kind) | {"choices": done, "usage": usage(job.choices, job.body.n or 1)}


async def stream(job: Completion | Chat) -> AsyncIterator[Json]:
    """The answer in parts, each choice's last with its finish_reason; the usage at the end, where it is asked for."""
    options = job.body.stream_options
    envelope, count = _envelope(job, job.chunk_kind), job.body.n or 1
    each = bool(options and options.continuous_usage_stats)

    def event(part: Json) -> Json:
        extra = {"usage": usage(job.choices, count)} if each else {}
        return envelope | {"choices": [part]} | extra

    seen: set[int] = set()
    async with aclosing(job.generator.run(job.choices)) as grown:
        async for choice in grown:
            is_first = choice.index not in seen
            seen.add(choice.index)
            if is_first and (opening := job.opening(choice)):
                yield event({"index": choice.index, **opening, "finish_reason": None})
            part = job.part(choice, delta := choice.take_new(), is_first)
            if delta.text or delta.logprobs or part.get("text") or choice.finish_reason:
                yield event(_with_end(part, choice))
    if options and options.include_usage:
        yield envelope | {"choices": [], "usage": usage(job.choices, count)}


def usage(choices: list[Choice], n: int) -> Json:
    """Tokens of the prompts, each counted once, and of all choices so far."""
    prompt = sum(len(choice.prompt_ids) for choice in choices[::n])
    completion = sum(len(choice.all.token_ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _envelope(job: Completion | Chat, kind: str) -> Json:
    prefix = "cmpl" if isinstance(job, Completion) else "chatcmpl"
    name = job.generator.args.model_name
    return {"id": f"{prefix}-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _with_end(part: Json, choice: Choice) -> Json:
    """The part with its choice's index and, once it has ended, why."""
    return {"index": choice.index, **part, "finish_reason": choice.finish_reason, "matched_stop": choice.matched}
