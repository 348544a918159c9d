"""Tool calls in what a model writes: one reader per format, which takes text as it comes.

What a reader makes of a text does not depend on where it was split. What begins like a call and turns out to be none is
text. Arguments are given as they come, so a stream has a part of those that break off or turn out to be no JSON.
"""

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import regex
from pydantic_core import from_json

from wave64.serve.http.grammar import Forced, without_unknown_formats
from wave64.serve.http.schemas import SPACES, ChatRequest, NamedTool

Json = dict[str, Any]

OBJECT = (r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,'
          r'\s*"(?:parameters|arguments)"\s*:\s*(?=\{)')  # fmt: skip
CLOSE = r"\s*\}"
NEVER = "(?!)"
FIRST_KEY = r'\s*\{\s*"(name|type|parameters|arguments)"'


@dataclass(frozen=True)
class Format:
    """How a model writes calls: `begin`; head, arguments and tail of each, with `between` them; `end`. Regular
    expressions; NEVER matches nothing."""

    begin: str
    head: str
    tail: str
    between: str
    end: str
    at_start: str = NEVER  # what else begins calls, where it is the first of an answer


FORMATS = {
    "llama3": Format(r"<\|python_tag\|>\s*", OBJECT, CLOSE, r"\s*;", NEVER, r"\s*(?=\{)"),
    "deepseekv3": Format(
        "<｜tool▁calls▁begin｜>", r"\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n\s*(?=\{)",
        r"\s*```\s*<｜tool▁call▁end｜>", "", r"\s*<｜tool▁calls▁end｜>"),
    "deepseekv31": Format(
        "<｜tool▁calls▁begin｜>", r"\s*<｜tool▁call▁begin｜>(?P<name>[^<]+)<｜tool▁sep｜>\s*(?=\{)",
        r"\s*<｜tool▁call▁end｜>", "", r"\s*<｜tool▁calls▁end｜>"),
    "qwen25": Format("<tool_call>", OBJECT, CLOSE, NEVER, r"\s*</tool_call>"),
}  # fmt: skip
FORCED = Format(NEVER, OBJECT, CLOSE, r"\s*,", r"\s*\]", r"\s*\[")  # what `forced` makes a model write
#: What a chat template has that teaches a format.
MARKS = (("deepseekv3", ("<｜tool▁call▁begin｜>", "```json")), ("deepseekv31", ("<｜tool▁call▁begin｜>",)),
         ("qwen25", ("<tool_call>",)), ("llama3", ("<|python_tag|>",)))  # fmt: skip
PARSERS = (*FORMATS, "pythonic")  # the values of --tool-call-parser


@dataclass
class Piece:
    """A part of a call: its name, then its arguments, which are JSON when they are put together, then its end."""

    index: int
    name: str | None = None
    arguments: str = ""
    is_whole: bool = False  # nothing of it follows
    broken: str | None = None  # nothing follows, and it was no call: all that the model wrote of it
    rest: str = ""  # what of that was given in no piece


class Reader:
    """feed(text) gives the text and the pieces of calls that are certain now, finish() the rest."""

    def __init__(self, names: Collection[str], limit: int | None = None) -> None:
        """names: of the tools; a call of another is text. limit: calls that are taken; further ones are dropped."""
        self._names, self._limit = names, limit
        self._text = ""  # not yet read
        self._count = 0  # calls that were begun
        self._is_start = True  # no text was given but spaces

    def feed(self, text: str) -> list[str | Piece]:
        """Text, and what else there is."""
        self._text += text
        return self._read(is_end=False)

    def finish(self) -> list[str | Piece]:
        """What else there is when no more text comes."""
        return self._read(is_end=True)

    def _read(self, is_end: bool) -> list[str | Piece]:
        raise NotImplementedError

    def _take(self, end: int) -> str:
        taken, self._text = self._text[:end], self._text[end:]
        return taken

    def _say(self, text: str) -> list[str | Piece]:
        if not text.strip() and (self._count or not text):
            return []  # spaces around calls
        self._is_start = self._is_start and not text.strip()
        return [text]

    def _call(self, name: str, arguments: Json) -> list[str | Piece]:
        self._count += 1
        return self._give(Piece(self._count - 1, name, json.dumps(arguments, ensure_ascii=False), is_whole=True))

    def _give(self, piece: Piece) -> list[str | Piece]:
        return [] if self._limit is not None and piece.index >= self._limit else [piece]


