"""Reasoning models: what they think before they answer, apart from the answer."""

import json
from collections.abc import Mapping
from typing import NamedTuple

import regex

from wave64.serve.http.schemas import SPACES


class Marks(NamedTuple):
    """What a model thinks stands between two marks; `begins` says that it need not write the first."""

    begin: str
    end: str
    begins: bool


PARSERS = {
    "deepseek-r1": Marks("<think>", "</think>", True),
    "deepseek-v3": Marks("<think>", "</think>", False),
    "qwen3": Marks("<think>", "</think>", False),
    "qwen3-thinking": Marks("<think>", "</think>", True),
    "kimi": Marks("◁think▷", "◁/think▷", False),
}


def begins_in_thought(marks: Marks, prompt: str) -> bool:
    """Whether an answer to this prompt begins in the middle of a thought: templates may write the marks themselves."""
    text = prompt.rstrip()
    return text.endswith(marks.begin) or (marks.begins and not text.endswith(marks.end))


def grammar_behind(marks: Marks, in_thought: bool, grammar: str, tokens: Mapping[str, int]) -> str:
    """The grammar of an answer that thinks first, and then keeps to `grammar`. tokens: the tokenizer's added ones; to
    llguidance a mark that is one of them is no text."""
    inner = json.loads(grammar)["grammars"] if grammar.startswith('{"grammars"') else [{"lark_grammar": grammar}]
    often = "" if in_thought else "?"
    if marks.begin in tokens and marks.end in tokens:
        begin = f"<[{tokens[marks.begin]}]>{'?' if in_thought else ''}"
        thought = f"thought: {begin} TEXT? <[{tokens[marks.end]}]>\nTEXT: /(.|\\n)+/"
    else:
        begin = f"({regex.escape(marks.begin)})?" if in_thought else regex.escape(marks.begin)
        mark = f"/{begin}(.|\\n)*{regex.escape(marks.end)}/".replace("</", "<\\/")
        thought = f"thought[lazy]: {mark}"
    thought = f"start: thought{often} SPACES? @answer\n{thought}\nSPACES: /{SPACES}/"
    return json.dumps({"grammars": [{"lark_grammar": thought}, {**inner[0], "name": "answer"}, *inner[1:]]})


class Thoughts:
    """feed(text) gives what of it is thought, and what is answer. Spaces around either are dropped."""

    def __init__(self, marks: Marks, in_thought: bool) -> None:
        self._marks = marks
        self._in_thought = in_thought
        self._text = ""  # not yet given
        self._is_start = self._drops_spaces = True

    def feed(self, text: str, is_end: bool = False) -> tuple[str, str]:
        """Text, and whether it is the last: (thought, answer)."""
        self._text += text
        if self._is_start:
            match = regex.match(r"\s*" + regex.escape(self._marks.begin), self._text, partial=not is_end)
            if match and match.partial:
                return "", ""
            self._is_start = False
            self._in_thought = self._in_thought or match is not None
            self._take(match.end() if match else 0)
        thought = self._thought(is_end) if self._in_thought else ""
        return thought, "" if self._in_thought else self._given(len(self._text))

    def _thought(self, is_end: bool) -> str:
        match = regex.search(regex.escape(self._marks.end), self._text, partial=not is_end)
        end = match.start() if match else len(self._text)
        is_over = match is not None and not match.partial
        thought = self._given(len(self._text[:end].rstrip()) if is_over or not is_end else end)
        if is_over:
            self._take(self._text.index(self._marks.end) + len(self._marks.end))
            self._in_thought, self._drops_spaces = False, True
        return thought

    def _take(self, end: int) -> str:
        taken, self._text = self._text[:end], self._text[end:]
        return taken

    def _given(self, end: int) -> str:
        text = self._take(end)
        if self._drops_spaces:
            text = text.lstrip()
            self._drops_spaces = not text
        return text
