"""The harness of several GPUs, on emulated ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks.py"


@pytest.mark.slow
def test_a_dry_run_checks_every_collective_and_says_what_fails(tmp_path):
    done = subprocess.run([sys.executable, RANKS, "--dry", "--out", tmp_path / "found.json"], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert {name: count for name, count in parts["correct"].items() if name != "seconds of the processes"} == {
        **dict.fromkeys(["all_reduce", *(f"all_reduce {protocol}" for protocol in
                                         ("LL", "LL128", "one-shot", "two-shot"))], 18),
        **dict.fromkeys(["all_gather", "reduce_scatter", "fused_all_reduce_rms_norm", "all_reduce, quantized"], 6)}
    assert (parts["many"]["all-reduces"], parts["many"]["wrong elements"]) == (12, 0)
    assert parts["speed"]["8192"]["wave instructions, waits included"] > 0
    assert re.match("rank 0 waited 1 s for rank 1 of group world in all_reduce, round", parts["wait"]["said"])
    assert all(part in done.stdout for part in parts)
