"""A trace of a launch: every wave's instructions are in it, its slices follow each other, and what is asked of memory
is waited for."""

import gzip
import json
import sys
from collections import Counter, defaultdict

import pytest
import torch
import trace_viewer

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.testing.emulator import trace as tracing
from wave64.testing.emulator.run import emulate

pytestmark = pytest.mark.skipif(hip._hip is None, reason="the extension is not built")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Of rms_norm over two rows that several waves share, what both its workgroups did; and all that was executed."""
    made, path = tracing.Trace(workgroups=2), tmp_path_factory.mktemp("trace") / "x.json.gz"
    x, weight = torch.randn(2, 8192, dtype=torch.bfloat16), torch.randn(8192, dtype=torch.bfloat16)
    with platform.target("gfx942"), emulate("gfx942", (tracing.tracing(made),)) as ran:
        OPS["rms_norm"].backends["hip"].run(x, weight)
    count = made.write(path, op="rms_norm")
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert len(content["traceEvents"]) == count
    assert content["otherData"] == {"unit": "1 us is 1 cycle", "op": "rms_norm"}
    return content["traceEvents"], ran, x, weight


def slices(events):
    """By wave: its slices within that of the kernel, and that one."""
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return {wave: ([e for e in each if not e["name"].startswith("rms_norm")],
                   next(e for e in each if e["name"].startswith("rms_norm"))) for wave, each in found.items()}


def test_workgroups_and_waves_are_named(traced):
    events, ran, *_ = traced
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert sum("workgroup 0" in name for name in names) == sum("workgroup 1" in name for name in names) == 1
    assert sum(name.startswith("wave ") for name in names) == ran.waves == len(slices(events))


def test_a_viewer_loses_nothing_of_it(traced):
    events, ran, *_ = traced
    assert trace_viewer.lost(events) == []
    assert len({event["tid"] for event in events if event["ph"] == "X"}) == ran.waves


def test_slices_follow_each_other_and_have_every_instruction(traced):
    events, ran, *_ = traced
    units = Counter()
    for inner, whole in slices(events).values():
        inner.sort(key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] == b["ts"] for a, b in zip(inner, inner[1:], strict=False))
        assert (inner[0]["ts"], inner[-1]["ts"] + inner[-1]["dur"]) == (whole["ts"], whole["ts"] + whole["dur"])
        for each in inner:
            units[each["name"]] += each.get("args", {}).get("instructions", 0)
    by_name = Counter({name: count for name, count in ran.by_name.items()})
    vector = sum(count for name, count in by_name.items() if name.startswith("v_"))
    assert units["vector"] + units["transcendental"] + units["matrix"] == vector
    assert units["LDS"] == sum(count for name, count in by_name.items() if name.startswith("ds_")) > 0


def test_the_waves_of_a_workgroup_leave_a_barrier_together(traced):
    events, ran, *_ = traced
    waves = slices(events)
    assert ran.by_name["s_barrier"] == ran.waves == len(waves)
    left = defaultdict(list)  # when a wave's first slice behind the barrier begins: with the reading of LDS
    for (pid, _), (inner, _) in waves.items():
        reads = [e["ts"] for e in inner if e["name"] == "LDS" and "ds_read" in e["args"]["first"]]
        left[pid].append(min(reads))
        first = min(e["ts"] + e["dur"] for e in inner if e["name"] == "LDS" and "ds_write" in e["args"]["first"])
        assert first <= min(reads)
    assert [len(set(times)) for times in left.values()] == [1, 1]


def test_a_wave_that_comes_early_waits_for_the_last():
    made = tracing.Trace()
    early, last = (tracing.Wave(made, 1) for _ in range(2))
    early.add("vector", 4, "v_add")
    last.add("vector", 12, "v_add")
    for wave in (early, last):
        wave.meet(12)
        wave.add("scalar", 4, "s_add")
        wave.finish("kernel")
    told = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in made.events]
    assert told == [(1, "kernel", 0, 16), (2, "kernel", 0, 16), (1, "vector", 0, 4), (1, "barrier", 4, 8),
                    (1, "scalar", 12, 4), (2, "vector", 0, 12), (2, "scalar", 12, 4)]


def test_what_goes_to_memory_is_waited_for_and_has_its_bytes(traced):
    events, _, x, weight = traced
    begun = {event["id2"]["local"]: event for event in events if event["ph"] == "b"}
    ended = {event["id2"]["local"]: event for event in events if event["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert all(ended[i]["ts"] >= begun[i]["ts"] for i in begun)
    loaded = sum(e["args"]["bytes"] for e in begun.values() if e["name"].startswith(("global_load", "buffer_load")))
    stored = sum(e["args"]["bytes"] for e in begun.values() if e["name"].startswith(("global_store", "buffer_store")))
    assert stored == x.nbytes
    assert loaded == x.nbytes + len(x) * weight.nbytes


def test_the_command_writes_a_trace_and_refuses_in_words(tmp_path, monkeypatch, capsys):
    path = tmp_path / "plain.json"
    monkeypatch.setattr(sys, "argv", ["trace", "rms_norm", "--output", str(path)])
    assert tracing.main() == 0
    assert f"{path}: {len(json.loads(path.read_text())['traceEvents'])} events of " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["trace", "rms_norm", "no-such-case"])
    with pytest.raises(SystemExit):
        tracing.main()
    assert "rms_norm has no small case with 'no-such-case' in its name" in capsys.readouterr().err
