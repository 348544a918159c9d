"""The message of an assistant as it comes: thoughts, text and calls, whole or as the deltas of a stream."""

from typing import Any
from uuid import uuid4

from wave64.serve.http.reasoning import Thoughts
from wave64.serve.http.tools import Reader

Json = dict[str, Any]


class Message:
    """Takes a choice's text; `delta` for a stream, or `whole` once."""

    def __init__(self, thoughts: Thoughts | None, reader: Reader | None) -> None:
        self._thoughts, self._reader = thoughts, reader
        self.has_called = False  # a whole tool

    def delta(self, text: str, is_end: bool) -> Json:
        """What is certain now that `text` has come: content, reasoning_content and tool_calls, where there is any."""
        thought, content, calls = self._read(text, is_end)
        said = [call for call in calls if "id" in call or call["function"]["arguments"]]
        delta = {"content": content, "reasoning_content": thought, "tool_calls": said}
        return {name: value for name, value in delta.items() if value}

    def whole(self, text: str) -> Json:
        """The message that all of the text makes. What begins like a call and is none is text."""
        thought, content, calls = self._read(text, is_end=True, is_whole=True)
        message: Json = {"role": "assistant", "content": None if calls and not content else content}
        if self._thoughts is not None:
            message["reasoning_content"] = thought or None
        made = [{name: value for name, value in call.items() if name != "index"} for call in calls]
        return message | ({"tool_calls": made} if made else {})

    def _read(self, text: str, is_end: bool, is_whole: bool = False) -> tuple[str, str, list[Json]]:
        """What `text` adds to thought and content, and to calls, by index. is_whole: nothing was given before, so
        what turns out to be no call can be text."""
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, is_end)
        if self._reader is None:
            return thought, text, []
        content, calls = "", dict[int, Json]()
        for part in self._reader.feed(text) + (self._reader.finish() if is_end else []):
            if isinstance(part, str):
                content += part
                continue
            self.has_called = self.has_called or part.is_whole
            if is_whole and part.broken is not None:
                content += part.broken
                del calls[part.index]
                continue
            content += part.rest
            call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += part.arguments
            if part.name is not None:
                call |= {"id": f"call_{uuid4().hex[:24]}", "type": "function"}
                call["function"] = {"name": part.name, **call["function"]}
        return thought, content, list(calls.values())
