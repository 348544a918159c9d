"""The benchmark prints a speed for what was checked, and for nothing else. No speed is asserted here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bench
import peers
import pytest
import torch
import tp8
import triton

from wave64 import OPS
from wave64.op import Backend
from wave64.testing import contract, timing

TINY = ["attention", "--device", "cpu", "--op", "paged_attention", "--case", "one-token"]
NUMBERS = [name for name in bench.Table.COLUMNS if name not in ("op", "case", "kernel", "checked")]


@pytest.fixture(autouse=True)
def _known_peaks(monkeypatch):
    monkeypatch.setattr(timing, "measure_peaks", lambda device: timing.Peaks(10.0, 1.0))


def run(capsys, *options: str) -> tuple[int, list[dict[str, str]]]:
    """Exit status, and the rows of the Markdown table by column."""
    status = bench.main([*TINY, "--backend", "reference", "--markdown", *options])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return status, [dict(zip(lines[0], cells, strict=False)) for cells in lines[1:]]


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
                    reason="Triton's interpreter cannot run this kernel before 3.9")
def test_the_command_prints_a_table(tmp_path):
    """The real command, Triton's interpreter and all, on a machine whose GPU is hidden."""
    hidden = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, bench.__file__, *TINY, "--backend", "triton", "--json", tmp_path / "rows"]
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, head, ours = done.stdout.splitlines()[:3]
    assert re.match(r"CPU, torch \S+, Triton \S+, reads \d+ GB/s", machine)
    columns = re.split(r"  +", head.strip())
    assert columns == list(bench.Table.COLUMNS)
    row = dict(zip(columns, re.split(r"  +", ours.strip()), strict=True))
    assert (row["op"], row["case"], row["kernel"]) == ("paged_attention", "one-token", "wave64 triton")
    assert all(float(row[name]) >= 0 for name in NUMBERS)
    header, first = (json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()[:2])
    assert header["device"] == "CPU"
    assert first["speed"]["us"] > 0
    assert first["error"] <= first["allowed"]


def test_a_right_result_has_a_speed(capsys):
    status, rows = run(capsys)
    assert status == 0
    assert rows[0]["kernel"] == "wave64 reference"
    assert all(float(rows[0][name]) >= 0 for name in NUMBERS)


def wrong(**args):
    return torch.zeros_like(args["query"])


def wrong_later():
    """Right when it is checked, wrong when it is timed."""
    calls = []

    def changing(**args):
        calls.append(1)
        return OPS["paged_attention"].reference(**args) * (1 if len(calls) == 1 else 2)

    return changing


@pytest.mark.parametrize(("kernel", "why"), [(wrong, "error 1 against"), (wrong_later(), "not the one that was")])
def test_a_wrong_result_has_none(capsys, monkeypatch, kernel, why):
    monkeypatch.setitem(OPS["paged_attention"].backends, "reference", Backend("reference", kernel))
    status, rows = run(capsys)
    assert status == 1
    assert rows[0]["error"].startswith("WRONG: ")
    assert why in rows[0]["error"]
    assert not any(rows[0].get(name) for name in NUMBERS[1:])


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["attention"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs a GPU" in said.err


@pytest.mark.parametrize("case", ["mha", "sinks", "whole"])
def test_some_heads_stand_for_all(case):
    op = OPS["prefill_attention"]
    args = contract.draw(next(c for c in op.cases() if c.id == case), "cpu", 0)
    cost = op.cost(**args)
    whole, part = bench.Judge(op, args, cost), bench.Judge(op, args, cost, limit=0)
    heads = args["key_cache"].shape[2]
    assert (whole.checked, part.checked) == ("fp64", f"fp64, 2 of {heads} heads")
    for a, b in zip(part.exact, part.pick(whole.exact), strict=True):
        torch.testing.assert_close(a, b)
    out, lse = op.reference(**args)
    part((out, lse), args)
    with pytest.raises(contract.ContractError):
        part((out * 1.1, lse), args)


def test_a_file_of_a_peer_runs_alone(tmp_path: Path, monkeypatch):
    """With what stands in for its package; what is not foreseen is an error that names it."""
    files = {"a.py": "from peer_of_test.settings import answer\n",
             "deep/b.py": "from peer_of_test.a import answer\nvalue = answer() + 1\n",
             "deep/c.py": "from peer_of_test.deep.b import value\nfrom peer_of_test.engine import start\n"}
    for name, text in files.items():
        (tmp_path / "peer_of_test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "peer_of_test" / name).write_text(text)
    monkeypatch.setattr(peers, "answers", lambda: {"peer_of_test.settings": {"answer": lambda: 41}})
    a, b, c = (f"peer_of_test/{name}" for name in files)
    assert peers.load(tmp_path, [a, b]).value == 42
    for _ in range(2):
        with pytest.raises(ImportError, match=r"peer_of_test\.engine"):
            peers.load(tmp_path, [a, b, c])


@pytest.mark.parametrize("what", ["layers", "lite"])
def test_decode_steps_of_deepseek_have_a_table(what):
    """The real command at tiny sizes, on a machine whose GPU is hidden."""
    command = [sys.executable, Path(bench.__file__).with_name("decode_deepseek.py"), what, "--tiny", "--batch", "2",
               "--context", "64", "--tokens", "2"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "2"
    assert all(float(cell) > 0 for cell in row)


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ranks_are_timed_held_to_one_and_killed(several, tmp_path):
    """What runs on several GPUs, on a CPU with small sizes; in short one rank, which is timed alone."""
    out = tmp_path / "ranks.json"
    command = [sys.executable, Path(bench.__file__).with_name("ranks_serving.py"), "--tiny", "--tp", "1",
               *["2"] * several, "--batch", "1", "--out", out]
    hidden = {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=240)
    report = json.loads(out.read_text())
    assert done.returncode == 0, report
    assert [(row["tp"], row["ms"] > 0) for row in report["steps"]] == [(1, True), (2, True)][:1 + several]
    assert [row["same"] for row in report["tokens"]] == [True] * several
    assert [(row["rank"], row["fine"]) for row in report["kills"]] == [(1, True)] * several


def test_steps_on_paper_read_all_weights_in_the_end():
    """Of a batch that chooses every expert: the published numbers of parameters, 70.6 and 671 billion, a byte each,
    but two for the head; embeddings are looked up."""
    llama, deepseek = tp8.llama_70b(), tp8.deepseek_v3()
    assert llama.weights(1) * tp8.TP == pytest.approx(70.55e9, rel=0.002)
    replicated = 7 * 61 * 7168 * (1536 + 576)  # the projections to latents, in the seven other ranks
    assert deepseek.weights(10**6) * tp8.TP - replicated == pytest.approx(671.0e9, rel=0.002)
    assert deepseek.weights(1) - deepseek.dense_bytes == pytest.approx(8 * deepseek.expert_bytes)
    assert [tp8.interpolate({8: 2.0, 16: 4.0, 32: 12.0}, size) for size in (1, 8, 12, 24, 40)] == [2, 2, 3, 8, 16]
    rccl, custom = (tp8.step_ms(deepseek, 8, 1500, times) for times in (tp8.RCCL, tp8.CUSTOM))
    assert rccl["memory"] == custom["memory"]
    assert rccl["all-reduces"] > custom["all-reduces"]
