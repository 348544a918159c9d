"""Chat templates: OpenAI's messages in the form that a template expects, and the text that it makes of them.

Imports nothing of wave64 and no torch: `template_process` runs this very file in a process of its own, where a template
that never ends, or takes all memory, can be killed without harm to the server.
"""

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from functools import cached_property
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1 << 18  # characters of a template, which are read where the server starts; usual ones have thousands
MAX_TEXT = 64 << 20  # characters of one prompt; four times the longest body of a request
MEMORY_BYTES = 4 << 30  # of the address space that a template may use
GRACE_S = 5  # past the limit, the process ends itself: the server that should have killed it is gone

Json = dict[str, Any]


class TemplateError(ValueError):
    """A template that is none, messages in another form than OpenAI's, or a template that refuses them; in words."""


class Arguments(dict):
    """Arguments of a tool call: an object for templates that look into it, the JSON that the model wrote for those that
    write it out."""

    def __init__(self, text: str) -> None:
        self._text = text if text.strip() else "{}"
        value = json.loads(self._text)
        if not isinstance(value, dict):  # dict() takes pairs, too
            raise TypeError(type(value).__name__)
        super().__init__(value)

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class Template:
    """One chat template."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError if `source` is not Jinja. Nothing of it runs, nor is compiled, before render()."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"expected a template of at most {MAX_SOURCE} characters, got {len(source)}")
        self._source = source
        self._environment = _environment()
        try:
            tree = self._environment.parse(source)
            content = _Content(tree)
            self._names_developer = any(node.value == "developer" for node in tree.find_all(nodes.Const))
            self._takes_parts = content.is_taken_apart()
            self._takes_text = content.is_tested("string")
            self._takes_null = content.is_tested("none")
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"not a Jinja template: {error}") from None

    def render(self, messages: list[Json], variables: Json) -> str:
        """The text of a conversation. Raises TemplateError, whatever the template does."""
        prepared = self.prepare(messages)
        try:
            return self._compiled.render({**variables, "messages": prepared})
        except Exception as error:  # a template is a program of somebody else's
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise TemplateError(f"the chat template refuses these messages: {reason}") from None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._environment.from_string(self._source)

    def prepare(self, messages: list[Json]) -> list[Json]:
        """OpenAI's messages in the form that this template expects.

        A field that is null, or a list of no tool calls, is absent. Content is text, or parts where the template takes
        it apart; null content is empty, unless the template asks about null. The role developer is system to a template
        that does not name it. Raises TemplateError for tool calls in another form than OpenAI's.
        """
        return [self._prepare(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _prepare(self, message: Json, where: str) -> Json:
        prepared = {name: value for name, value in message.items() if value is not None}
        if prepared["role"] == "developer" and not self._names_developer:
            prepared["role"] = "system"
        is_assistant = prepared["role"] == "assistant"
        calls = prepared.pop("tool_calls", [])
        content = message.get("content")
        if calls and content == "":
            content = None  # which is how templates know that there are only calls
        prepared["content"] = self._content(content, is_assistant)
        if not isinstance(calls, list):
            raise TemplateError(f"{where}.tool_calls: expected a list, got {json.dumps(calls)[:60]}")
        if calls:
            prepared["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if "function_call" in prepared:
            prepared["function_call"] = _function(prepared["function_call"], f"{where}.function_call")
        return prepared

    def _content(self, content: str | list[Json] | None, is_assistant: bool) -> str | list[Json] | None:
        if content is None and is_assistant and self._takes_null:
            return None
        if self._takes_parts:
            if isinstance(content, str) and not self._takes_text:
                return [{"type": "text", "text": content}]
            empty: str | list[Json] = "" if self._takes_text else []
            return empty if content is None else content
        return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _call(call: Any, where: str) -> Json:
    if not isinstance(call, dict):
        raise TemplateError(f"{where}: expected an object, got {json.dumps(call)[:60]}")
    if "function" not in call:
        return call
    return {**call, "function": _function(call["function"], f"{where}.function")}


def _function(function: Any, where: str) -> Json:
    """A called function with its arguments as an object. They are text on the wire, and objects are taken, too."""
    if not isinstance(function, dict):
        raise TemplateError(f"{where}: expected an object, got {json.dumps(function)[:60]}")
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    try:
        return {**function, "arguments": Arguments(text)}
    except (ValueError, TypeError, RecursionError):
        raise TemplateError(f"{where}.arguments: expected the JSON of an object, got {json.dumps(text)[:60]}") from None


class _Content:
    """How a template uses the content of messages, as far as its syntax tree shows."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._names = {"content"}  # variables with the content
        for assignment in tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name) and self._is_content(assignment.node):
                self._names.add(assignment.target.name)

    def _is_content(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in self._names

    def is_taken_apart(self) -> bool:
        """Whether it is looped over, filtered like a list, or its items have fields: then it is a list of parts."""
        sources: list[nodes.Node | None] = [loop.iter for loop in self._tree.find_all(nodes.For)]
        for item in self._tree.find_all(nodes.Filter):
            if item.name in ("selectattr", "rejectattr", "map"):
                sources.append(item.node)
        for field in self._tree.find_all((nodes.Getattr, nodes.Getitem)):
            if isinstance(field.node, nodes.Getitem) and isinstance(field.node.arg, nodes.Const):
                sources.append(field.node.node)  # content[0].text; content[0] alone may be a letter
        return any(self._is_content(_unfiltered(source)) for source in sources)

    def is_tested(self, name: str) -> bool:
        """Whether it is tested by `is <name>`, or `is not`."""
        return any(test.name == name and self._is_content(test.node) for test in self._tree.find_all(nodes.Test))


def _unfiltered(node: nodes.Node | None) -> nodes.Node | None:
    while isinstance(node, nodes.Filter):
        node = node.node
    return node


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for (transformers' documented one)."""
    extensions = [loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks text that a model is trained on; it does not change a prompt."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # Jinja's own escapes HTML


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# ---- the process of its own: frames of JSON over stdin and stdout

def frame(message: Json) -> bytes:
    """Four bytes of length, and JSON in ASCII."""
    raw = json.dumps(message).encode()
    return struct.pack("<I", len(raw)) + raw


def _read(pipe: BinaryIO) -> Json | None:
    """The next message; None when the server is gone."""
    prefix = pipe.read(4)
    return json.loads(pipe.read(struct.unpack("<I", prefix)[0])) if len(prefix) == 4 else None


def main() -> None:
    """Render the requests from stdin, until it closes. The first message is {source, limit_s}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the server
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    pipe, out = sys.stdin.buffer, sys.stdout.buffer
    if (settings := _read(pipe)) is None:
        return
    template = Template(settings["source"])
    out.write(frame({"ready": True}))
    out.flush()
    while request := _read(pipe):
        signal.setitimer(signal.ITIMER_REAL, settings["limit_s"] + GRACE_S)
        try:
            text = template.render(request["messages"], request["variables"])
            answer = frame({"text": text} if len(text) <= MAX_TEXT else
                           {"error": f"the chat template made {len(text)} characters, expected at most {MAX_TEXT}"})
        except (TemplateError, MemoryError, RecursionError) as error:
            answer = frame({"error": str(error) or type(error).__name__})
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(answer)
        out.flush()


if __name__ == "__main__":
    main()
