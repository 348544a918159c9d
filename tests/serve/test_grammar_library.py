"""A grammar library that fails costs structured output alone, and says so."""

import asyncio
from types import SimpleNamespace
from typing import Any

import llguidance
import pytest

from wave64.serve.grammar import compiler
from wave64.serve.http.grammar import Grammars
from wave64.serve.http.schemas import ApiError
from wave64.serve.messages import Vocabulary


class Panic(BaseException):
    """What pyo3 raises where Rust panics."""


@pytest.mark.parametrize("error", [TypeError("argument 'eos_token': 'list' object cannot be interpreted as an integer"),
                                   Panic("index out of bounds")], ids=lambda error: type(error).__name__)
def test_a_library_that_does_not_take_the_tokenizer_is_a_reason_in_words(error, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(llguidance, "LLTokenizer", refuse)
    with pytest.raises(ValueError, match="1.7 or later is needed: " + type(error).__name__):
        compiler(Vocabulary("{}", [1]), 300)
    grammars = Grammars(SimpleNamespace(end_ids={1}, definition="{}"), lambda message: None)  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="structured output: llguidance") as raised:
        asyncio.run(grammars.learn(300))
    assert raised.value.status == 501
