"""The fields of request bodies.

One pydantic model per endpoint. Null means "the default", as OpenAI's clients send it. A field is either used, known to
be without effect on the answer (`neutral`), or refused by name: nothing that would change the answer is passed over.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from wave64.serve.http.neutral import asks_for_nothing, objection
from wave64.serve.messages import SamplingParams

MAX_CHOICES = 4096  # prompts times n in one request
MAX_MESSAGES = 1 << 14
MAX_TOOLS = 1024
MAX_BIASES = 4096
MAX_STOPS = 1024  # each is looked for at every token
MAX_STOP_LENGTH = 1 << 14  # characters of all stop strings together, for the same reason
MAX_SAID = 2000  # characters of an error message, which may quote the request
MAX_TOP_LOGPROBS = 20
TEXT_PARTS = ("input_text", "output_text")  # what /v1/responses calls a part that is text
SPACES = r"[\x20\x0A\x0D\x09]{1,32}"  # of JSON in a prescribed form: a model must not go on with spaces for ever
GREEDY_BELOW = 1e-6  # a temperature that is none

# What the server itself hands to a chat template or to its renderer, as it does bos_token and the like.
TEMPLATE_FIELDS = ("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message",
                   "chat_template", "tokenize", "tokenizer", "return_dict", "raise_exception",
                   "strftime_now")  # fmt: skip


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # of errors, by status


class ApiError(Exception):
    """An answer of status 4xx or 5xx: OpenAI's error object with `message`, `param` (the field at fault) and `code`."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        message = _cut(message, MAX_SAID)
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
        param = None if param is None else _cut(param, MAX_SAID)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _whole(value: Any) -> Any:
    """5.0 is 5: some clients know no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flag(value: Any) -> Any:
    """1 is true, 0 is false."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def _number_of_logprobs(value: Any) -> Any:
    """true is 1, false is none: chat's form of the field, sent to completions."""
    return {True: 1, False: None}[value] if isinstance(value, bool) else value


Int = Annotated[int, BeforeValidator(_whole)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Count = Annotated[Int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[Int, Field(ge=0, lt=2**31)]
First = Field(fail_fast=True)  # report the first fault of a list, and do not look for a million others
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOPS), First]
# For /openapi.json; prompts_of() reads them, which says what is wrong of a long list sooner.
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Ids = WithJsonSchema({"anyOf": [_IDS, {"type": "array", "items": _IDS, "minItems": 1}]})
Prompts = WithJsonSchema({"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, _IDS,
    {"type": "array", "items": _IDS, "minItems": 1}]})  # fmt: skip
TopLogprobs = Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
Start = Annotated[Int, Field(ge=-1)]  # where in the prompt; -1: at the new tokens
Seed = Annotated[Int, Field(ge=-(2**63), lt=2**63 - 128)]


class Body(BaseModel):
    """Base of the models of all bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def look_through(self) -> None:
        """The checks that take long for a long body; callers run them in a thread. Raises ApiError."""

    @model_validator(mode="before")
    @classmethod
    def _weigh_unknown_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        known = {}
        for name, value in body.items():
            if name in cls.model_fields:
                known[name] = value
            elif not asks_for_nothing(name, value):
                why = objection(name, cls.model_fields)
                raise ApiError(f"{name}: {why}", name, "unsupported_parameter")
        return known

    def faults(self) -> Iterator[tuple[str, str]]:
        """(field, what was expected and what was given) where that depends on several fields, or on a whole list."""
        return iter(())

    @model_validator(mode="after")
    def _look_for_faults(self) -> Any:
        for field, why in self.faults():
            raise ApiError(f"{field}: {why}", field.partition(".")[0], "invalid_value")
        return self


class Sampling(Body):
    """Fields with the same names in both families of endpoints."""

    # names in SamplingParams that differ from the endpoint's
    renamed: ClassVar[dict[str, str]] = {}

    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop: str | Annotated[list[str], First] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    no_stop_trim: Flag | None = None
    include_stop_str_in_output: Flag | None = None  # vLLM's name for it
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    bad_words: Annotated[list[str], Field(max_length=MAX_STOPS), First] | None = None
    # the form of the answer: serve.http.grammar
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        if (count := len(self.stop_strings)) > MAX_STOPS:
            yield "stop", f"expected at most {MAX_STOPS} strings, got {count}"
        for name, texts in (("stop", self.stop_strings), ("bad_words", self.bad_words or [])):
            if (length := sum(map(len, texts))) > MAX_STOP_LENGTH:
                yield name, f"expected at most {MAX_STOP_LENGTH} characters in all strings, got {length}"
        if "" in self.stop_strings:
            yield "stop", "expected strings of at least one character, got ''"
        if not all(map(str.strip, self.bad_words or ())):
            yield "bad_words", "expected words, got one without a letter"
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                yield "logit_bias", f"expected token ids as keys, got {short(token)}"

    @property
    def keeps_stop(self) -> bool:
        """Whether a stop string or token that ends an answer is part of its text."""
        return bool(self.no_stop_trim or self.include_stop_str_in_output)

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling_params(self, defaults: dict[str, float], **settled: Any) -> SamplingParams:
        """The engine's form of these fields: the request's word, else the model's, else the neutral value."""
        values: dict[str, Any] = dict(defaults)
        for name in type(self).model_fields:
            if (value := getattr(self, name)) is not None:
                values[self.renamed.get(name, name)] = value
        if self.logit_bias:
            values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        values |= settled
        if values.get("temperature", 1.0) < GREEDY_BELOW:
            values["temperature"] = 0.0
        fields = SamplingParams.__struct_fields__
        return SamplingParams(**{name: value for name, value in values.items() if name in fields})


