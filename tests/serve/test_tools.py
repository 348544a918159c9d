"""Tool calls: what the readers make of transcripts, however those are split, and what the server makes of tools."""

import json
from typing import Any

import openai
import pytest
from helpers_http import App
from hypothesis import given, settings
from hypothesis import strategies as st

from wave64.serve.args import ServerArgs
from wave64.serve.http import reasoning, tools
from wave64.serve.http.message import Message
from wave64.serve.http.templates import Template
from wave64.serve.http.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Four score"}]
NAMES = ("get_weather", "trending_songs", "get_user_info")
V3 = ('<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"location": "%s"}\n```<｜tool▁call▁end｜>')
V31 = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"location": "%s"}<｜tool▁call▁end｜>'
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def weather(location: str) -> tuple[str, dict]:
    return "get_weather", {"location": location}


OPEN = '{"name": "get_weather", "parameters": {"location": "A"}, "a": 1}'
SONGS = ("trending_songs", {"n": "10", "genre": "all"})
# parser, what a model wrote, the content, the calls
TRANSCRIPTS = [
    # Llama 3.1's model card
    ("llama3", '<|python_tag|>{"name": "trending_songs", "parameters": {"n": "10", "genre": "all"}}', None, [SONGS]),
    ("llama3", '{"type": "function", "name": "trending_songs", "parameters": {"n": "10", "genre": "all"}}', None,
     [SONGS]),
    ("llama3", '{"name": "trending_songs", "parameters": {"n": "10", "genre": "all"}}', None, [SONGS]),
    ("llama3", '{"parameters": {"location": "}\\"{"}, "name": "get_weather"}', None, [weather('}"{')]),
    ("llama3", '{"name": "get_weather", "parameters": {"location": "C:\\\\"}} ', None, [weather("C:\\")]),
    ("llama3", '{"name": "get_weather", "parameters": null}', None, [("get_weather", {})]),
    ("llama3", 'I look.\n<|python_tag|>{"name": "get_weather", "parameters": {"location": "Ørsta 🌧"}}; '
               '{"name": "get_weather", "parameters": {"location": "B"}}', "I look.",
     [weather("Ørsta 🌧"), weather("B")]),
    ("llama3", "No { tool } is needed. \n", "No { tool } is needed. \n", []),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", '{"name": "rm", "parameters": {"a": 1}}', '{"name": "rm", "parameters": {"a": 1}}', []),
    ("llama3", '{"name": "get_weather", "parameters": {"location": tru}} <|python_tag|>{}',
     '{"name": "get_weather", "parameters": {"location": tru}} <|python_tag|>{}', []),
    ("llama3", '{"name": "get_weather", "parameters": {"location": "Os', '{"name": "get_weather", "parameters": '
                                                                         '{"location": "Os', []),
    ("llama3", OPEN, OPEN, []),
    ("llama3", '{"a": 1, "name": "get_weather"}', '{"a": 1, "name": "get_weather"}', []),
    ("llama3", '{"name": "get_weather", "parameters": {"location": "A"}', None, [weather("A")]),
    ("llama3", '{"name": "get_weather", "parameters": {"location": "A"}} there', " there", [weather("A")]),
    # Llama 3.2's model card, and Llama 4's
    ("pythonic", "[get_user_info(user_id=7890, special='black')]", None,
     [("get_user_info", {"user_id": 7890, "special": "black"})]),
    ("pythonic", '[get_weather(location="a]b"), get_weather(location=[1, {"x": [true, null]}])]\n', None,
     [weather("a]b"), weather([1, {"x": [True, None]}])]),
    ("pythonic", '<|python_start|>[get_weather(location="A")]<|python_end|>', None, [weather("A")]),
    ("pythonic", "[get_weather(location=x)] is how", "[get_weather(location=x)] is how", []),
    ("pythonic", "[1] and [2]", "[1] and [2]", []),
    ("pythonic", "[get_weather(location=[false, False, -1.5, null, None])]", None,
     [weather([False, False, -1.5, None, None])]),
    ("pythonic", "[rm(a=1)]", "[rm(a=1)]", []),
    ("pythonic", "[get_weather('A')]", "[get_weather('A')]", []),
    ("pythonic", "[get_weather(location='A'", "[get_weather(location='A'", []),
    # what DeepSeek-V3's chat template makes of past calls
    ("deepseekv3", BEGIN + V3 % "A" + "\n" + V3 % "B" + END, None, [weather("A"), weather("B")]),
    ("deepseekv3", "I look.\n\n" + BEGIN + V3 % "A" + END + "\n", "I look.", [weather("A")]),
    ("deepseekv3", BEGIN + V3 % "A", None, [weather("A")]),
    ("deepseekv3", BEGIN + V3 % "A" + "\n" + V3[:40], V3[:40], [weather("A")]),
    ("deepseekv3", BEGIN + "nothing", BEGIN + "nothing", []),
    ("deepseekv3", "a <｜tool▁", "a <｜tool▁", []),
    # DeepSeek-V3.1's model card
    ("deepseekv31", BEGIN + V31 % "A" + V31 % "B" + END, None, [weather("A"), weather("B")]),
    ("deepseekv31", "I look." + BEGIN + V31 % "A" + END, "I look.", [weather("A")]),
    ("deepseekv31", BEGIN + V31.replace("get_weather", "rm") % "A" + END, BEGIN + V31.replace("get_weather", "rm") % "A"
     + END, []),
    # Qwen2.5's chat template
    ("qwen25", 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"location": "A"}}\n</tool_call>\n'
               '<tool_call>\n{"name": "get_weather", "arguments": {"location": "B"}}\n</tool_call>', "I look.",
     [weather("A"), weather("B")]),
    ("qwen25", '<tool_call>\n{"arguments": {"location": "A"}, "name": "get_weather"}\n</tool_call>', None,
     [weather("A")]),
    # what tool_choice "required" makes any model write
    ("forced", '[{"name": "get_weather", "parameters": {"location": "A"}}, {"name": "get_weather", "parameters": '
               '{"location": "B"}}]', None, [weather("A"), weather("B")]),
]  # fmt: skip


