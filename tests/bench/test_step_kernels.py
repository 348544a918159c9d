"""The profile of a step says what it promises; no speed is asserted."""

import pytest
import step_kernels
import torch


@pytest.mark.parametrize(("what", "lines"), [
    ("decode", ["decode, batch 3, context 20: launches", " x "]),
    ("prefill", ["prefill of 20 tokens: launches", " x "]),
    ("products", ["| 3 | gate_up | 256 x 64 |"]),
])  # fmt: skip
def test_it_runs(capsys, what, lines):
    torch.set_num_threads(1)
    assert step_kernels.main([what, "--tiny"]) == 0
    said = capsys.readouterr().out
    for line in lines:
        assert line in said


def test_a_layer_is_what_lies_between_two_marks(capsys):
    """With the time to the start of the next kernel, idle time included; kernels that overlap are busy once."""
    names = ["paged", "norm", "product"] * 3
    found = [step_kernels.Span(name, 5000 * i, 2000) for i, name in enumerate(names)]
    step_kernels.one_layer(found, "paged")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["2.00", "us,", "next", "after", "5.00", name] for name in names[:3]]  # fmt: skip
    step_kernels.report([found[0], step_kernels.Span("copy", 1000, 2000), *found[1:]], 1)
    assert "launches 10.0, busy 19.0 us, first to last 42.0 us" in capsys.readouterr().out
