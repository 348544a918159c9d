"""The fields of request bodies of endpoints that do not generate."""

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from wave64.serve.http.schemas import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ApiError,
    Body,
    First,
    Flag,
    Ids,
    Int,
    Message,
    Tool,
    prompts_of,
)


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | Annotated[list[str], First] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), First] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), First] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Flag | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        if (self.prompt is None) == (self.messages is None):
            yield "prompt", "expected either prompt or messages"


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[Any, Ids] = None
    skip_special_tokens: Flag | None = None

    @cached_property
    def lists(self) -> list[list[int]]:
        """The lists of token ids; one where they are not nested."""
        found = prompts_of(self.tokens, "tokens")
        if any(isinstance(tokens, str) for tokens in found):
            raise ApiError("tokens: expected token ids, got a string", "tokens", "invalid_type")
        lists = [tokens for tokens in found if not isinstance(tokens, str)]
        for odd in (token for tokens in lists for token in tokens if not 0 <= token < 2**31):
            raise ApiError(f"tokens: expected token ids from 0 to {2**31 - 1}, got {odd}", "tokens", "invalid_token")
        return lists


class ProfileRequest(Body):
    """POST /start_profile"""

    output_dir: str | None = None  # in --profile-dir
    num_steps: Annotated[Int, Field(ge=1, lt=2**31)] | None = None
    activities: Annotated[list[Literal["CPU", "GPU", "RPD"]], Field(min_length=1), First] | None = None
    with_stack: Flag | None = None
    record_shapes: Flag | None = None


class AbortRequest(Body):
    """POST /abort_request"""

    rid: str | None = None
    abort_all: Flag | None = None