#: How a format writes a call, what is between two of them, and what is around all.
WRITERS = {
    "llama3": ('{"name": "%s", "parameters": %s}', "; ", "<|python_tag|>", ""),
    "deepseekv3": (V3.replace("get_weather", "%s").replace('{"location": "%s"}', "%s"), "\n", BEGIN, END),
    "deepseekv31": (V31.replace("get_weather", "%s").replace('{"location": "%s"}', "%s"), "", BEGIN, END),
    "qwen25": ('<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>', "\n", "", ""),
    "pythonic": ("%s(%s)", ", ", "[", "]"),
    "forced": ('{"name": "%s", "parameters": %s}', ", ", "[", "]"),
}
#: Arguments of every kind, with the marks of JSON and of the formats in strings.
ARGUMENTS = [{}, {"location": 'Ørsta 🌧 "}]\\'}, {"a": [1, [{"x": "]});"}], {}], "b": {"c": None, "d": [True, False]}},
             {"n": -1500.25, "s": "</tool_call>\n```<｜tool▁call▁end｜>'"}]  # fmt: skip


@pytest.mark.parametrize("parser", [*tools.PARSERS, "forced"])
def test_calls_of_every_format_however_they_are_split(parser):
    form, between, begin, end = WRITERS[parser]
    for names in (NAMES[:1], NAMES):
        for arguments in ARGUMENTS:
            told = ", ".join(f"{k}={v!r}" for k, v in arguments.items()) if parser == "pythonic" else json.dumps(
                arguments, ensure_ascii=False)  # fmt: skip
            text = begin + between.join(form % (name, told) for name in names) + end
            calls = [(name, arguments) for name in names]
            made = message(parser).whole(text)
            assert (made["content"], calls_of(made)) == (None, calls)
            cuts = range(1, len(text), 1 if len(names) == 1 else 9)
            for parts in [[text[:at], text[at:]] for at in cuts] + [list(text)]:
                stream = message(parser)
                got = put_together([stream.delta(part, i == len(parts) - 1) for i, part in enumerate(parts)])
                assert (got["content"], calls_of(got)) == (None, calls)


def message(parser: str, limit: int | None = None) -> Message:
    if parser == "pythonic":
        return Message(None, tools.PythonicReader(NAMES, limit))
    form = tools.FORCED if parser == "forced" else tools.FORMATS[parser]
    return Message(None, tools.FormatReader(form, NAMES, limit))


def calls_of(made: dict) -> list[tuple[str, dict]]:
    functions = [call["function"] for call in made.get("tool_calls", [])]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def put_together(deltas: list[dict]) -> dict:
    """As a client does it."""
    content, calls = "", {}
    for delta in deltas:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(calls), "calls begin in their order"
                calls[part["index"]] = {**part, "function": {**part["function"], "arguments": ""}}
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return {"content": content or None, "tool_calls": list(calls.values())}


