"""What the api process and the engine process say to each other: msgspec structs over two ZeroMQ pipes.

Both pipes are ipc:// files in a private temporary directory that the api process makes and hands to `run_engine`:

    requests   the engine binds a PULL socket; the api connects a PUSH socket and sends ToEngine.
    outputs    the api binds a PULL socket; the engine connects a PUSH socket and sends one Ready or Failed first,
               then Outputs, at most one message per engine step, and an answer to each FlushCache, StartProfile and
               StopProfile, in their order.

Every message is one msgpack frame, made by `encode` and read by `decode_to_engine` or `decode_to_api`.
Stop strings, `n`, text and chat templates belong to the api process and never appear here. `check_request` is the one
place that says which requests an engine can serve: the api process refuses by it, and the engine holds everyone to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct


class SamplingParams(Struct):
    """How one request's tokens are chosen. Neutral values switch a feature off."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # <= 0: all
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}  # token -> what is added to its logit
    stop_token_ids: list[int] = []
    bad_words: list[list[int]] = []  # token sequences that are not generated
    ignore_eos: bool = False
    min_new_tokens: int = 0
    seed: int | None = None  # None: drawn from the engine's own generator


class Request(Struct, tag=True):
    """One sequence to continue. `rid` is chosen by the api process and unique among the live requests."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    top_logprobs: int = -1  # -1: none; 0: the chosen token's; k: the k most likely ones too
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0  # how many of the most likely tokens go with each of the prompt's
    logprob_ids: list[int] = []  # tokens whose logprobs go with every other one
    grammar: str | None = None  # what the answer has to be, in llguidance's form; a Vocabulary was sent before


class Vocabulary(Struct, tag=True):
    """The tokens' texts, which grammars are made of, and what ends an answer. Sent before the first grammar."""

    tokenizer: str  # as tokenizer.json
    end_ids: list[int]


class Abort(Struct, tag=True):
    """Forget request `rid` at once. No Output answers it; an unknown rid is ignored."""

    rid: str


class FlushCache(Struct, tag=True):
    """Empty the prefix cache. `Flushed` answers it."""


class StartProfile(Struct, tag=True):
    """Record what the engine's process does, and write it to a file in `folder`. `Profiled` answers it."""

    folder: str
    num_steps: int | None = None  # None: until StopProfile
    activities: tuple[str, ...] = ("CPU", "GPU")  # RPD: by ROCm's rocmProfileData, else by torch's profiler
    with_stack: bool = False
    record_shapes: bool = False


class StopProfile(Struct, tag=True):
    """End what StartProfile began. `Profiled` answers it."""


class TokenLogprob(Struct, array_like=True):
    """log_softmax of the raw logits (before penalties and temperature): of token `id`, of the `top` best, and of the
    request's `logprob_ids`."""

    id: int
    logprob: float
    top: list[tuple[int, float]] = []
    asked: list[float] = []


class Output(Struct):
    """What one step gave one request. The Output that carries a finish_reason is the request's last."""

    rid: str
    token_ids: list[int]  # new since the last Output; a stop token is included
    finish_reason: str | None = None  # None, "stop", "length", "abort" or "error"
    matched_stop: int | None = None  # the stop token's id, when finish_reason is "stop"; None: the grammar's end
    logprobs: list[TokenLogprob] | None = None  # one per new token, when the request asked for them
    prompt_logprobs: list[TokenLogprob | None] | None = None  # once, with the first token; entry 0 is None
    error: str | None = None  # the reason in words, when finish_reason is "error"
    cached_tokens: int = 0  # once, with the first token: of the prompt, how many the prefix cache had


class Statistics(Struct):
    """The state of the engine after a step. The totals count from its start."""

    running: int = 0  # requests that hold KV pages
    waiting: int = 0  # requests that hold none yet, or lost theirs to preemption
    pages_used: int = 0  # by requests; those that only the prefix cache holds are free to be used
    pages_total: int = 0
    prompt_tokens: int = 0  # total computed; tokens that were preempted count again
    generated_tokens: int = 0  # total
    preemptions: int = 0  # total
    cached_tokens: int = 0  # total of prompts' tokens that the prefix cache had
    pages_cached: int = 0  # of the prefix cache, used by requests or not
    steps: int = 0  # total
    step_seconds: float = 0.0  # total that they took


class Outputs(Struct, tag=True):
    """The Outputs of one engine step, in one frame."""

    outputs: list[Output]
    statistics: Statistics | None = None


class Flushed(Struct, tag=True):
    """Answers FlushCache; not done: requests run or wait."""

    done: bool


class Profiled(Struct, tag=True):
    """Answers StartProfile and StopProfile: what is wrong, if anything is, and the file that was written."""

    error: str | None
    file: str | None = None


