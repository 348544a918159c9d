"""The form that a request prescribes for its answer, by any of the names that clients have for it, as a grammar."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from wave64.serve.grammar import compiler
from wave64.serve.http.schemas import SPACES, ApiError, Sampling
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Vocabulary

KEPT = 256  # grammars that are known to be one
MAX_LENGTH = 1 << 18  # characters of one
ANY_TEXT = r"(.|\n)*"
OF_FIELD = {"json_schema": "json", "guided_json": "json", "regex": "regex", "guided_regex": "regex", "ebnf": "grammar",
            "guided_grammar": "grammar", "guided_choice": "choice", "structural_tag": "tags"}  # fmt: skip
OF_OUTPUTS = {"json": "json", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "grammar",
              "structural_tag": "tags"}  # fmt: skip
# Of JSON Schema's formats those that llguidance holds an answer to.
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
NO_OBJECTION = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "backend")

Json = dict[str, Any]


class Forced(NamedTuple):
    """An answer that has to be a call."""

    grammar: str
    schemas: dict[str, Json]  # of the tools' parameters, by the field that they came in


class Grammars:
    """Makes grammars of what requests ask for, and refuses what cannot be compiled."""

    def __init__(self, tokenizer: Tokenizer, tell: Callable[[Vocabulary], None]) -> None:
        """tell: sends the vocabulary to the engine."""
        self.tokenizer, self._tell = tokenizer, tell
        self._compile: Callable[[str], Any] | None = None
        self._known: OrderedDict[tuple[str, str], str] = OrderedDict()  # kind and text -> grammar
        self._lock = asyncio.Lock()

    async def learn(self, vocab_size: int) -> None:
        """Make both processes able to compile, which takes seconds for a large vocabulary. Raises ApiError when they
        cannot."""
        async with self._lock:
            if self._compile is not None:
                return
            ends = sorted(i for i in self.tokenizer.end_ids if i < vocab_size)
            vocabulary = Vocabulary(await asyncio.to_thread(lambda: self.tokenizer.definition), ends)
            try:
                self._compile = await asyncio.to_thread(compiler, vocabulary, vocab_size)
            except ValueError as error:
                raise ApiError(f"structured output: {error}", status=501) from None
            self._tell(vocabulary)

    async def of(self, body: Sampling, vocab_size: int, forced: Forced | None = None) -> str | None:
        """The grammar that `body` asks for, in the engine's form; None if it asks for none. forced: what its
        tool_choice needs. Raises ApiError."""
        asked = [("tool_choice", "lark", forced.grammar)] if forced else []
        asked += [(name, kind, value) for name, kind, value in _asked(body) if value not in (None, False, "")
                  and not (forced and name.startswith("response_format"))]  # fmt: skip: a call has no content to form
        if not asked:
            return None
        if len(asked) > 1:
            names = " and ".join(name for name, _, _ in asked)
            raise ApiError(f"{names}: expected one of them, as an answer has one form", asked[0][0].partition(".")[0])
        await self.learn(vocab_size)
        try:
            return await self._compiled(*asked[0])
        except ApiError:
            for field, schema in forced.schemas.items() if forced else ():
                await self._compiled(field, "json", schema)  # alone, which says what is wrong with which
            raise

    async def _compiled(self, field: str, kind: str, value: Any) -> str:
        """The grammar of a kind ("json", "regex", "choice", "grammar", "lark", "tags") in the engine's form.
        field: what the client called it. Raises ApiError with the reason for one that cannot be compiled."""
        if isinstance(value, str) and len(value) > MAX_LENGTH:
            raise _refused(field, f"expected at most {MAX_LENGTH} characters, got {len(value)}")
        key = (kind, value if isinstance(value, str) else json.dumps(value))
        async with self._lock:  # one after the other: a grammar may take all of a core
            if key not in self._known:
                self._known[key] = await asyncio.to_thread(self._checked, field, kind, value)
            self._known.move_to_end(key)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
            return self._known[key]

    def _checked(self, field: str, kind: str, value: Any) -> str:
        assert self._compile is not None  # since learn()
        try:
            grammar = self._translated(kind, value)
            self._compile(grammar)
        except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AssertionError) else str(error)
            raise _refused(field, f"cannot be compiled: {reason}") from None
        return grammar

    def _translated(self, kind: Any, value: Any) -> str:
        from llguidance import LLMatcher, grammar_from

        if kind in ("json", "json_object"):
            schema = {"type": "object"} if kind == "json_object" else value
            schema = json.loads(schema) if isinstance(schema, str) else schema
            schema = without_unknown_formats(schema if isinstance(schema, dict) else {"allOf": [schema]})
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACES})
        if kind == "choice":
            return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
        if kind == "tags":
            return self._of_tags(json.loads(value) if isinstance(value, str) else value)
        return grammar_from(kind, value)

    def _of_tags(self, value: Json) -> str:
        """Free text, in which one of the `triggers` begins a structure: {begin, schema, end}."""
        from llguidance import StructTag

        if "format" in value:
            raise ValueError("expected {structures, triggers}, got xgrammar's format")
        tags, triggers = [], value["triggers"]
        for each in value["structures"]:
            trigger = next((trigger for trigger in triggers if each["begin"].startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"structures: {each['begin']!r} begins with none of the triggers")
            schema = without_unknown_formats(each.get("schema") or {})
            tags.append(StructTag(trigger=trigger, begin=each["begin"], grammar=schema, end=each["end"]))
        special = all(trigger in self.tokenizer.added_ids for trigger in triggers)
        return StructTag.to_grammar(tags, assume_special=special, text_regex=ANY_TEXT)


def without_unknown_formats(schema: Any) -> Any:
    """A JSON schema in which a format that is not known asks for nothing, as the standard has it."""
    if isinstance(schema, list):
        return [without_unknown_formats(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: value if name in ("const", "enum") else without_unknown_formats(value)
            for name, value in schema.items() if name != "format" or isinstance(value, dict) or value in FORMATS}


def _refused(field: str, why: str) -> ApiError:
    return ApiError(f"{field}: {why}", field.partition(".")[0].partition("[")[0], "invalid_grammar")


def _asked(body: Sampling) -> list[tuple[str, str, Any]]:
    """(field, kind, value) of each form that a request can prescribe; those that it does not are None."""
    asked = [(name, kind, getattr(body, name, None)) for name, kind in OF_FIELD.items()]
    for name, value in (getattr(body, "structured_outputs", None) or {}).items():
        if name in OF_OUTPUTS:
            asked.append((f"structured_outputs.{name}", OF_OUTPUTS[name], value))
        elif value is not None and name not in NO_OBJECTION:
            raise ApiError(f"structured_outputs.{name}: not supported by wave64; leave it out", "structured_outputs")
    if wanted := getattr(body, "response_format", None):
        asked.append(_of_response_format(wanted))
    return asked


def _of_response_format(wanted: Json) -> tuple[str, str, Any]:
    kind = wanted.get("type")
    if kind == "text":
        return "response_format", "json", None
    if kind == "json_object":
        return "response_format", "json_object", True
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        if not isinstance(inner, dict) or inner.get("schema") in (None, False):  # false: no answer is right
            raise ApiError("response_format.json_schema: expected {name, schema}", "response_format", "missing")
        return "response_format.json_schema.schema", "json", inner["schema"]
    if kind == "structural_tag":
        return "response_format", "tags", wanted
    raise ApiError(f"response_format.type: expected text, json_object, json_schema or structural_tag, got {kind}",
                   "response_format")  # fmt: skip
