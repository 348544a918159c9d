"""Chat templates: OpenAI's messages reach each kind of template in its own form; no template harms the server."""

import asyncio
import json
from pathlib import Path

import pytest

from wave64.serve.http import template_process
from wave64.serve.http.template_process import TemplateProcess, render_once
from wave64.serve.http.templates import Template, TemplateError

LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
WAIT_S = 60  # for what must happen; only a defect waits so long
PLAIN = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
CALLED = {"name": "f", "arguments": '{"a": {"b": [1, "é"]}}'}
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALLED}]}]


def render(source: str, messages: list[dict], **variables) -> str:
    return Template(source).render(messages, variables)


def test_null_content_is_empty_unless_the_template_asks_about_it():
    null = [{"role": "assistant", "content": None}]
    assert render(PLAIN, null) == "[assistant|]"
    assert render(PLAIN, [{"role": "user"}]) == "[user|]"
    for test in ("m.content is none", "m['content'] is not none"):
        source = "{% for m in messages %}{{ 'yes' if " + test + " else 'no' }}{% endfor %}"
        assert render(source, null) == ("no" if "not" in test else "yes")
        assert render(source, [{"role": "user", "content": None}]) == ("yes" if "not" in test else "no")


def test_developer_is_system_to_a_template_that_does_not_name_it():
    messages = [{"role": "developer", "content": "Be brief."}]
    assert render(PLAIN, messages) == "[system|Be brief.]"
    assert render(PLAIN + "{% if 'developer' == messages[0].role %}!{% endif %}", messages) == "[developer|Be brief.]!"
    assert render("{# developer #}" + PLAIN + "developer", messages) == "[system|Be brief.]developer"


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("a | tojson", '{"a": {"b": [1, "é"]}}'),
        ("a.a.b[1]", "é"),
        ("a is mapping and a is not string", "True"),
        ("a | items | list | length", "1"),
        ("'<' + a + '>'", '<{"a": {"b": [1, "é"]}}>'),  # DeepSeek's, which takes text
        ("'<' ~ a", '<{"a": {"b": [1, "é"]}}'),
        ("a", '{"a": {"b": [1, "é"]}}'),
    ],
)
def test_arguments_are_an_object_and_are_written_as_the_json_they_came_as(expression, text):
    source = "{% set a = messages[0].tool_calls[0].function.arguments %}{{ " + expression + " }}"
    assert render(source, CALL) == text
    as_object = json.loads(json.dumps(CALL))
    as_object[0]["tool_calls"][0]["function"]["arguments"] = {"a": {"b": [1, "é"]}}
    assert render(source, as_object) == text
    source = "{% set a = messages[0].function_call.arguments %}{{ " + expression + " }}"
    assert render(source, [{"role": "assistant", "content": None, "function_call": CALLED}]) == text


@pytest.mark.parametrize("arguments", ["", " ", None, {}])
def test_no_arguments_are_an_empty_object(arguments):
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", call) == "{}"


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("x", "messages[1].tool_calls: expected a list, got \"x\""),
        (["x"], "messages[1].tool_calls[0]: expected an object"),
        ([{"function": "f"}], "messages[1].tool_calls[0].function: expected an object"),
        ([{"function": {"arguments": '[["a", 1]]'}}], "[0].function.arguments: expected the JSON of an object, got"),
        ([{"function": {"arguments": "{"}}], "[0].function.arguments: expected the JSON of an object, got"),
        ([{"function": {"arguments": "[1]"}}], "[0].function.arguments: expected the JSON of an object, got"),
        ([{"function": {"arguments": "[" * 10**5}}], "[0].function.arguments: expected the JSON of an object, got"),
    ],
)
def test_calls_in_another_form_are_refused_in_words(calls, words):
    with pytest.raises(TemplateError) as refused:
        render(PLAIN, [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}])
    assert words in str(refused.value)


def test_what_is_null_or_no_call_is_absent():
    source = "{% for m in messages %}{{ m.keys() | list | sort | join(',') }}{% endfor %}"
    message = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "audio": None, "name": None}
    assert render(source, [message]) == "content,role"
    assert render(source, [{**message, "tool_calls": [], "name": "n"}]) == "content,name,role"


PARTS = [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]
EACH = "{% for p in CONTENT %}<{{ p.text }}>{% endfor %}"
IN_A_MACRO = ("{% macro show(content) %}{% if content is string %}{{ content }}{% else %}" + EACH + "{% endif %}"
              "{% endmacro %}{{ show(messages[0].content) }}")  # fmt: skip


@pytest.mark.parametrize(
    ("source", "of_parts", "of_text", "of_null"),
    [
        ("{{ messages[0].content }}", "Who?", "Who?", ""),
        ("{% for w in messages[0].content.split('h') %}<{{ w }}>{% endfor %}", "<W><o?>", "<W><o?>", "<>"),
        (EACH.replace("CONTENT", "messages[0].content"), "<Who><?>", "<Who?>", ""),
        (EACH.replace("CONTENT", "messages[0]['content'] | selectattr('type', 'equalto', 'text')"), "<Who><?>",
         "<Who?>", ""),
        ("{% set c = messages[0].content %}" + EACH.replace("CONTENT", "c"), "<Who><?>", "<Who?>", ""),
        (IN_A_MACRO.replace("CONTENT", "content"), "<Who><?>", "Who?", ""),
        ("{{ messages[0].content[0].text if messages[0].content else '' }}", "Who", "Who?", ""),
        ("{{ messages[0]['content'][0]['text'] if messages[0].content else '' }}", "Who", "Who?", ""),
        ("{{ messages[0].content[0] }}{{ messages[0].content[1:] }}", "Who?", "Who?", ""),
        ("{{ messages[0].content | map(attribute='text') | join('-') }}", "Who-?", "Who?", ""),
    ],
)  # fmt: skip
def test_content_is_text_or_parts_as_the_template_takes_it(source, of_parts, of_text, of_null):
    for content, text in ((PARTS, of_parts), ("Who?", of_text), (None, of_null)):
        assert render(source, [{"role": "user", "content": content}]) == text