class Limits(Struct):
    """What bounds a request, for `check_request`."""

    context_length: int
    max_total_num_tokens: int  # tokens the KV pool holds
    vocab_size: int

    def max_tokens(self) -> tuple[int, str]:
        """How many tokens a prompt and its completion may have, and what sets the limit where the model does not."""
        context, pool = self.context_length, self.max_total_num_tokens
        if pool < context:
            return pool, f" on this server, whose KV pool (--max-total-tokens) is smaller than the model's {context}"
        return context, ""


class Ready(Limits, tag=True):
    """The engine has its weights and its KV pool and takes requests. All that the api process knows of the model."""

    device: str
    dtype: str
    backends: list[dict[str, Any]]  # the rows of wave64.report()
    sampling_defaults: dict[str, float]  # generation_config.json's: what the model recommends


class Failed(Struct, tag=True):
    """The engine could not start, or cannot go on, and exits. `error` is one line for the operator."""

    error: str


class Alive(Struct, tag=True):
    """Rank 0 of several lives, and what it is doing; sent once a second."""

    doing: str


class BadRequest(ValueError):
    """A request that no engine with these limits can serve: `param` is the field at fault, `code` OpenAI's."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


def check_request(input_ids: list[int], params: SamplingParams, limits: Limits, prompt: str = "input_ids",
                  new: str = "max_new_tokens", logprob_ids: Sequence[int] = ()) -> None:  # fmt: skip
    """Raises BadRequest if the engine cannot serve it. prompt, new: what the client calls these two fields.
    logprob_ids: as in Request."""
    vocab = limits.vocab_size
    if not input_ids:
        raise BadRequest(f"{prompt}: empty, expected at least one token", prompt, "empty_prompt")
    given = ((prompt, input_ids), ("stop_token_ids", params.stop_token_ids), ("logit_bias", list(params.logit_bias)),
             ("token_ids_logprob", logprob_ids), *(("bad_words", word) for word in params.bad_words))  # fmt: skip
    for name, ids in given:
        if ids and (min(ids) < 0 or max(ids) >= vocab):
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise BadRequest(f"{name}: expected token ids from 0 to {vocab - 1}, got {bad}", name, "invalid_token")
    check_params(params)
    count, asked = len(input_ids), params.max_new_tokens
    limit, _ = limits.max_tokens()
    if count + (asked != 0) > limit:
        more = ", and at least one new one has to follow" if asked else ""
        raise too_long(limits, f"your {prompt} resulted in {count} tokens{more}", prompt, prompt)
    if count + asked > limit:
        requested = f"you requested {count + asked} tokens ({count} in the {prompt}, {asked} in {new})"
        raise too_long(limits, requested, f"{prompt} or {new}", new)


def check_params(params: SamplingParams) -> None:
    """Raises BadRequest if a sampling parameter is out of range. A NaN is out of every range."""
    checks = (
        ("max_new_tokens", params.max_new_tokens >= 0, "at least 0"),
        ("min_new_tokens", params.min_new_tokens >= 0, "at least 0"),
        ("temperature", 0 <= params.temperature < math.inf, "at least 0"),
        ("top_k", float(params.top_k).is_integer(), "a whole number"),
        ("top_p", 0 < params.top_p <= 1, "more than 0 and at most 1"),
        ("min_p", 0 <= params.min_p <= 1, "0 to 1"),
        ("presence_penalty", math.isfinite(params.presence_penalty), "a finite number"),
        ("frequency_penalty", math.isfinite(params.frequency_penalty), "a finite number"),
        ("logit_bias", all(map(math.isfinite, params.logit_bias.values())), "finite numbers"),
        ("repetition_penalty", 0 < params.repetition_penalty < math.inf, "more than 0"),
    )
    for name, fine, expected in checks:
        if not fine:
            raise BadRequest(f"{name}: expected {expected}, got {getattr(params, name)}", name)


def too_long(limits: Limits, requested: str, shorten: str, param: str) -> BadRequest:
    """In OpenAI's own words: clients look for them to cut the prompt, or to go to another model."""
    limit, why = limits.max_tokens()
    return BadRequest(f"This model's maximum context length is {limit} tokens{why}. However, {requested}. Please "
                      f"reduce the length of the {shorten}.", param, "context_length_exceeded")  # fmt: skip


ToEngine: TypeAlias = Request | Abort | FlushCache | Vocabulary | StartProfile | StopProfile
ToApi: TypeAlias = Outputs | Ready | Failed | Alive | Flushed | Profiled

#: The msgpack frame of a message.
encode: Callable[[ToEngine | ToApi], bytes] = msgspec.msgpack.Encoder().encode
#: Read a frame of the `requests` pipe, and of the `outputs` pipe. Both raise msgspec.DecodeError or ValidationError
#: when it is not one.
decode_to_engine: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_api: Callable[[bytes], ToApi] = msgspec.msgpack.Decoder(ToApi).decode