class StreamOptions(Body):
    """Which extras a stream carries."""

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class _OpenAI(Sampling):
    renamed: ClassVar[dict[str, str]] = {"min_tokens": "min_new_tokens"}

    model: str | None = None  # one model is served, under any name that is not nearly its own
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    seed: Seed | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None  # the last so many; -1: as many as fit
    prompt_logprobs: TopLogprobs | None = None  # vLLM's, as are the next
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        options = self.stream_options
        if options and (options.include_usage or options.continuous_usage_stats) and not self.stream:
            yield "stream_options", "allowed only with stream: true"
        if self.prompt_logprobs is not None and self.stream:
            yield "prompt_logprobs", "not allowed with stream: true"

    @property
    def num_prompt_logprobs(self) -> int:
        """How many of the most likely tokens go with each of the prompt's; -1: it is not scored."""
        return -1 if self.prompt_logprobs is None else self.prompt_logprobs


class CompletionRequest(_OpenAI):
    """POST /v1/completions"""

    prompt: Annotated[Any, Prompts] = None
    add_special_tokens: Flag | None = None
    echo: Flag | None = None
    logprobs: Annotated[TopLogprobs | None, BeforeValidator(_number_of_logprobs)] = None
    best_of: Annotated[Int, Field(ge=1)] | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        if self.best_of is not None and self.best_of != (self.n or 1):
            yield "best_of", f"not supported by wave64 other than n, {self.n or 1}, got {self.best_of}"

    def look_through(self) -> None:
        assert self.prompts

    @cached_property
    def prompts(self) -> list[str | list[int]]:
        return prompts_of(self.prompt, "prompt")


class Part(BaseModel):
    """Base of what a body is made of. What is not known of it is handed on, to chat templates."""

    model_config = ConfigDict(extra="allow", strict=True)


class TextPart(Part):
    """A part of a message's content. Images and sound are refused by their type."""

    type: Annotated[Literal["text"], BeforeValidator(lambda kind: "text" if kind in TEXT_PARTS else kind)]
    text: str


