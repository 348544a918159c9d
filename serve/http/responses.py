"""OpenAI's /v1/responses: a chat in another form. Nothing is stored, so every request brings the whole conversation."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from wave64.serve.http.bodies import in_words
from wave64.serve.http.generation import Choice, Generator
from wave64.serve.http.openai import Chat, usage
from wave64.serve.http.schemas import ApiError, Body, ChatRequest, Count, Flag

Json = dict[str, Any]

# What a chat calls these fields.
RENAMED = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}
LOGPROBS = "message.output_text.logprobs"


class TextOptions(Body):
    """The form of the answer."""

    format: dict[str, Any] | None = None


class ResponsesRequest(Body):
    """POST /v1/responses"""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream: Flag | None = None
    stream_options: dict[str, Any] | None = None  # obfuscation of lengths, which is not done
    reasoning: dict[str, Any] | None = None  # how much to think: the model decides
    include: list[str] | None = None  # what is encrypted, searched or executed elsewhere
    truncation: str | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        if LOGPROBS in (self.include or ()):
            yield "include", f"{LOGPROBS} is not supported by wave64; leave it out"

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises ApiError, with the fields' names of this endpoint."""
        fields = {"messages": self._messages(), "max_completion_tokens": self.max_output_tokens,
                  "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream, "model": self.model,
                  "chat_template_kwargs": self.chat_template_kwargs, "parallel_tool_calls": self.parallel_tool_calls,
                  "tools": [_function(tool) for tool in self.tools or []], "tool_choice": self.tool_choice,
                  "response_format": _format(self.text and self.text.format)}  # fmt: skip
        if isinstance(self.tool_choice, dict):
            fields["tool_choice"] = _function(self.tool_choice)
        try:
            return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            raise renamed(in_words(error)) from None
        except ApiError as error:
            raise renamed(error) from None

    def _messages(self) -> list[Json]:
        messages: list[Json] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for i, item in enumerate(self.input):
            kind = item.get("type", "message")
            if kind == "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            elif kind == "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
            elif kind == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"),
                                 "content": item.get("output")})  # fmt: skip
            elif kind != "reasoning":  # models do not get back what they thought
                raise ApiError(f"input[{i}].type: not supported by wave64, got {kind}", "input", "invalid_value")
        return messages


def renamed(error: ApiError) -> ApiError:
    """A chat's error with the names of this endpoint's fields."""
    text, param = str(error), error.body["error"]["param"]
    name = RENAMED.get(param or "", param)
    text = text.replace(param, name, 1) if param and name else text
    return ApiError(text, name, error.body["error"]["code"], error.status)


def _function(tool: Json) -> Json:
    """A function as a chat has it: in an envelope."""
    if tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items()
                                             if name != "type" and value is not None}}  # fmt: skip


def _format(wanted: Json | None) -> Json | None:
    if wanted is None or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {name: value for name, value in wanted.items() if name != "type"}}


class Output:
    """The items of a response as they grow; take() gives the events of what is new."""

    KINDS = {"message": ("output_text", "text"), "reasoning": ("reasoning_text", "text"),
             "function_call": ("function_call_arguments", "arguments")}  # fmt: skip

    def __init__(self) -> None:
        self.items: list[Json] = []
        self._is_open = False

    def take(self, delta: Json) -> list[Json]:
        """delta: of a chat's message."""
        events: list[Json] = []
        for kind, text in (("reasoning", delta.get("reasoning_content")), ("message", delta.get("content"))):
            if text:
                if not self._is_open or self.items[-1]["type"] != kind:
                    more = {"role": "assistant"} if kind == "message" else {"summary": []}
                    events += self._begin({"type": kind, **more, "content": [self._part(kind)]})
                events.append(self._more(text))
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                item = {"type": "function_call", "call_id": call["id"], "name": function["name"], "arguments": ""}
                events += self._begin(item)
            if function["arguments"]:
                events.append(self._more(function["arguments"]))
        return events

    def close(self, status: str = "completed") -> list[Json]:
        """The item that grew is whole."""
        if not self._is_open:
            return []
        self._is_open, item = False, self.items[-1]
        item["status"] = status
        name, field = self.KINDS[item["type"]]
        holder = item if field in item else item["content"][0]
        events = [self._event(f"{name}.done", **{field: holder[field]})]
        if holder is not item:
            events.append(self._event("content_part.done", part=holder))
        return [*events, self._event("output_item.done", item=item)]

    def _begin(self, item: Json) -> list[Json]:
        events = self.close()
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        self.items.append({"id": f"{prefix}_{uuid4().hex}", **item, "status": "in_progress"})
        self._is_open = True
        shown = {**self.items[-1], **({"content": []} if "content" in item else {})}
        events.append(self._event("output_item.added", item=shown))
        if "content" in item:
            events.append(self._event("content_part.added", part=self._part(item["type"])))
        return events

    def _more(self, text: str) -> Json:
        name, field = self.KINDS[self.items[-1]["type"]]
        holder = self.items[-1] if field in self.items[-1] else self.items[-1]["content"][0]
        holder[field] += text
        return self._event(f"{name}.delta", delta=text)

    def _part(self, kind: str) -> Json:
        name = self.KINDS[kind][0]
        return {"type": name, "text": "", **({"annotations": [], "logprobs": []} if kind == "message" else {})}

    def _event(self, name: str, **fields: Any) -> Json:
        item = self.items[-1]
        where: Json = {"output_index": len(self.items) - 1}
        if not name.startswith("output_item"):
            where["item_id"] = item["id"]
            where |= {} if item["type"] == "function_call" else {"content_index": 0}
        if name.startswith("output_text"):
            where["logprobs"] = []
        return {"type": f"response.{name}", **where, **fields}


