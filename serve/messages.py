"""What the api process and the engine process say to each other: msgspec structs over two ZeroMQ pipes.

Both pipes are ipc:// files in a private temporary directory that the api process makes and hands to `run_engine`:

    requests   the engine binds a PULL socket; the api connects a PUSH socket and sends Request and Abort.
    outputs    the api binds a PULL socket; the engine connects a PUSH socket and sends one Ready or Failed first,
               then Outputs, at most one message per engine step.

Every message is one msgpack frame, made by `encode` and read by `decode_to_engine` or `decode_to_api`.
Stop strings, `n`, text and chat templates are the api process's matter and never appear here.
"""

from __future__ import annotations

from typing import Any

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
    stop_token_ids: list[int] = []
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


class Abort(Struct, tag=True):
    """Forget request `rid` at once. No Output answers it; an unknown rid is ignored."""

    rid: str


class TokenLogprob(Struct, array_like=True):
    """log_softmax of the raw logits (before penalties and temperature): of token `id`, and of the `top` best."""

    id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(Struct):
    """What one step gave one request. The Output that carries a finish_reason is the request's last."""

    rid: str
    token_ids: list[int]  # new since the last Output; a stop token is included
    finish_reason: str | None = None  # None, "stop", "length", "abort" or "error"
    matched_stop: int | None = None  # the stop token's id, when finish_reason is "stop"
    logprobs: list[TokenLogprob] | None = None  # one per new token, when the request asked for them
    prompt_logprobs: list[TokenLogprob | None] | None = None  # once, with the first token; entry 0 is None
    error: str | None = None  # the reason in words, when finish_reason is "error"


class Statistics(Struct):
    """The state of the engine after a step. The totals count from its start."""

    running: int = 0  # requests that hold KV pages
    waiting: int = 0  # requests that hold none yet, or lost theirs to preemption
    pages_used: int = 0
    pages_total: int = 0
    prompt_tokens: int = 0  # total computed; tokens that were preempted count again
    generated_tokens: int = 0  # total
    preemptions: int = 0  # total


class Outputs(Struct, tag=True):
    """The Outputs of one engine step, in one frame."""

    outputs: list[Output]
    statistics: Statistics | None = None


class Ready(Struct, tag=True):
    """The engine has its weights and its KV pool and takes requests."""

    context_length: int
    max_total_num_tokens: int  # tokens the KV pool holds
    device: str
    dtype: str
    vocab_size: int
    backends: list[dict[str, Any]]  # the rows of wave64.report()


class Failed(Struct, tag=True):
    """The engine could not start, or cannot go on, and exits. `error` is one line for the operator."""

    error: str


_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(Request | Abort)
_to_api = msgspec.msgpack.Decoder(Outputs | Ready | Failed)


def encode(message: Request | Abort | Outputs | Ready | Failed) -> bytes:
    """The msgpack frame of a message."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> Request | Abort:
    """Read a frame of the `requests` pipe. Raises msgspec.DecodeError or ValidationError when it is not one."""
    return _to_engine.decode(frame)


def decode_to_api(frame: bytes) -> Outputs | Ready | Failed:
    """Read a frame of the `outputs` pipe. Raises msgspec.DecodeError or ValidationError when it is not one."""
    return _to_api.decode(frame)
