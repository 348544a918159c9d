"""What of RESULTS_ENGINE.md's table on forced tokens needs no other tokenizer."""

import forced_tokens
import pytest


def test_of_demo_tools_answers(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["forced_tokens.py"])
    forced_tokens.main()
    lines = [line[42:].replace(",", "").split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(line[0], line[1], *line[-2:]) for line in lines] == [
        ("21", "5", "5", "2"), ("9", "3", "3", "1"), ("31", "22", "22", "18")]  # fmt: skip


def test_an_answer_of_another_form_is_not_counted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["forced_tokens.py"])
    monkeypatch.setattr(forced_tokens, "ANSWERS", [(forced_tokens.ANSWERS[1][0], '{"sum": "84"}')])
    with pytest.raises(AssertionError):
        forced_tokens.main()