@pytest.mark.parametrize(("parser", "text", "content", "calls"), TRANSCRIPTS)
def test_a_transcript_however_it_is_split(parser, text, content, calls):
    made = message(parser).whole(text)
    assert calls_of(made) == calls
    assert made["content"] == (content if calls else content or "")
    assert len({call["id"] for call in made.get("tool_calls", [])}) == len(calls)
    splits = [[text[:at], text[at:]] for at in range(len(text))] + [list(text)]
    for parts in splits:
        whole = message(parser)
        stream = put_together([whole.delta(part, i == len(parts) - 1) for i, part in enumerate(parts)])
        assert whole.has_called == bool(calls)
        if not calls and stream["tool_calls"]:  # a part of it was given before it turned out to be none
            (given,) = stream["tool_calls"]
            assert text.startswith('{"name": "get_weather", "parameters": ' + given["function"]["arguments"])
            continue
        assert stream["content"] == (content or None)
        assert calls_of(stream) == calls


FRAGMENTS = [
    '{"name": "get_weather", "parameters": ', '{"location": "A"}', "{", "}", "[", "]", '"', ";", "text ", "\n", "  ",
    "<|python_tag|>", BEGIN, END, V3 % "A", V31 % "A", "<tool_call>", "</tool_call>", "\n```", "<｜tool▁", ", ", "\\",
    '{"name": "get_weather", "arguments": {"location": "A"}}', '[get_weather(location="A")]', "<|python_start|>",
    '{"a": 1, "name": "get_weather"}', "get_weather(location=1)",
]  # fmt: skip


@settings(deadline=None)
@given(st.sampled_from([*tools.PARSERS, "forced"]), st.lists(st.sampled_from(FRAGMENTS), max_size=9), st.data())
def test_any_text_however_it_is_split(parser, fragments, data):
    """A call whose arguments break off aside, of which a stream has a part."""
    text = "".join(fragments)
    made, stream = message(parser).whole(text), message(parser)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    got = put_together([stream.delta(part, i == len(parts) - 1) for i, part in enumerate(parts)])
    if len(got["tool_calls"]) > len(calls_of(made)):
        assert made["content"].endswith(got["content"] or "")
    else:
        assert ((got["content"] or ""), calls_of(got)) == ((made["content"] or ""), calls_of(made))


def test_a_second_call_is_dropped_where_one_is_allowed():
    text = BEGIN + V3 % "A" + "\n" + V3 % "B" + END
    assert calls_of(message("deepseekv3", 1).whole(text)) == [weather("A")]
    text = "[get_weather(location='A'), get_weather(location='B')]"
    assert calls_of(message("pythonic", 1).whole(text)) == [weather("A")]


def test_arguments_are_given_as_they_come():
    stream, text = message("llama3"), '{"name": "get_weather", "parameters": {"location": "' + "x" * 4000 + '"}}'
    pieces = [delta for c in text for delta in [stream.delta(c, False)] if delta]
    assert len(pieces) > 50
    assert calls_of(put_together(pieces)) == [weather("x" * 4000)]


def test_flags_name_the_parsers():
    args = {item.name: item.metadata["choices"] for item in ServerArgs.__dataclass_fields__.values()}
    assert sorted(args["tool_call_parser"]) == sorted(tools.PARSERS)
    assert sorted(args["reasoning_parser"]) == sorted(reasoning.PARSERS)


# ---- the application

WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": {
    "type": "object", "additionalProperties": False, "required": ["location"],
    "properties": {"location": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"enum": ["A", "B"]}}}}}  # fmt: skip
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {
    "type": "object", "additionalProperties": False, "properties": {}}}}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def test_an_answer_that_calls(tokenizer):
    text = '{"name": "get_weather", "parameters": {"location": "A"}}'
    app = App(tokenizer, text, tool_call_parser="llama3")
    app.engine.end = "stop"
    (choice,) = app.post(CHAT, messages=USER, tools=[WEATHER]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [weather("A")]
    app.engine.end = "length"
    assert app.post(CHAT, messages=USER, tools=[WEATHER]).json()["choices"][0]["finish_reason"] == "length"
    app.engine.end = "stop"
    for asked in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [TIME]}):
        (choice,) = app.post(CHAT, messages=USER, **asked).json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"] == {"role": "assistant", "content": text}
    twice = App(tokenizer, f"{text}; {text}", tool_call_parser="llama3")
    for asked, count in (({}, 2), ({"parallel_tool_calls": True}, 2), ({"parallel_tool_calls": False}, 1)):
        (choice,) = twice.post(CHAT, messages=USER, tools=[WEATHER], **asked).json()["choices"]
        assert calls_of(choice["message"]) == [weather("A")] * count
    lines = app.post(CHAT, messages=USER, tools=[WEATHER], stream=True, n=2).text.splitlines()
    events = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    for index in (0, 1):
        mine = [event for event in events if event["index"] == index]
        assert calls_of(put_together([event["delta"] for event in mine])) == [weather("A")]
        assert [event["finish_reason"] for event in mine if event["finish_reason"]] == ["tool_calls"]
        assert all(event["delta"] or event["finish_reason"] for event in mine)


