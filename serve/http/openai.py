"""OpenAI's two generating endpoints: the form of their answers, whole and streamed."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Generic, TypeVar
from uuid import uuid4

from wave64.serve.http import tools
from wave64.serve.http.detokenizer import Detokenizer
from wave64.serve.http.generation import Choice, Delta, Generator, Logprobs, Prompt
from wave64.serve.http.message import Message
from wave64.serve.http.reasoning import Thoughts, begins_in_thought, grammar_behind
from wave64.serve.http.schemas import ApiError, ChatRequest, CompletionRequest
from wave64.serve.messages import TokenLogprob

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; a chat may go on to the end of the context
MAX_ADDED = 8  # tokens that a tokenizer may put in front of a text
MIN_LOGPROB = -9999.0  # for minus infinity, which JSON cannot represent

B = TypeVar("B", CompletionRequest, ChatRequest)
Json = dict[str, Any]
Entry = tuple[int, int, TokenLogprob | None]  # a token's offset in the text, its id, its logprobs


class Job(Generic[B]):
    """One request to an OpenAI endpoint: prepare() makes its choices, then answer() or stream(); whole() and part() say
    how a choice is answered."""

    id_prefix: str
    kind: str  # the answer's "object"
    chunk_kind: str  # the same, of a part of a stream
    opening: Json | None = None  # the event of a choice before its first token, if it has one

    def __init__(self, body: B, generator: Generator) -> None:
        self.body = body
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self.choices: list[Choice] = []

    async def prepare(self) -> None:
        """Check the request and make the choices. Raises ApiError."""
        raise NotImplementedError

    async def answer(self) -> Json:
        """The whole answer."""
        async for _ in self.generator.run(self.choices):
            pass
        done = [self._with_end(self.whole(choice), choice) for choice in self.choices]
        used = {"usage": usage(self.choices, self.body.n or 1)}
        return self._envelope(self.kind) | {"choices": done} | used | self.about_prompt()

    async def stream(self) -> AsyncGenerator[Json, None]:
        """The answer in parts; the last of a choice has its finish_reason; usage follows at the end if requested."""
        options = self.body.stream_options
        envelope, count = self._envelope(self.chunk_kind), self.body.n or 1
        each, at_the_end = options and options.continuous_usage_stats, options and options.include_usage

        def event(part: Json) -> Json:
            """OpenAI's chunks have a null for usage before the one that has it."""
            extra = {"usage": usage(self.choices, count)} if each else {"usage": None} if at_the_end else {}
            return envelope | {"choices": [part]} | extra

        seen: set[int] = set()
        async with aclosing(self.generator.run(self.choices)) as grown:
            async for choice in grown:
                is_first = choice.index not in seen
                seen.add(choice.index)
                if is_first and self.opening is not None:
                    yield event({"index": choice.index, **self.opening, "finish_reason": None})
                part = self.part(choice, delta := choice.take_new(), is_first)
                if part.get("delta") or part.get("text") or delta.logprobs or choice.finish_reason:
                    yield event(self._with_end(part, choice))
        if at_the_end:
            yield envelope | {"choices": [], "usage": usage(self.choices, count)}

    def _envelope(self, kind: str) -> Json:
        name = self.generator.args.model_name
        return {"id": f"{self.id_prefix}-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

    def _with_end(self, part: Json, choice: Choice) -> Json:
        """The part with its choice's index and, once it has ended, why."""
        return {"index": choice.index, **part, "finish_reason": self.finish_reason(choice),
                "matched_stop": choice.matched}

    def about_prompt(self) -> Json:
        """What a whole answer has that is no choice's own."""
        return {}

    def whole(self, choice: Choice) -> Json:
        """A choice that has ended."""
        raise NotImplementedError

    def part(self, choice: Choice, delta: Delta, is_first: bool) -> Json:
        """The part of a choice that is in `delta`."""
        raise NotImplementedError

    def finish_reason(self, choice: Choice) -> str | None:
        """Why a choice has ended."""
        return choice.finish_reason

    def prompt_logprobs(self, choice: Choice) -> Json:
        """vLLM's form of the logprobs of a choice's prompt, if they are asked for."""
        top = self.body.num_prompt_logprobs
        return {"prompt_logprobs": [entry and self._ranked(entry, top) for entry in choice.prompt_logprobs]} \
            if top >= 0 else {}  # fmt: skip

    def _ranked(self, entry: TokenLogprob, top: int) -> Json:
        """A token and the most likely ones, by id. The rank of a token that is not among these is not known."""
        best = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:top], start=1)]
        text = self.tokenizer.token_text
        return {str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": text(token)}
                for token, logprob, rank in [(entry.id, entry.logprob, None), *best]}  # fmt: skip