class Response:
    """One /v1/responses request, made as a chat. Raises ApiError where it is none."""

    def __init__(self, body: ResponsesRequest, generator: Generator) -> None:
        self.body, self._job = body, Chat(body.chat(), generator)
        self._output = Output()
        self._about = {"id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()),
                       "model": generator.args.model_name, "instructions": body.instructions, "error": None,
                       "metadata": {}, "parallel_tool_calls": body.parallel_tool_calls is not False,
                       "temperature": body.temperature, "top_p": body.top_p, "tools": body.tools or [],
                       "tool_choice": body.tool_choice or "auto", "max_output_tokens": body.max_output_tokens,
                       "text": {"format": (body.text and body.text.format) or {"type": "text"}}, "store": False,
                       "truncation": "disabled"}  # fmt: skip

    @property
    def choices(self) -> list[Choice]:
        return self._job.choices

    async def prepare(self) -> None:
        """As Chat.prepare, with the fields' names of this endpoint."""
        try:
            await self._job.prepare()
        except ApiError as error:
            raise renamed(error) from None

    async def answer(self) -> Json:
        """The whole response."""
        async for _ in self._job.generator.run(self._job.choices):
            pass
        self._output.take(self._job.whole(self._job.choices[0])["message"])
        return self._ended()[-1]["response"]

    async def stream(self) -> AsyncGenerator[Json, None]:
        """Its events."""
        number = 0

        def numbered(events: list[Json]) -> list[Json]:
            nonlocal number
            number += len(events)
            return [{**event, "sequence_number": number - len(events) + i} for i, event in enumerate(events)]

        for event in numbered([{"type": f"response.{state}", "response": self._response("in_progress")}
                               for state in ("created", "in_progress")]):  # fmt: skip
            yield event
        async with aclosing(self._job.generator.run(self._job.choices)) as grown:
            async for choice in grown:
                part = self._job.part(choice, choice.take_new(), is_first=False)
                for event in numbered(self._output.take(part["delta"])):
                    yield event
        for event in numbered(self._ended()):
            yield event

    def _ended(self) -> list[Json]:
        reason = self._job.choices[0].finish_reason
        status = {"length": "incomplete", "abort": "cancelled"}.get(reason or "", "completed")
        events = self._output.close("incomplete" if status == "cancelled" else status)
        response = self._response(status)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        used = usage(self._job.choices, 1)
        thought = "".join(item["content"][0]["text"] for item in self._output.items if item["type"] == "reasoning")
        response["usage"] = {
            "input_tokens": used["prompt_tokens"], "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"], "output_tokens_details": {
                "reasoning_tokens": len(self._job.tokenizer.encode(thought, add_special_tokens=False))},
            "total_tokens": used["total_tokens"],
        }  # fmt: skip
        name = status if status == "incomplete" else "completed"
        return [*events, {"type": f"response.{name}", "response": response}]

    def _response(self, status: str) -> Json:
        return {**self._about, "status": status, "incomplete_details": None, "output": list(self._output.items)}