class Message(Part):
    """One turn of a conversation. What a chat template gets of it: `templates.Template.prepare`."""

    role: Annotated[str, Field(min_length=1)]
    content: str | Annotated[list[TextPart], First] | None = None

    @property
    def text(self) -> str:
        """The text of its content."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    def on_the_wire(self) -> dict[str, Any]:
        """The message as it came."""
        parts = self.content
        content = [{"type": "text", "text": part.text} for part in parts] if isinstance(parts, list) else parts
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class Function(Part):
    """A function that a model may call."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Part):
    """OpenAI's envelope of a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """Of the function that has to be called."""

    name: str


class NamedTool(Part):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_OpenAI):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), First]
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    add_special_tokens: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), First] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    separate_reasoning: Flag | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        if self.forces_call and not self.usable_tools:
            if isinstance(self.tool_choice, NamedTool) and self.tools:
                names = ", ".join(tool.function.name for tool in self.tools)
                yield "tool_choice", f"expected one of the tools, {names}, got {self.tool_choice.function.name}"
            else:
                yield "tool_choice", "allowed only with tools"
        if self.top_logprobs and not self.logprobs:
            yield "top_logprobs", "allowed only with logprobs: true"
        if self.continue_final_message and self.add_generation_prompt:
            yield "continue_final_message", "not allowed with add_generation_prompt: true"
        if self.continue_final_message and (role := self.messages[-1].role) != "assistant":
            yield "continue_final_message", f"expected an assistant's message at the end, got one of {role}"
        for name in self.chat_template_kwargs or {}:
            if name in TEMPLATE_FIELDS or name.endswith("_token"):
                yield (f"chat_template_kwargs.{name}", "set by the server, expected variables of the template's own, "
                                                       "such as enable_thinking")

    @property
    def forces_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @cached_property
    def usable_tools(self) -> list[Tool]:
        """The tools that may be called."""
        choice = self.tool_choice
        tools = [] if choice == "none" else self.tools or []
        name = choice.function.name if isinstance(choice, NamedTool) else None
        return [tool for tool in tools if name in (None, tool.function.name)]


class NativeSampling(Sampling):
    """`sampling_params` of POST /generate"""

    renamed: ClassVar[dict[str, str]] = {"sampling_seed": "seed"}

    max_new_tokens: Count | None = None
    min_new_tokens: Count | None = None
    sampling_seed: Seed | None = None


class GenerateRequest(Body):
    """POST /generate, SGLang's own form. A list has an entry per prompt; a single value applies to all."""

    model: str | None = None  # added by routers
    rid: str | Annotated[list[str], First] | None = None  # for /abort_request; of several choices with _0, _1, ...
    text: str | Annotated[list[str], First] | None = None
    input_ids: Annotated[Any, Ids] = None
    sampling_params: NativeSampling | Annotated[list[NativeSampling], First] | None = None
    stream: Flag | None = None
    return_logprob: Flag | Annotated[list[Flag], First] | None = None
    logprob_start_len: Start | Annotated[list[Start], First] | None = None
    top_logprobs_num: TopLogprobs | Annotated[list[TopLogprobs], First] | None = None
    token_ids_logprob: TokenIds | Annotated[list[TokenIds], First] | None = None

    def look_through(self) -> None:
        assert self.prompts

    @property
    def is_batch(self) -> bool:
        given = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) and not (given and isinstance(given[0], int))

    @cached_property
    def prompts(self) -> list[str | list[int]]:
        if (self.text is None) == (self.input_ids is None):
            raise ApiError("text, input_ids: expected one of the two", "text", "invalid_value")
        if self.text is not None:
            return prompts_of(self.text, "text")
        if isinstance(self.input_ids, str):
            raise ApiError("input_ids: expected token ids, got a string; that goes into text", "input_ids")
        return prompts_of(self.input_ids, "input_ids")

    @property
    def logprob_ids(self) -> list[list[int]]:
        """For each prompt the tokens whose logprobs are asked for; one list applies to all."""
        asked = self.token_ids_logprob or []
        if asked and isinstance(asked[0], list):
            return self.per_prompt("token_ids_logprob", [])
        return [asked] * len(self.prompts)  # pyright: ignore[reportReturnType]: not nested

    def per_prompt(self, name: str, default: Any) -> list[Any]:
        """The field's value for each prompt."""
        value, count = getattr(self, name), len(self.prompts)
        if not isinstance(value, list):
            return [default if value is None else value] * count
        if len(value) != count:
            raise ApiError(f"{name}: expected an entry for each of {count} prompts, got {len(value)}", name)
        return value


def prompts_of(value: Any, param: str) -> list[str | list[int]]:
    """The prompts in a text, a list of texts, a list of token ids or a list of those. Raises ApiError."""

    def refuse(where: str, got: Any) -> ApiError:
        expected = "a string, token ids, or a list of either"
        return ApiError(f"{where}: expected {expected}, got {short(got)}", param, "invalid_type")

    if value is None:
        raise ApiError(f"{param}: required, a string, token ids, or a list of either", param, "missing")
    if not isinstance(value, str | list):
        raise refuse(param, value)
    is_one = isinstance(value, str) or (bool(value) and {*map(type, value)} <= {int, float, bool, type(None)})
    prompts: list[Any] = [value] if is_one else list(value)
    if not prompts:
        raise ApiError(f"{param}: empty, expected at least one prompt", param, "empty_prompt")
    if len(prompts) > MAX_CHOICES:
        raise ApiError(f"{param}: expected at most {MAX_CHOICES} prompts, got {len(prompts)}", param, "invalid_value")
    for i, prompt in enumerate(prompts):
        where = param if is_one else f"{param}[{i}]"
        if not isinstance(prompt, str | list):
            raise refuse(where, prompt)
        if prompt == []:  # an empty text may become a bos
            raise ApiError(f"{where}: empty, expected at least one token", param, "empty_prompt")
        if isinstance(prompt, list) and {*map(type, prompt)} != {int}:
            prompts[i] = prompt = [_whole(t) for t in prompt]
            if odd := [t for t in prompt if type(t) is not int]:
                raise ApiError(f"{where}: expected token ids, got {short(odd[0])}", param, "invalid_type")
    return prompts


def short(value: Any) -> str:
    return _cut(json.dumps(value, default=str), 60)
