"""demo-tools, the package's checkpoint that calls tools, writes JSON and thinks: exact answers to OpenAI's client."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from helpers_server import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from wave64.serve.model_path import BUILT_IN

FOLDER = BUILT_IN["demo-tools"]
MIN_GAP = 1.0  # in logits, from the right token to the best other one
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}
CAPITAL = {"type": "object", "properties": {"country": {"type": "string"}, "capital": {"type": "string"}},
           "required": ["country", "capital"], "additionalProperties": False}  # fmt: skip
SUM = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False}
OSLO, TWO = "What is the weather in Oslo?", "What is the weather in Oslo and Paris?"
PLUS, THOUGHT = "What is 26 plus 58?", "6 + 8 = 14. 2 + 5 + 1 = 8."
NO_WEATHER = "I have no tool that knows the weather."
ASKED: Any = {"model": "demo-tools", "temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module")
def lessons():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import demo_answers

    yield demo_answers
    monkeypatch.undo()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_is_small_and_what_made_it_still_makes_its_tokenizer(lessons):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3_000_000
    assert "license: apache-2.0" in (FOLDER / "README.md").read_text(encoding="utf-8")
    made = json.loads(lessons.make_tokenizer().to_str())
    assert made == json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"] == lessons.CHAT_TEMPLATE


def test_its_prompts_are_those_it_learned(lessons, tokenizer):
    calls = [lessons.called("get_weather", city="Oslo"), lessons.called("get_weather", city="Paris")]
    messages = [{"role": "system", "content": "s"}, lessons.user(TWO), *lessons.told(calls, ["sun", "rain"])]
    ours = lessons.render(messages, ["get_weather", "add"])
    how: Any = dict(tools=[WEATHER, ADD], tokenize=False, add_generation_prompt=True)
    assert ours == tokenizer.apply_chat_template(messages, **how)
    assert ours == (
        f"<|begin_of_text|><|tools|>get_weather(city), add(a, b)<|system|>s<|user|>{TWO}<|assistant|><|python_tag|>"
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "get_weather", "parameters": {"city": '
        '"Paris"}}<|end_of_text|><|tool|>sun<|tool|>rain<|assistant|>')  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_every_token_is_the_right_one_by_far(lessons, tokenizer, dtype):
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    for prompt, answer in lessons.asked():
        head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer + lessons.EOS))
        with torch.inference_mode():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].float()
        right = torch.tensor(tail)[:, None]
        gap = logits.gather(1, right)[:, 0] - logits.scatter(1, right, -math.inf).amax(1)
        assert gap.min() > MIN_GAP, f"after {tokenizer.decode(head + tail[: int(gap.argmin())])!r}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serve("demo-tools", log, "--reasoning-parser", "qwen3", "--max-total-tokens", "8192") as running:
        yield running
        assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client_without_thoughts(tmp_path_factory):
    """Of a server whose forced calls begin an answer: with a reasoning parser they may come behind a thought."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with (serve("demo-tools", log, "--max-total-tokens", "8192") as running,
          openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made):  # fmt: skip
        yield made


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def calls_of(message: Any) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def put_together(chunks: list[Any]) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """(content, reasoning, calls as names and arguments, finish_reason) of a stream's chunks."""
    content = reasoning = ""
    calls: list[tuple[str, str]] = []
    end = None
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for part in choice.delta.tool_calls or []:
            if part.function.name:
                calls.append((part.function.name, ""))
            calls[part.index] = (calls[part.index][0], calls[part.index][1] + (part.function.arguments or ""))
        end = choice.finish_reason or end
    return content, reasoning, calls, end


