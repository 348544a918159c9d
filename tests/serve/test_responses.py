"""/v1/responses, by OpenAI's client: text, forms, calls, streams."""

import json
from typing import Any

import openai
import pytest
from helpers_http import App

from wave64.serve.http.tokenizer import Tokenizer

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "Weather.", "strict": True, "parameters": {
    "type": "object", "additionalProperties": False, "required": ["location"],
    "properties": {"location": {"enum": ["A", "B"]}}}}  # fmt: skip
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
    {"type": "reasoning", "summary": []},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"location": "A"}'},
    {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"location": "B"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Rain."}]},
    {"role": "user", "content": "And B?"},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        yield made


def test_a_response_is_the_chats_answer(server, client):
    asked = {"temperature": 0, "model": "tiny"}
    response = client.responses.create(input="Four score", instructions="Be brief.", max_output_tokens=12, **asked)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Four score"}]
    chat = server.post(CHAT, messages=messages, max_tokens=12, **asked).json()
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chat["usage"]["completion_tokens"]
    ended = chat["choices"][0]["finish_reason"] == "stop"
    assert response.status == ("completed" if ended else "incomplete")
    assert ended or response.incomplete_details.reason == "max_output_tokens"


def test_its_stream_is_put_together_by_the_client(client):
    asked: Any = {"input": "Four score", "model": "tiny", "max_output_tokens": 300, "temperature": 0}
    for more in ({}, {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
                 {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"enum": [1, 2]}}}}):  # fmt: skip
        whole = client.responses.create(**asked, **more)
        with client.responses.stream(**asked, **more) as stream:
            events = list(stream)
        final = events[-1].response
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        strip = {"id", "call_id", "parsed_arguments", "parsed"}
        kept = [[{k: v for k, v in item.to_dict().items() if k not in strip and k != "content"} for item in made.output]
                for made in (whole, final)]  # fmt: skip
        assert kept[0] == kept[1]
        assert whole.output_text == final.output_text
        assert whole.usage.total_tokens == final.usage.total_tokens
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert deltas == whole.output_text
        if "tools" in more:
            (call,) = whole.output
            assert (call.type, call.name) == ("function_call", "get_weather")
            assert json.loads(call.arguments)["location"] in ("A", "B")
        elif more:
            assert whole.output_text in ("1", "2")


def test_thoughts_and_calls_are_items(tokenizer):
    app = App(tokenizer, 'Hm.</think>So.\n<|python_tag|>{"name": "get_weather", "parameters": {"location": "A"}}',
              reasoning_parser="deepseek-r1", tool_call_parser="llama3")  # fmt: skip
    app.engine.end = "stop"
    whole = app.post(RESPONSES, input="x", tools=[WEATHER]).json()
    items, used = whole["output"], whole["usage"]
    assert used["output_tokens_details"]["reasoning_tokens"] == len(tokenizer.encode("Hm.", add_special_tokens=False))
    assert used["output_tokens"] == len(app.engine.tokens)
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert (items[0]["content"][0]["text"], items[1]["content"][0]["text"]) == ("Hm.", "So.")
    assert items[2]["arguments"] == '{"location": "A"}'
    lines = app.post(RESPONSES, input="x", tools=[WEATHER], stream=True).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in events]
    assert [event["item"]["type"] for event in events if event["type"] == "response.output_item.done"] == [
        "reasoning", "message", "function_call"]  # fmt: skip
    streamed = events[-1]["response"]["output"]
    assert [item.get("content", item.get("arguments")) for item in streamed] == [
        item.get("content", item.get("arguments")) for item in items]  # fmt: skip


@pytest.mark.parametrize(("end", "status", "of_item", "event"), [
    ("stop", "completed", "completed", "completed"), ("length", "incomplete", "incomplete", "incomplete"),
    ("abort", "cancelled", "incomplete", "completed")])  # fmt: skip
def test_how_a_response_ends(tokenizer, end, status, of_item, event):
    app = App(tokenizer, "So.")
    app.engine.end = end
    whole = app.post(RESPONSES, input="x").json()
    assert (whole["status"], whole["output"][0]["status"]) == (status, of_item)
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if end == "length" else None)
    lines = app.post(RESPONSES, input="x", stream=True).text.splitlines()
    last = json.loads([line for line in lines if line.startswith("data: {")][-1][6:])
    assert (last["type"], last["response"]["status"]) == (f"response.{event}", status)


def test_items_become_messages(tokenizer):
    app = App(tokenizer)
    assert app.post(RESPONSES, input=ITEMS, tools=[WEATHER], max_output_tokens=1).status_code == 200
    prompt = tokenizer.decode(app.engine.requests[-1].input_ids, skip_special_tokens=False)
    assert prompt.endswith("[user] Weather?\n[assistant] \n[tool] rain\n[assistant] Rain.\n[user] And B?\n[assistant] ")