class FormatReader(Reader):
    """Of a Format. Each state is a method that reads on; it returns None when it needs more text."""

    def __init__(self, form: Format, names: Collection[str], limit: int | None = None) -> None:
        super().__init__(names, limit)
        self._form = form
        self._state = self._outside
        self._source = ""  # what was read since the last thing that was certain
        self._object = Object()

    def _read(self, is_end: bool) -> list[str | Piece]:
        found: list[str | Piece] = []
        while (step := self._state(is_end)) is not None:
            found += step
        return found

    def _skip(self, match: regex.Match) -> None:
        self._source += self._take(match.end())

    def _no_call(self) -> list[str | Piece]:
        """What was held back is text; a character at least, so that reading goes on."""
        text, self._source, self._state = self._source or self._take(1), "", self._outside
        return self._say(text)

    def _outside(self, is_end: bool) -> list[str | Piece] | None:
        """Text, up to what begins calls."""
        match = _match(self._form.at_start, self._text, is_end) if self._is_start else None
        if match is None:
            match = regex.search(self._form.begin, self._text, partial=not is_end)
        end = len(self._text) if match is None else match.start()
        if match is not None and not match.partial:
            self._source, self._state = self._text[end : match.end()], self._head
            return self._say(self._take(match.end())[:end].rstrip())
        if not is_end:
            end = len(self._text[:end].rstrip())  # spaces before a call are not given
        return self._say(self._take(end)) if end else None

    def _head(self, is_end: bool) -> list[str | Piece] | None:
        """What is before the arguments."""
        match = _match(self._form.head, self._text, is_end)
        if match is None:
            other = _match(FIRST_KEY, self._text, is_end) if self._form.head == OBJECT else None
            if other is None:
                return self._no_call()
            if other.partial:
                return None
            self._object, self._state = Object(), self._other_order
            return []
        if match.partial:
            return None
        if (name := match["name"].strip()) not in self._names:
            return self._no_call()
        self._skip(match)
        self._object, self._state, self._count = Object(), self._arguments, self._count + 1
        return self._give(Piece(self._count - 1, name))

    def _other_order(self, is_end: bool) -> list[str | Piece] | None:
        """An object whose fields are not in the usual order: the call is there when all of it is."""
        end = self._object.push(self._text)
        self._source += self._take(len(self._text) if end is None else end)
        if end is None:
            return self._no_call() if is_end else None
        try:
            call = loads(self._object.text)
        except ValueError:
            return self._no_call()
        arguments = call.get("parameters", call.get("arguments")) or {}
        if call.get("name") not in self._names or not isinstance(arguments, dict):
            return self._no_call()
        self._source, self._state = "", self._after
        return self._call(call["name"], arguments)

    def _arguments(self, is_end: bool) -> list[str | Piece] | None:
        end = self._object.push(self._text)
        self._source += self._take(len(self._text) if end is None else end)
        try:
            piece = Piece(self._count - 1, arguments=self._object.certain(is_end))
        except ValueError:
            return self._broken()
        if end is not None:
            self._state = self._tail
        elif is_end:
            return self._give(piece) + self._broken()
        return self._give(piece) if piece.arguments else [] if end is not None else None

    def _broken(self) -> list[str | Piece]:
        """What was taken for a call is none. All that follows is text: it would depend on splits what begins a call."""
        source, self._source, self._state = self._source, "", self._plain
        return self._give(Piece(self._count - 1, broken=source, rest=self._object.rest))

    def _plain(self, is_end: bool) -> list[str | Piece] | None:
        return [self._take(len(self._text))] if self._text else None

    def _tail(self, is_end: bool) -> list[str | Piece] | None:
        """What is behind the arguments. A model that ends right there has said enough."""
        match = _match(self._form.tail, self._text, is_end)
        if match is None and not (is_end and not self._text.strip()):
            return self._broken()
        if match is not None and match.partial:
            return None
        self._take(match.end() if match else len(self._text))
        self._source, self._state = "", self._after
        return self._give(Piece(self._count - 1, is_whole=True))

    def _after(self, is_end: bool) -> list[str | Piece] | None:
        """The end of calls, or another one, or text."""
        for pattern, state in ((self._form.end, self._outside), (self._form.between, self._head)):
            match = _match(pattern, self._text, is_end)
            if match is not None and match.partial:
                return None
            if match is not None:
                self._skip(match)
                self._source, self._state = "" if state == self._outside else self._source, state
                return []
        self._state = self._outside
        return []