def test_an_agents_loop(client):
    """A question, the calls, their results, the answer, and another question."""
    messages = user(TWO)
    said = client.chat.completions.create(messages=messages, tools=[WEATHER, ADD], **ASKED).choices[0]
    assert said.finish_reason == "tool_calls"
    assert said.message.content is None
    assert calls_of(said.message) == [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Paris"})]
    results = ["7 degrees, rain", "21 degrees, sun"]
    messages += [said.message, *({"role": "tool", "tool_call_id": call.id, "content": result}
                                 for call, result in zip(said.message.tool_calls, results, strict=True))]  # fmt: skip
    said = client.chat.completions.create(messages=messages, tools=[WEATHER, ADD], **ASKED).choices[0]
    assert (said.message.content, said.finish_reason) == ("Oslo: 7 degrees, rain\nParis: 21 degrees, sun", "stop")
    assert calls_of(said.message) == []


@pytest.mark.parametrize(("choice", "tools", "question", "called"), [
    ("auto", [WEATHER, ADD], OSLO, [("get_weather", {"city": "Oslo"})]),
    ("auto", [ADD], PLUS, [("add", {"a": 26, "b": 58})]),
    ("required", [WEATHER, ADD], TWO, [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Paris"})]),
    ({"type": "function", "function": {"name": "add"}}, [WEATHER, ADD], PLUS, [("add", {"a": 26, "b": 58})]),
    ("none", [WEATHER], OSLO, []), ("auto", [ADD], OSLO, [])])  # fmt: skip
def test_tools_whole_and_streamed(client_without_thoughts, choice, tools, question, called):
    asked: Any = dict(messages=user(question), tools=tools, tool_choice=choice, **ASKED)
    client = client_without_thoughts
    said = client.chat.completions.create(**asked).choices[0]
    assert calls_of(said.message) == called
    assert said.message.content == (None if called else NO_WEATHER)
    content, _, calls, end = put_together(list(client.chat.completions.create(stream=True, **asked)))
    assert (content, [(name, json.loads(text)) for name, text in calls]) == ("" if called else NO_WEATHER, called)
    assert end == said.finish_reason == ("tool_calls" if called and choice == "auto" else end)


def test_one_call_alone_where_no_more_may_be_made(client_without_thoughts):
    for choice in ("auto", "required"):
        said = client_without_thoughts.chat.completions.create(
            messages=user(TWO), tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, **ASKED).choices[0]
        assert calls_of(said.message) == [("get_weather", {"city": "Oslo"})]


def test_thoughts_are_apart(client):
    said = client.chat.completions.create(messages=user(PLUS), **ASKED).choices[0].message
    assert (said.reasoning_content, said.content) == (THOUGHT, "26 plus 58 is 84.")
    chunks = list(client.chat.completions.create(messages=user(PLUS), stream=True, **ASKED))
    assert put_together(chunks) == ("26 plus 58 is 84.", THOUGHT, [], "stop")
    said = client.chat.completions.create(messages=user(PLUS), extra_body={"separate_reasoning": False}, **ASKED)
    assert said.choices[0].message.content == f"<think>{THOUGHT}</think>26 plus 58 is 84."


@pytest.mark.parametrize(("question", "schema", "value", "thought"), [
    ("What is the capital of Norway? Answer in JSON.", CAPITAL, {"country": "Norway", "capital": "Oslo"}, None),
    ("What is 26 plus 58? Answer in JSON.", SUM, {"sum": 84}, THOUGHT)])  # fmt: skip
def test_json_by_schema_behind_thoughts(client, question, schema, value, thought):
    forms: list[Any] = [{"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
                        {"type": "json_object"}]  # fmt: skip
    for form in forms:
        said = client.chat.completions.create(messages=user(question), response_format=form, **ASKED).choices[0]
        assert (json.loads(said.message.content), said.finish_reason) == (value, "stop")
        assert said.message.reasoning_content == thought


def test_many_at_once_asynchronously(server):
    questions = {OSLO: [("get_weather", {"city": "Oslo"})], PLUS: [("add", {"a": 26, "b": 58})],
                 "What is the capital of Peru?": []}  # fmt: skip

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            return await asyncio.gather(*(made.chat.completions.create(messages=user(question), tools=[WEATHER, ADD],
                                                                       **ASKED) for question in 4 * [*questions]))

    answers = [answer.choices[0].message for answer in asyncio.run(ask())]
    assert [calls_of(answer) for answer in answers] == 4 * [*questions.values()]
    assert {answer.content for answer in answers} == {None, "Lima is the capital of Peru."}


def test_responses(client):
    asked: Any = {"model": "demo-tools", "temperature": 0, "max_output_tokens": 200}
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    first = client.responses.create(input=OSLO, tools=[tool], **asked)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo"})
    items = [{"role": "user", "content": OSLO}, call.model_dump(exclude_none=True),
             {"type": "function_call_output", "call_id": call.call_id, "output": "7 degrees, rain"}]  # fmt: skip
    assert client.responses.create(input=items, tools=[tool], **asked).output_text == "Oslo: 7 degrees, rain"
    form = {"format": {"type": "json_schema", "name": "answer", "schema": SUM, "strict": True}}
    with client.responses.stream(input="What is 26 plus 58? Answer in JSON.", text=form, **asked) as stream:
        assert json.loads(stream.get_final_response().output_text) == {"sum": 84}
