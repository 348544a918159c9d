"""What a request body may hold, and what is wrong with one that is refused.

One pydantic model per endpoint. Null means "the default", as OpenAI's clients send it. A field is either used, known to
be without effect on the answer, or refused by name: nothing that would change the answer is passed over.
"""

import difflib
import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wave64.serve.messages import SamplingParams

MAX_CHOICES = 4096  # prompts times n in one request
MAX_TOP_LOGPROBS = 20
GREEDY_BELOW = 1e-6  # a temperature that is none


class ApiError(Exception):
    """An answer of status 4xx or 5xx: OpenAI's error object with `message`, `param` (the field at fault) and `code`."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 404: "not_found_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# Sent by clients, of no effect on the tokens of the answer.
WITHOUT_EFFECT = frozenset((
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "reasoning_effort", "verbosity", "rid", "request_id", "priority", "log_metrics",
    "background", "spaces_between_special_tokens", "separate_reasoning", "stream_reasoning",
    "return_text_in_logprobs",
))  # fmt: skip

# Changes the answer and is not there: the values of each that ask for nothing.
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "stop_regex": ([], ""),
    "beam_width": (1,),
    "use_beam_search": (False,),
    "custom_params": ({},),
    "custom_logit_processor": (),
    "lora_path": (),
    "input_embeds": (),
    "image_data": ([],),
    "audio_data": ([],),
    "video_data": ([],),
    "token_ids_logprob": ([],),
    "return_hidden_states": (False,),
    "continue_final_message": (False,),
    "session_params": ({},),
}

Count = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _weigh_unknown_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        known = {}
        for name, value in body.items():
            if name in cls.model_fields:
                known[name] = value
            elif name in NOT_THERE:
                if value is not None and value not in NOT_THERE[name]:
                    raise ApiError(f"{name}: not supported by wave64; leave it out", name, "unsupported_parameter")
            elif name not in WITHOUT_EFFECT:
                near = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ApiError(f"{name}: unknown field{hint}", name, "unknown_parameter")
        return known


class Sampling(_Body):
    """What both families of endpoints call by the same names."""

    # our name in SamplingParams for what the endpoint calls otherwise
    renamed: ClassVar[dict[str, str]] = {}

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None

    @model_validator(mode="after")
    def _check_stop(self) -> Any:
        if "" in self.stop_strings:
            raise ApiError("stop: expected strings of at least one character, got ''", "stop", "invalid_value")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling_params(self, defaults: dict[str, float], **settled: Any) -> SamplingParams:
        """The engine's form of these fields: the request's word, else the model's, else the neutral value."""
        values = dict(defaults)
        for name in type(self).model_fields:
            if (value := getattr(self, name)) is not None:
                values[self.renamed.get(name, name)] = value
        values |= settled
        if values.get("temperature", 1.0) < GREEDY_BELOW:
            values["temperature"] = 0.0
        fields = SamplingParams.__struct_fields__
        return SamplingParams(**{name: value for name, value in values.items() if name in fields})


class StreamOptions(_Body):
    """Which extras a stream carries."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _OpenAI(Sampling):
    renamed: ClassVar[dict[str, str]] = {"min_tokens": "min_new_tokens"}

    model: str | None = None  # one model is served, under any name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - 128)] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options: allowed only with stream: true", "stream_options", "invalid_value")
        return self


class CompletionRequest(_OpenAI):
    """POST /v1/completions"""

    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Any:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(f"best_of: not supported by wave64 other than n, {self.n or 1}, got {self.best_of}",
                           "best_of", "unsupported_parameter")  # fmt: skip
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompts_of(self.prompt, "prompt")


class TextPart(BaseModel):
    """A part of a message's content. Images and sound are refused by their type."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation; further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one string, which is what templates of text models expect."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        return {"role": self.role, "content": text, **(self.model_extra or {})}


class ChatRequest(_OpenAI):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Any:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs: allowed only with logprobs: true", "top_logprobs", "invalid_value")
        return self


class NativeSampling(Sampling):
    """`sampling_params` of POST /generate"""

    renamed: ClassVar[dict[str, str]] = {"sampling_seed": "seed"}

    max_new_tokens: Count | None = None
    min_new_tokens: Count | None = None
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - 128)] | None = None


class GenerateRequest(_Body):
    """POST /generate, SGLang's own form. A list has an entry per prompt; what is not one serves all."""

    text: str | list[str] | None = None
    input_ids: Any = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None

    @property
    def is_batch(self) -> bool:
        given = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) and not (given and isinstance(given[0], int))

    @property
    def prompts(self) -> list[str | list[int]]:
        if (self.text is None) == (self.input_ids is None):
            raise ApiError("text, input_ids: expected one of the two", "text", "invalid_value")
        if self.text is not None:
            return prompts_of(self.text, "text")
        if isinstance(self.input_ids, str):
            raise ApiError("input_ids: expected token ids, got a string; that goes into text", "input_ids")
        return prompts_of(self.input_ids, "input_ids")

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
        return ApiError(f"{where}: expected {expected}, got {_short(got)}", param, "invalid_type")

    if value is None:
        raise ApiError(f"{param}: required, a string, token ids, or a list of either", param, "missing")
    if not isinstance(value, str | list):
        raise refuse(param, value)
    is_one = isinstance(value, str) or (bool(value) and all(isinstance(v, int | float | None) for v in value))
    prompts = [value] if is_one else value
    if not prompts:
        raise ApiError(f"{param}: empty, expected at least one prompt", param, "empty_prompt")
    for i, prompt in enumerate(prompts):
        where = param if is_one else f"{param}[{i}]"
        if not isinstance(prompt, str | list):
            raise refuse(where, prompt)
        if not prompt:
            raise ApiError(f"{where}: empty, expected at least one token", param, "empty_prompt")
        if isinstance(prompt, list) and (odd := [t for t in prompt if type(t) is not int]):
            raise ApiError(f"{where}: expected token ids, got {_short(odd[0])}", param, "invalid_type")
    return prompts


T = TypeVar("T", bound=BaseModel)


def parse(model: type[T], raw: bytes) -> T:
    """The body of a request. Raises ApiError that says what is wrong with it and where."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at position {error.start}"
        raise ApiError(f"the body: expected JSON in UTF-8, got {got}", code="invalid_utf8") from None
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _in_words(error) from None


def _in_words(error: ValidationError) -> ApiError:
    """The fault that pydantic found deepest in the body; of a union's branches there, all in one sentence."""
    faults = [(_path(fault["loc"]), fault) for fault in error.errors(include_url=False)]
    path, first = max(faults, key=lambda found: len(found[0]))  # the first of the deepest
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".") or "the body"
    param = str(path[0]) if path else None
    if first["type"] == "json_invalid":
        return ApiError(f"the body: expected JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(f"{where}: required", param, "missing")
    wanted = ", or ".join(dict.fromkeys(_wanted(fault) for at, fault in faults if at == path))
    return ApiError(f"{where}: expected {wanted}, got {_short(first['input'])}", param, first["type"])


def _path(loc: tuple[int | str, ...]) -> list[int | str]:
    """The fields and indices of pydantic's path, without the names of the types it tried."""
    types = ("str", "int", "bool", "float")
    return [p for p in loc if isinstance(p, int) or not (p[0].isupper() or "[" in p or "-" in p or p in types)]


def _wanted(fault: Any) -> str:
    if fault["type"] == "too_short":
        return f"at least {fault['ctx']['min_length']} of them"
    text = fault["msg"].removeprefix("Input should be ")
    return f"a value {text}" if text.startswith(("greater", "less")) else text


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
