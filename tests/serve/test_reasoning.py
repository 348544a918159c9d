"""Reasoning models: thoughts apart from the answer, and grammars that begin behind them."""

import json

import pytest
import tokenizers
from helpers_http import App

from wave64.serve.grammar import compiler
from wave64.serve.http.reasoning import PARSERS, Thoughts, begins_in_thought, grammar_behind
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Vocabulary

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]

# parser, whether the answer begins in a thought, what the model wrote, thought, answer
SAID = [
    ("deepseek-r1", True, "<think>\nIs it? < Yes </thin.\n</think>\n\nIt is.\n", "Is it? < Yes </thin.", "It is.\n"),
    ("deepseek-r1", True, "Is it?\n</think>\n\nIt is.", "Is it?", "It is."),
    ("deepseek-r1", True, "Is it? \n", "Is it? \n", ""),
    ("deepseek-r1", True, "</think>It is.", "", "It is."),
    ("qwen3", False, "It is </think> so.", "", "It is </think> so."),
    ("qwen3", False, " <think>a</think> b <think>c</think>", "a", "b <think>c</think>"),
    ("qwen3", False, "<thi", "", "<thi"),
    ("kimi", False, "◁think▷a◁/think▷b", "a", "b"),
]


@pytest.mark.parametrize(("parser", "begins", "text", "thought", "answer"), SAID)
def test_thought_and_answer_however_they_are_split(parser, begins, text, thought, answer):
    for parts in [[text]] + [[text[:at], text[at:]] for at in range(len(text))] + [list(text)]:
        split = Thoughts(PARSERS[parser], begins)
        given = [split.feed(part, i == len(parts) - 1) for i, part in enumerate(parts)]
        assert ("".join(a for a, _ in given), "".join(b for _, b in given)) == (thought, answer), parts


@pytest.mark.parametrize(("parser", "prompt", "begins"), [
    ("deepseek-r1", "<|user|>x<|assistant|>", True), ("deepseek-r1", "x<think>\n\n</think>\n\n", False),
    ("qwen3", "x<|assistant|>", False), ("qwen3", "x<think>\n", True), ("qwen3-thinking", "x", True),
])  # fmt: skip
def test_templates_may_write_the_marks(parser, prompt, begins):
    assert begins_in_thought(PARSERS[parser], prompt) == begins


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def test_an_answer_behind_a_thought(tokenizer):
    app = App(tokenizer, "Hm.\n</think>\n\nok", reasoning_parser="deepseek-r1")
    message = app.post(CHAT, messages=USER).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "ok", "reasoning_content": "Hm."}
    message = app.post(CHAT, messages=USER, separate_reasoning=False).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hm.\n</think>\n\nok"}
    lines = app.post(CHAT, messages=USER, stream=True).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "ok"
    app.post(CHAT, messages=USER, regex="[0-9]")
    assert "think" in app.engine.requests[-1].grammar


FORMS = ["start: /[0-9]+/", json.dumps({"grammars": [{"json_schema": {"enum": [123]}}]})]


@pytest.mark.parametrize("added", [[], ["<think>", "</think>"]], ids=["spelled", "tokens"])
@pytest.mark.parametrize("form", FORMS)
def test_a_grammar_begins_behind_the_thought(tokenizer, form, added):
    def fits(begins: bool, text: str) -> bool:
        matcher = compiled(grammar_behind(PARSERS["deepseek-r1"], begins, form, tokens))
        ids = known.encode(text, add_special_tokens=False).ids
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    known = tokenizers.Tokenizer.from_str(tokenizer.definition)
    known.add_tokens([tokenizers.AddedToken(mark) for mark in added])  # not special, as R1's and Qwen3's
    tokens = {mark: known.token_to_id(mark) for mark in added}
    compiled = compiler(Vocabulary(known.to_str(), [1]), known.get_vocab_size())
    assert fits(True, "Hm, 7.\n</think>\n\n123")
    assert fits(True, "<think>Hm</think>123")
    assert fits(False, "<think>Hm</think>\n123")
    assert fits(False, "123")
    assert not fits(True, "123")
    assert not fits(True, "Hm</think>yes")
    assert not fits(False, "Hm</think>123")
    for begins, thought in ((False, ""), (True, "Hm</think>")):
        assert fits(begins, thought + " " * 32 + "123")
        assert not fits(begins, thought + " " * 33 + "123"), "a model must not go on with spaces for ever"
