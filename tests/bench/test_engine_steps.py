"""The benchmark of the engine's steps says what it promises; no speed is asserted."""

import json

import engine_steps
import pytest
import torch


@pytest.mark.parametrize(("what", "rows", "columns"), [
    ("decode", 4, {"batch", "loop", "same_tokens", "step_ms", "worst_ms", "busy_ms", "idle_ms"}),
    ("host", 2, {"batch", "schedule_ms", "batch_ms", "commit_ms", "sampling_ms"}),
    ("prefill", 1, {"prompt_tokens", "best_ms", "mean_ms"}),
    ("load", 2, {"requests", "max_prefill_ms", "output_tokens", "tokens_per_s", "gap_p99_ms", "gap_ms"}),
    ("mixed", 6, {"batch", "prompt", "launched", "step_ms"}),
    ("grammar", 2, {"batch", "grammar", "step_ms", "worst_ms", "mask_ms"}),
    ("chats", 2, {"prefix_cache", "prompt_tokens", "cached", "tokens_per_s"}),
])  # fmt: skip
def test_it_runs(tmp_path, what, rows, columns):
    torch.set_num_threads(1)
    out = tmp_path / "rows.json"
    assert engine_steps.main([what, "--tiny", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [set(row) for row in found] == [columns | {"what"}] * rows
    assert {row["what"] for row in found} == {what}
    if what == "chats":
        assert [row["cached"] > 0 for row in found] == [False, True]


def test_loops_that_differ_have_no_row(monkeypatch, capsys):
    """Nor does the command succeed."""
    step = engine_steps.step

    def other(engine, tokens):
        step(engine, tokens)
        if engine.overlaps:
            for ids in tokens.values():
                ids[:] = [token + 1 for token in ids]

    monkeypatch.setattr(engine_steps, "step", other)
    assert engine_steps.main(["decode", "--tiny"]) == 1
    assert "step_ms" not in capsys.readouterr().out


@pytest.mark.long
def test_fp8_says_how_many_times_as_fast(tmp_path):
    out = tmp_path / "rows.json"
    assert engine_steps.main(["fp8", "--tiny", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["weights"] for row in rows] == ["bf16"] * 3 + ["fp8"] * 3
    assert ["times_as_fast" in row for row in rows] == [False] * 3 + [True] * 3
