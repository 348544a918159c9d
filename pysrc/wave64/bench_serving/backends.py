"""What a request is on each endpoint that can be measured, and how its answer is read."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from wave64.bench_serving.datasets import Ids, Row
from wave64.bench_serving.http import exchange

Json = dict[str, Any]

PATHS = {"wave64": "/generate", "sglang": "/generate", "sglang-native": "/generate", "sglang-oai": "/v1/completions",
         "sglang-oai-chat": "/v1/chat/completions", "vllm": "/v1/completions",
         "vllm-chat": "/v1/chat/completions"}  # fmt: skip
DEFAULT_PORTS = {name: 8000 if name.startswith("vllm") else 30000 for name in PATHS}


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Json | None = None


class _Meta(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class _Said(Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct):
    text: str = ""
    delta: _Said | None = None
    message: _Said | None = None


class _Event(Struct):
    """What is read of an event, or of a whole answer, of any endpoint."""

    text: str | None = None
    meta_info: _Meta | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass
class Answer:
    """What came of one request. Times are in seconds, `start` on time.perf_counter's clock."""

    sent_len: int = 0  # tokens of the prompt by the client's count, which the tokenizer adds some to; 0: unknown
    prompt_len: int = 0  # by the server's
    output_len: int = 0
    start: float = 0.0
    latency: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    text: str = ""
    cached_tokens: int = 0
    success: bool = False
    error: str = ""


class _Reader:
    """Takes an answer's body as it arrives."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""  # a line that has not ended
        self._others: list[bytes] = []  # lines that are no event: a whole answer, or what went wrong
        self._last = 0.0  # when a token came
        self._is_whole = False

    def take(self, data: bytes) -> None:
        """More of the body. Raises ValueError for an event that is no JSON, or that says what went wrong."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                event = line[5:].strip()
                if event == b"[DONE]":
                    self._is_whole = True
                else:
                    self._event(_decode(event), now)
            else:
                self._others.append(line)

    def finish(self, status: int, is_stream: bool) -> None:
        """The body has ended. Raises ValueError if it is not what it should be."""
        body = b"\n".join([*self._others, self._rest])
        if status != 200:
            raise ValueError(f"status {status}: {body.decode(errors='replace')[:500]}")
        if not is_stream:
            self._event(_decode(body), time.perf_counter())
        elif not self._is_whole:
            raise ValueError("the stream ended without [DONE]")
        self._answer.latency = time.perf_counter() - self._answer.start

    def _event(self, event: _Event, now: float) -> None:
        answer = self._answer
        if event.error is not None:
            raise ValueError(str(event.error)[:500])
        new = 0
        if event.meta_info is not None:
            meta = event.meta_info
            new, answer.output_len = meta.completion_tokens - answer.output_len, meta.completion_tokens
            answer.text = event.text or ""
            answer.prompt_len, answer.cached_tokens = meta.prompt_tokens, meta.cached_tokens
        if event.choices and (text := _text_of(event.choices[0])):
            new, answer.text = 1, answer.text + text
        if event.usage is not None:
            answer.output_len, answer.prompt_len = event.usage.completion_tokens, event.usage.prompt_tokens
            answer.cached_tokens = (event.usage.prompt_tokens_details or {}).get("cached_tokens", 0)
        if new > 0:
            if answer.ttft:
                answer.itl += [(now - self._last) / new] * new
            else:
                answer.ttft = now - answer.start
            self._last = now


def _text_of(choice: _Choice) -> str:
    said = choice.delta or choice.message
    return choice.text if said is None else (said.reasoning_content or "") + (said.content or "")


@dataclass(frozen=True)
class Target:
    """A server's endpoint, and how its requests are made."""

    backend: str
    base_url: str
    model: str
    headers: dict[str, str]
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    logprobs: Json = field(default_factory=dict)  # the fields of /generate
    extra: Json = field(default_factory=dict)  # fields of every request's body

    @property
    def is_native(self) -> bool:
        return PATHS[self.backend] == "/generate"

    @property
    def is_chat(self) -> bool:
        return PATHS[self.backend].endswith("chat/completions")

    def body(self, prompt: str | Ids | list[Json], row: Row) -> Json:
        """The request that continues `prompt` by as many tokens as `row` asks for."""
        if self.is_native:
            sampling: Json = {"temperature": self.temperature, "max_new_tokens": row.output_len,
                              "ignore_eos": self.ignore_eos}  # fmt: skip
            if self.top_p < 1:
                sampling["top_p"] = self.top_p
            name = "text" if isinstance(prompt, str) else "input_ids"
            body: Json = {name: prompt, "sampling_params": sampling, "stream": self.stream, **self.logprobs}
        else:
            body = {"model": self.model, "max_tokens": row.output_len, "temperature": self.temperature,
                    "top_p": self.top_p, "ignore_eos": self.ignore_eos, "stream": self.stream}  # fmt: skip
            if self.stream:
                body["stream_options"] = {"include_usage": True}
            if self.is_chat:
                body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            else:
                body["prompt"] = prompt
            if self.logprobs.get("return_logprob"):
                top = self.logprobs.get("top_logprobs_num", 0)
                body |= {"logprobs": True, "top_logprobs": top} if self.is_chat else {"logprobs": top}
        return {**body, **self.extra, **row.extra}

    async def ask(self, prompt: str | Ids | list[Json], row: Row, sent_len: int = 0) -> Answer:
        """Send one request. An error is in the answer."""
        answer = Answer(sent_len, sent_len)
        reader = _Reader(answer)
        body = json.dumps(self.body(prompt, row)).encode()
        answer.start = time.perf_counter()
        try:
            status = await exchange("POST", self.base_url + PATHS[self.backend], body, self.headers, reader.take)
            reader.finish(status, self.stream)
            answer.success = True
        except (OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    async def talk(self, row: Row) -> list[Answer]:
        """The turns of a conversation, one after the other, each with all that was said before; it ends at an error."""
        if len(row.turns) == 1:
            return [await self.ask(row.turns[0], row, row.prompt_len)]
        answers: list[Answer] = []
        said: Any = [] if self.is_chat or not isinstance(row.turns[0], str) else ""
        for turn in row.turns:
            said = said + ([{"role": "user", "content": turn}] if self.is_chat else turn)
            answers.append(answer := await self.ask(said, row))
            if not answer.success:
                break
            if self.is_chat:
                said = [*said, {"role": "assistant", "content": answer.text}]
            else:
                said = said + (answer.text if isinstance(said, str) else row.encode(answer.text))
        return answers