@pytest.mark.parametrize(
    "source",
    ["{{ 1 / 0 }}", "{{ missing.field }}", "{{ messages[7].content.x }}", "{{ ''.__class__.__mro__ }}",
     "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}", "{{ messages.append(1) }}",
     "{{ 'x' | no_such_filter }}", "{{ {}['x'] + 1 }}", "{{ range(10**9) | list }}", "{{ strftime_now(5) }}",
     "{% include 'x' %}", "{{ {'x': messages} | tojson(indent=loop) }}", "{{ ''.encode('x').decode('nothing') }}"],
)  # fmt: skip
def test_whatever_a_template_does_is_a_refusal_in_words(source):
    with pytest.raises(TemplateError, match="the chat template refuses these messages: ."):
        render(source, [{"role": "user", "content": "x"}])


def test_one_conversation_in_a_process_of_its_own():
    assert render_once(PLAIN + "{{ x }}", CALL[:1], {"x": "é"}) == "[assistant|]é"
    with pytest.raises(TemplateError, match="the chat template refuses these messages: ZeroDivisionError"):
        render_once("{{ 1 / 0 }}", CALL, {})


def test_one_conversation_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(template_process, "LIMIT_S", -4.5)  # and the time that a server is given to do so itself
    with pytest.raises(TemplateError, match=r"the chat template's process ended with status -14"):
        render_once(LOOP, CALL, {})


def test_what_is_no_template_is_refused_before_it_runs():
    for source in ("{% if %}", "{{ " + "(" * 5000, "{% if 1 %}" * 3000, "{{ " + "+".join("1" * 20000) + " }}"):
        with pytest.raises(TemplateError, match="not a Jinja template: ."):
            Template(source)
    with pytest.raises(TemplateError, match="at most 262144 characters, got 262145"):  # reading it may take minutes
        Template("x" * 262145)
    Template("{{ 10 ** (10 ** 8) }}")  # which would take for ever to compile


def on_demand(bad: str) -> str:
    """A template that is well behaved until it is asked for the other thing."""
    return "{% if messages[0].content == 'bad' %}" + bad + "{% endif %}fine"


@pytest.mark.parametrize(
    ("bad", "limit_s", "words"),
    [
        (LOOP, 0.5, "did not end within 0.5 s"),
        ("{{ messages[0].n ** (messages[0].n ** 8) }}", 0.5, "did not end within 0.5 s"),  # one C call
        ("{{ 'x' * (messages[0].n * 10**9) }}", 60, "MemoryError"),
        ("{{ 'x' * (70 * 2**20) }}", 60, "made 73400324 characters, expected at most 67108864"),
        ("{{ 1 / 0 }}", 60, "ZeroDivisionError"),
    ],
    ids=["loop", "power", "memory", "length", "error"],
)
def test_a_bad_template_is_ended_and_the_next_conversation_is_served(bad, limit_s, words):
    async def converse() -> None:
        process = TemplateProcess(on_demand(bad), limit_s)
        try:
            with pytest.raises(TemplateError, match=words):
                await process.render([{"role": "user", "content": "bad", "n": 10}], {})
            process._limit_s = 60  # of the machine's own making there may be no failure
            assert await process.render([{"role": "user", "content": "good"}], {}) == "fine"
        finally:
            await process.stop()

    asyncio.run(converse())


def test_a_client_that_leaves_ends_the_rendering_and_the_next_gets_its_own_prompt():
    async def converse() -> str:
        process = TemplateProcess(on_demand(LOOP), 60)
        try:
            await process.start()
            first = process._process
            leaving = asyncio.create_task(process.render([{"role": "user", "content": "bad"}], {}))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            text = await process.render([{"role": "user", "content": "é"}], {})
            await first.wait()
            return text
        finally:
            await process.stop()

    assert asyncio.run(converse()) == "fine"


def test_a_start_does_not_wait_for_the_conversation_under_way_and_says_why_it_failed(monkeypatch):
    async def converse() -> None:
        process = TemplateProcess(on_demand(LOOP), WAIT_S)
        try:
            await process.start()
            under_way = asyncio.create_task(process.render([{"role": "user", "content": "bad"}], {}))
            await asyncio.sleep(0)
            await asyncio.wait_for(process.start(), WAIT_S / 2)
            under_way.cancel()
            await asyncio.gather(under_way, return_exceptions=True)
            monkeypatch.setattr(template_process, "RUN", "")
            with pytest.raises(TemplateError, match="process did not start: "):
                await process.start()
            monkeypatch.undo()
            assert await process.render([{"role": "user", "content": "good"}], {}) == "fine"
        finally:
            await process.stop()

    asyncio.run(converse())


def test_a_process_that_dies_is_replaced():
    async def converse() -> list[str]:
        process, texts = TemplateProcess("{{ messages[0].content }} ☃", 60), []
        try:
            for content in ("one", "two\n" * 40_000):
                texts.append(await process.render([{"role": "user", "content": content}], {}))
                assert "libtorch" not in Path(f"/proc/{process._process.pid}/maps").read_text(), "it starts in no time"
                process._process.kill()
                await process._process.wait()
            return texts
        finally:
            await process.stop()

    assert asyncio.run(converse()) == ["one ☃", "two\n" * 40_000 + " ☃"]