TEMPLATE = ("{{ mood }}{{ tools | tojson }}{% for m in messages %}[{{ m.role }}{{ m.tool_call_id }}]{{ m.content }}"
            "{% for c in m.tool_calls or [] %}<{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}>"
            "{% endfor %}{% endfor %}")  # fmt: skip


def test_what_a_template_gets_of_items_tools_and_variables(tokenizer_folder, tmp_path):
    """Calls that follow each other are one message's."""
    (tmp_path / "template").write_text(TEMPLATE)
    app = App(Tokenizer(tokenizer_folder, str(tmp_path / "template")))
    tool = {**WEATHER, "description": None}
    assert app.post(RESPONSES, input=ITEMS, instructions="Be brief.", tools=[tool], max_output_tokens=1,
                    chat_template_kwargs={"mood": "calm"}).status_code == 200  # fmt: skip
    prompt = app.generator.tokenizer.decode(app.engine.requests[-1].input_ids, skip_special_tokens=False)
    function = {"name": "get_weather", "parameters": WEATHER["parameters"], "strict": True}
    said = prompt[prompt.index("calm") + 4 : prompt.index("[system]")]
    assert json.loads(said) == [{"type": "function", "function": function}]
    assert prompt.endswith('[system]Be brief.[user]Weather?[assistant]<c1 get_weather {"location": "A"}>'
                           '<c2 get_weather {"location": "B"}>[toolc1]rain[assistant]Rain.[user]And B?')  # fmt: skip


def test_what_an_answer_said_before_it_called_is_one_message_with_the_calls(tokenizer_folder, tmp_path):
    """As it was when it was made. A message behind the calls is another one."""
    (tmp_path / "template").write_text(TEMPLATE)
    app = App(Tokenizer(tokenizer_folder, str(tmp_path / "template")))
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    assert app.post(RESPONSES, input=[ITEMS[0], said, *ITEMS[2:]], max_output_tokens=1).status_code == 200
    prompt = app.generator.tokenizer.decode(app.engine.requests[-1].input_ids, skip_special_tokens=False)
    assert prompt.endswith('[user]Weather?[assistant]Let me see.<c1 get_weather {"location": "A"}>'
                           '<c2 get_weather {"location": "B"}>[toolc1]rain[assistant]Rain.[user]And B?')  # fmt: skip


def test_calls_are_items_of_their_own(tokenizer):
    call = '{"name": "get_weather", "parameters": {"location": "%s"}}'
    app = App(tokenizer, f"{call % 'A'}; {call % 'B'}", tool_call_parser="llama3")
    app.engine.end = "stop"
    for more, count in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        response = app.post(RESPONSES, input="x", tools=[WEATHER], **more).json()
        assert [json.loads(item["arguments"])["location"] for item in response["output"]] == ["A", "B"][:count]
        assert len({item["call_id"] for item in response["output"]}) == count
        lines = app.post(RESPONSES, input="x", tools=[WEATHER], stream=True, **more).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
        assert [(event["output_index"], json.loads(event["arguments"])["location"]) for event in done] == [
            (0, "A"), (1, "B")][:count]  # fmt: skip


def test_the_parts_of_a_message_come_in_openais_order(tokenizer):
    app = App(tokenizer, "So.")
    app.engine.end = "stop"
    lines = app.post(RESPONSES, input="x", stream=True).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    kinds = [event["type"].removeprefix("response.") for event in events if "delta" not in event["type"]]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
                     "content_part.done", "output_item.done", "completed"]  # fmt: skip
    item = next(event["item"] for event in events if event["type"] == "response.output_item.added")
    assert (item["content"], item["status"]) == ([], "in_progress")
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert [event["text"] for event in events if event["type"] == "response.output_text.done"] == ["So."]


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({}, "input", "input: required"),
    ({"input": [{"type": "web_search_call"}]}, "input", "input[0].type: not supported by wave64, got web_search_call"),
    ({"input": []}, "input", "at least 1"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input[0].content"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "tools[0].type"),
    ({"input": "x", "temperature": -1}, "temperature", "got -1"),
    ({"input": "x", "previous_response_id": "r"}, "previous_response_id", "not supported"),
    ({"input": "x", "include": ["message.output_text.logprobs"]}, "include", "not supported"),
    ({"input": "x", "top_logprobs": 2}, "top_logprobs", "not supported"),
    ({"input": "x", "max_output_tokens": 9999}, "max_output_tokens", "max_output_tokens"),
    ({"input": "x", "text": {"format": "json"}}, "text", "text.format: expected"),
    ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "foo"}}}}, "text",
     "cannot be compiled"),
])  # fmt: skip
def test_what_is_refused_is_named_as_the_client_knows_it(tokenizer, fields, param, words):
    answer = App(tokenizer).post(RESPONSES, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]