class PythonicReader(Reader):
    """Of an answer that is a list of Python's calls with named arguments: [get_weather(city="Oslo"), ...]"""

    BEGIN = r"\s*(<\|python_start\|>\s*)?(?=\[\s*[A-Za-z_][\w.]*\()"
    END = r"\s*<\|python_end\|>"

    def __init__(self, names: Collection[str], limit: int | None = None) -> None:
        super().__init__(names, limit)
        self._awaited: str | None = self.BEGIN
        self._tried = 0  # where in the text the list does not end

    def _read(self, is_end: bool) -> list[str | Piece]:
        found: list[str | Piece] = []
        while self._awaited is not None:
            match = _match(self._awaited, self._text, is_end)
            if match is not None and match.partial:
                return found
            if match is None or self._awaited == self.END:
                self._take(match.end() if match else 0)
                self._awaited = None
            elif (calls := self._calls(match.end())) is not None:
                found, self._awaited = calls, self.END
            elif not is_end:
                return found
            else:
                self._awaited = None
        return found + self._say(self._take(len(self._text)))

    def _calls(self, start: int) -> list[str | Piece] | None:
        """The calls of the list that begins at `start`; None if it does not end yet, or is another one."""
        while (end := self._text.find("]", max(self._tried, start))) >= 0:
            self._tried = end + 1
            if (calls := _parsed(self._text[start : end + 1])) is not None:
                if any(name not in self._names for name, _ in calls):
                    continue
                self._take(end + 1)
                return [piece for name, arguments in calls for piece in self._call(name, arguments)]
        return None


def _parsed(source: str) -> list[tuple[str, Json]] | None:
    """Names and arguments of a list of calls; None if it is none."""
    calls = []
    try:
        for call in ast.parse(source, mode="eval").body.elts:  # pyright: ignore[reportAttributeAccessIssue]
            arguments = {item.arg: ast.literal_eval(_Words().visit(item.value)) for item in call.keywords}
            json.dumps(arguments, allow_nan=False)
            if call.args or None in arguments:
                return None
            calls.append((ast.unparse(call.func), arguments))
    except (AttributeError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return calls


class _Words(ast.NodeTransformer):
    """JSON's words in Python."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


class Object:
    """A JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.text = ""
        self._given = 0  # characters
        self._depth, self._in_string, self._is_escaped = 0, False, False

    @property
    def rest(self) -> str:
        """What certain() has not given."""
        return self.text[self._given :]

    def push(self, text: str) -> int | None:
        """Take `text`, up to where the object ends; None if it goes on."""
        for i, c in enumerate(text):
            if self._in_string:
                self._in_string = c != '"' or self._is_escaped
                self._is_escaped = c == "\\" and not self._is_escaped
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if not self._depth:
                    self.text += text[: i + 1]
                    return i + 1
        self.text += text
        return None

    def certain(self, is_end: bool) -> str:
        """What has come since the last time. Raises ValueError if it is no JSON, which is not looked at for each
        character of a long one."""
        is_whole = self._depth == 0
        if not (is_whole or is_end) and len(self.text) < self._given + self._given // 16:
            return ""
        loads(self.text) if is_whole else from_json(self.text, allow_partial="trailing-strings")
        piece, self._given = self.rest, len(self.text)
        return piece


def reader(body: ChatRequest, parser: str | None) -> Reader | None:
    """What reads the calls in an answer; None where there can be none. parser: one of PARSERS; None: no format is
    known, so calls can only be forced."""
    if not body.usable_tools:
        return None
    names = {tool.function.name for tool in body.usable_tools}
    limit = 1 if body.parallel_tool_calls is False else None
    if body.forces_call:
        return FormatReader(FORCED, names, limit)
    if parser is None:
        return None
    return PythonicReader(names, limit) if parser == "pythonic" else FormatReader(FORMATS[parser], names, limit)


def forced(body: ChatRequest) -> Forced | None:
    """What an answer has to be that has to be a call, or several: a list of {name, parameters}; None if it need not."""
    if not body.forces_call:
        return None
    calls, schemas = [], {}
    for i, tool in enumerate(body.tools or ()):
        if tool not in body.usable_tools:
            continue
        schema = without_unknown_formats(tool.function.parameters or {"type": "object"})
        schemas[f"tools[{i}].function.parameters"] = schema
        head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "parameters": ')
        calls.append(f'{head} %json {json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACES}})} "}}"')
    more = "" if body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool) else ' (", " call)*'
    return Forced(f'start: "[" call{more} "]"\ncall: ' + "\n    | ".join(calls), schemas)


def parser_of(template: str) -> str | None:
    """The format that a chat template teaches, if it can be recognized."""
    return next((parser for parser, marks in MARKS if all(mark in template for mark in marks)), None)


def loads(text: str) -> Json:
    """The JSON object in a text. Raises ValueError if it is none."""
    try:
        value = from_json(text, allow_inf_nan=False)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {text[:60]}")
    return value


def _match(pattern: str, text: str, is_end: bool) -> regex.Match | None:
    """A match at the start of `text`, or, before the end, what may become one."""
    return regex.match(pattern, text, partial=not is_end)