class Completion(Job[CompletionRequest]):
    """One /v1/completions request."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, generator: Generator) -> None:
        super().__init__(body, generator)
        self._echoes: list[str] = []  # the prompts' texts, if echo is set
        self._offsets: list[list[int]] = []  # of their tokens in these, where they are scored

    async def prepare(self) -> None:
        body, prompts = self.body, self.body.prompts
        names = ["prompt"] if len(prompts) == 1 else [f"prompt[{i}]" for i in range(len(prompts))]
        top = -1 if body.logprobs is None else body.logprobs
        scored = bool(body.echo and top >= 0)
        logprobs = Logprobs(top, max(top if scored else -1, body.num_prompt_logprobs))
        grammar = await self.generator.grammar(body)
        encoded = await self.generator.encode(prompts, names, body.add_special_tokens is not False,
                                              is_truncated=body.truncate_prompt_tokens is not None)  # fmt: skip
        encoded = [self.generator.truncated(ids, body.truncate_prompt_tokens) for ids in encoded]
        for ids, name in zip(encoded, names, strict=True):
            new = self.generator.new_tokens(len(ids), body.max_tokens, COMPLETION_TOKENS)
            self.choices += self.generator.choices(ids, body, new, (name, "max_tokens"), len(self.choices), logprobs,
                                                   grammar=grammar)  # fmt: skip
        if body.echo:
            self._echoes = await asyncio.to_thread(lambda: [self._text(prompt) for prompt in prompts])
        if scored:
            self._offsets = await asyncio.to_thread(lambda: list(map(self._prompt_offsets, prompts, encoded)))

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special_tokens=False)

    def _prompt_text(self, choice: Choice) -> str:
        """The text before a choice's text: the prompt if echo is set."""
        return self._echoes[choice.index // (self.body.n or 1)] if self.body.echo else ""

    def whole(self, choice: Choice) -> Json:
        return self.part(choice, choice.all, is_first=True) | self.prompt_logprobs(choice)

    def part(self, choice: Choice, delta: Delta, is_first: bool) -> Json:
        before = self._prompt_text(choice)
        entries: list[Entry] = [(len(before) + start, entry.id, entry) for start, entry in delta.logprobs]
        if is_first and self.body.echo and self.body.logprobs is not None:
            offsets = self._offsets[choice.index // (self.body.n or 1)]
            entries = [*zip(offsets, choice.prompt_ids, choice.prompt_logprobs, strict=True), *entries]
        logprobs = None if self.body.logprobs is None else self._logprobs(entries)
        return {"text": (before if is_first else "") + delta.text, "logprobs": logprobs}

    def _prompt_offsets(self, prompt: Prompt, ids: list[int]) -> list[int]:
        """Where in the prompt's text each of its tokens begins. One that continues a character begins where that one
        does; one that the tokenizer added has no character in the text."""
        of_text = ids if isinstance(prompt, list) else self.tokenizer.encode(prompt, add_special_tokens=False)
        begin = next((i for i in range(min(len(ids), MAX_ADDED)) if ids[i : i + len(of_text)] == of_text), 0)
        detokenizer, start, offsets = Detokenizer(self.tokenizer, [], skip_special_tokens=False), 0, []
        for i, token in enumerate(ids):
            offsets.append(start)
            if begin <= i < begin + len(of_text):
                start += len(detokenizer.push([token]))
        return offsets

    def _logprobs(self, entries: list[Entry]) -> Json:
        text = self.tokenizer.token_text
        tops: list[Json | None] = []
        for _, _, entry in entries:
            best: Json = {}
            for token, logprob in [(entry.id, entry.logprob), *entry.top[: self.body.logprobs]] if entry else []:
                best[text(token)] = max(_finite(logprob), best.get(text(token), MIN_LOGPROB))
            tops.append(best or None)
        return {
            "tokens": [text(token) for _, token, _ in entries],
            "token_logprobs": [_finite(entry.logprob) if entry else None for _, _, entry in entries],
            "top_logprobs": tops,
            "text_offset": [start for start, _, _ in entries],
        }


class Chat(Job[ChatRequest]):
    """One /v1/chat/completions request."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening: Json | None = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def __init__(self, body: ChatRequest, generator: Generator) -> None:
        super().__init__(body, generator)
        self._messages: list[Message] = []  # of the choices

    async def prepare(self) -> None:
        body = self.body
        begin = body.add_generation_prompt is not False and not body.continue_final_message
        text = await self.generator.render(body.messages, body.usable_tools, body.chat_template_kwargs, begin)
        if body.continue_final_message:
            text = _cut_behind(text, body.messages[-1].text)
        marks, parser = self.generator.reasoning, self.generator.tool_parser
        in_thought = marks is not None and begins_in_thought(marks, text)
        grammar = await self.generator.grammar(body, tools.forced(body))
        if grammar is not None and marks is not None:
            grammar = grammar_behind(marks, in_thought, grammar, self.tokenizer.added_ids)
        (ids,) = await self.generator.encode([text], ["messages"], bool(body.add_special_tokens),
                                             is_truncated=body.truncate_prompt_tokens is not None)  # fmt: skip
        ids = self.generator.truncated(ids, body.truncate_prompt_tokens)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        new = self.generator.new_tokens(len(ids), getattr(body, name))
        top = (body.top_logprobs or 0) if body.logprobs else -1
        is_marked = marks is not None or (bool(body.usable_tools) and parser is not None)
        logprobs = Logprobs(top, body.num_prompt_logprobs)
        self.choices = self.generator.choices(ids, body, new, ("messages", name), logprobs=logprobs, grammar=grammar,
                                              is_marked=is_marked)  # fmt: skip
        separate = marks if body.separate_reasoning is not False else None
        for _ in self.choices:
            thoughts = Thoughts(separate, in_thought) if separate is not None else None
            self._messages.append(Message(thoughts, tools.reader(body, parser)))

    def whole(self, choice: Choice) -> Json:
        return {"message": self._messages[choice.index].whole(choice.all.text), "logprobs": self._logprobs(choice.all)}

    def part(self, choice: Choice, delta: Delta, is_first: bool) -> Json:
        said = self._messages[choice.index].delta(delta.text, choice.finish_reason is not None)
        return {"delta": said, "logprobs": self._logprobs(delta)}

    def finish_reason(self, choice: Choice) -> str | None:
        has_called = choice.finish_reason == "stop" and self._messages[choice.index].has_called
        return "tool_calls" if has_called else choice.finish_reason

    def about_prompt(self) -> Json:
        return self.prompt_logprobs(self.choices[0])

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


def _cut_behind(prompt: str, said: str) -> str:
    """A prompt without the text that a chat template appends to the last message, which continues. Raises ApiError."""
    at = prompt.rfind(said.strip())
    if at < 0 or not said.strip():
        raise ApiError("continue_final_message: the chat template does not show the last message as it is",
                       "continue_final_message", "invalid_value")  # fmt: skip
    kept = said.lstrip()  # templates may strip it, or not
    return prompt[:at] + (kept if prompt.startswith(kept, at) else said.strip())


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def usage(choices: list[Choice], n: int) -> Json:
    """Tokens of the prompts, each counted once, and of all choices so far."""
    prompt = sum(len(choice.prompt_ids) for choice in choices[::n])
    completion = sum(len(choice.all.token_ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices[::n])}}
