"""The message of an assistant as it comes: thoughts, text and calls, whole or as the deltas of a stream."""

from typing import Any
from uuid import uuid4

from wave64.serve.http.reasoning import Thoughts
from wave64.serve.http.tools import Piece, Reader

Json = dict[str, Any]


class Message:
    """Takes a choice's text; `delta` for a stream, or `whole` once."""

    def __init__(self, thoughts: Thoughts | None, reader: Reader | None) -> None:
        self._thoughts, self._reader = thoughts, reader
        self.has_called = False  # a whole tool

    def delta(self, text: str, is_end: bool) -> Json:
        """What is certain now that `text` has come: content, reasoning_content and tool_calls, where there is any."""
        thought, parts = self._read(text, is_end)
        calls: dict[int, Json] = {}
        content = ""
        for part in parts:
            if isinstance(part, str):
                content += part
                continue
            content += part.rest
            call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += part.arguments
            if part.name is not None:
                call |= {"id": _new_id(), "type": "function"}
                call["function"] = {"name": part.name, **call["function"]}
        delta: Json = {"content": content} if content else {}
        if thought:
            delta["reasoning_content"] = thought
        said = [call for call in calls.values() if "id" in call or call["function"]["arguments"]]
        return delta | ({"tool_calls": said} if said else {})

    def whole(self, text: str) -> Json:
        """The message that all of the text makes. What begins like a call and is none is text."""
        thought, parts = self._read(text, is_end=True)
        calls: dict[int, Json] = {}
        content = ""
        for part in parts:
            if isinstance(part, str):
                content += part
            elif part.broken is not None:
                content += part.broken
                del calls[part.index]
            else:
                function = calls.setdefault(part.index, {"name": part.name, "arguments": ""})
                function["arguments"] += part.arguments
        made = [{"id": _new_id(), "type": "function", "function": function} for function in calls.values()]
        message: Json = {"role": "assistant", "content": None if made and not content else content}
        if self._thoughts is not None:
            message["reasoning_content"] = thought or None
        return message | ({"tool_calls": made} if made else {})

    def _read(self, text: str, is_end: bool) -> tuple[str, list[str | Piece]]:
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, is_end)
        if self._reader is None:
            return thought, [text]
        parts = self._reader.feed(text)
        if is_end:
            parts += self._reader.finish()
        self.has_called = self.has_called or any(isinstance(part, Piece) and part.is_whole for part in parts)
        return thought, parts


def _new_id() -> str:
    return f"call_{uuid4().hex[:24]}"