def test_a_call_that_is_required_comes_before_the_form_of_an_answer(tokenizer):
    """As agents ask that have a tool to call and a form for their last answer: there is no content to have a form."""
    app, form = App(tokenizer, "ok"), {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1]}}}
    forced = {"tools": [TIME], "tool_choice": "required"}
    for more in (forced, {**forced, "response_format": form}, {**forced, "response_format": {"type": "json_object"}}):
        assert app.post(CHAT, messages=USER, **more).status_code == 200
    grammars = [request.grammar for request in app.engine.requests]
    assert grammars[0] == grammars[1] == grammars[2]
    refused = app.post(CHAT, messages=USER, **forced, response_format={"type": "xml"}).json()["error"]
    assert refused["param"] == "response_format"


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"tool_choice": "required"}, "tool_choice", "allowed only with tools"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice",
     "expected one of the tools, get_time, got x"),
    ({"tools": [{"type": "function"}]}, "tools", "tools[0].function: required"),
    ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice", "tool_choice: expected"),
    ({"tools": [TIME], "tool_choice": "required", "regex": "a"}, "tool_choice", "tool_choice and regex"),
    ({"tools": [TIME, {"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}],
      "tool_choice": "required"}, "tools", "tools[1].function.parameters: cannot be compiled: Invalid type: foo"),
])  # fmt: skip
def test_tools_that_are_none(tokenizer, fields, param, words):
    answer = App(tokenizer).post(CHAT, messages=USER, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]


def test_what_templates_get(tokenizer_folder, tmp_path):
    """The tools that may be called; past calls, without content where a template tests for it."""
    source = (
        "{% for t in tools or [] %}<{{ t.function.name }}|{{ t.function.parameters | tojson }}>{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{% if m.content is none %}{% for c in m.tool_calls %}"
        "{{ c['type'] + ' ' + c['function']['name'] + ' ' + c['function']['arguments'] + '\\n' }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (tmp_path / "template").write_text(source)
    app = App(Tokenizer(tokenizer_folder, str(tmp_path / "template")))
    parameters = json.dumps(TIME["function"]["parameters"])
    assert app.prompt(USER, tools=[TIME]).endswith(f"<get_time|{parameters}>[user]Four score")
    assert app.prompt(USER, tools=[TIME], tool_choice="none").endswith("[user]Four score")
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"a":  1}'}}
    for content in (None, ""):
        said = {"role": "assistant", "content": content, "tool_calls": [call]}
        prompt = app.prompt([*USER, said, {"role": "tool", "tool_call_id": "c1", "content": "noon"}])
        assert prompt.endswith('[user]Four score[assistant]function get_time {"a":  1}\n[tool]noon')
    prepared = Template("{{ messages }}").prepare([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert prepared[0]["content"] == ""


@pytest.mark.parametrize(("template", "parser"), [
    ("{{ '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '```json' }}", "deepseekv3"),
    ("{{ '<｜tool▁call▁begin｜>' + tool['function']['name'] }}", "deepseekv31"), ("<tool_call>", "qwen25"),
    ("{{ '<|python_tag|>' }}", "llama3"), ("{{ messages }}", None),
])  # fmt: skip
def test_the_format_that_a_template_teaches(template, parser):
    assert tools.parser_of(template) == parser


# ---- a server, whose model knows nothing of tools: what it says is what the grammar leaves

def test_calls_that_have_to_be(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        ask: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": [WEATHER, TIME], "max_tokens": 400,
                               "seed": 1}  # fmt: skip
        create: Any = client.chat.completions.create
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        for choice, count in (("required", None), (named, 1)):
            answer = create(**ask, tool_choice=choice).choices[0]
            assert answer.finish_reason in ("tool_calls", "length")
            made = [(call.function.name, json.loads(call.function.arguments)) for call in answer.message.tool_calls]
            assert made
            for call in made:
                assert call in [("get_time", {}), weather("A"), weather("B")]
            if count:
                assert len(made) == count
                assert made[0][0] == "get_weather"
        one = client.chat.completions.create(**ask, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert len(one.message.tool_calls) == 1
        with client.chat.completions.stream(**ask, tool_choice="required", parallel_tool_calls=False) as stream:
            streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
        assert (streamed.function.name, streamed.function.arguments) == (
            one.message.tool_calls[0].function.name, one.message.tool_calls[0].function.arguments)  # fmt: skip
