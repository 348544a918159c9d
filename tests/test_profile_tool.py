"""`wave64.profile`: torch's profiler and RPD's, with ranges for operators and modules."""

import gzip
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import wave64
from wave64.serve.engine.profiling import Profiler
from wave64.serve.messages import StartProfile
from wave64.tools import profile as tool


class Control:
    """rpdTracerControl's published interface, which notes what is called."""

    calls: list[tuple] = []

    @classmethod
    def setFilename(cls, name, append=False):
        cls.calls.append(("setFilename", name, append))

    def start(self):
        self.calls.append(("start",))

    def stop(self):
        self.calls.append(("stop",))

    def flush(self):
        self.calls.append(("flush",))

    def rangePush(self, domain, apiName, args):
        self.calls.append(("push", domain, apiName))

    def rangePop(self):
        self.calls.append(("pop",))


@pytest.fixture
def rpd(monkeypatch):
    Control.calls = []
    monkeypatch.setitem(sys.modules, "rpdTracerControl", SimpleNamespace(rpdTracerControl=Control))
    return Control


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x):
        return wave64.ops.rms_norm(self.norm(x), x.new_ones(x.shape[-1]))


def test_torch_names_operators_and_modules(tmp_path):
    with wave64.profile(tmp_path / "new" / "out", model=Net().eval()) as path:
        assert not path.exists()
        net = Net()
        with tool.naming(net, torch.profiler.record_function):
            net(torch.randn(2, 64))
    assert path == tmp_path / "new" / "out.trace.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("wave64::rms_norm") == names.count("norm") == names.count("Net") == 1


def test_rpd_has_ranges_of_operators_within_those_of_modules(tmp_path, rpd):
    net, x = Net(), torch.randn(2, 64)
    before = wave64.OPS["rms_norm"].bound
    with wave64.profile(tmp_path / "out", kind="rpd", model=net) as path:
        net(x)
    net(x)  # outside there are none
    assert path == tmp_path / "out.rpd"
    assert rpd.calls == [("setFilename", str(path), False), ("start",), ("push", "wave64", "Net"),
                         ("push", "wave64", "norm"), ("pop",), ("push", "wave64", "rms_norm"), ("pop",), ("pop",),
                         ("stop",), ("flush",)]
    assert wave64.OPS["rms_norm"].bound == before


def test_an_error_in_the_block_ends_ranges_and_recording(tmp_path, rpd):
    with pytest.raises(wave64.BadArgument), wave64.profile(tmp_path / "out", kind="rpd", model=(net := Net())):
        net(torch.randn(2, 64).int())
    assert [call[0] for call in rpd.calls].count("push") == [call[0] for call in rpd.calls].count("pop") == 2
    assert [call[0] for call in rpd.calls][-2:] == ["stop", "flush"]
    assert not net._forward_hooks


@pytest.mark.parametrize(("module", "words"), [
    (None, "rpd needs the package rpdTracerControl"),
    (SimpleNamespace(rpdTracerControl=SimpleNamespace(setFilename=1, start=1, stop=1)),
     "this rpdTracerControl has no flush, rangePush, rangePop")])
def test_rpd_is_refused_with_a_reason_where_it_is_not(tmp_path, monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, "rpdTracerControl", module)
    with pytest.raises(wave64.NotSupported, match=words), wave64.profile(tmp_path / "out", kind="rpd"):
        raise AssertionError("the block must not run")
    answer = Profiler().start(StartProfile(str(tmp_path), activities=("RPD",)))
    assert answer.error is not None
    assert words in answer.error


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(wave64.NotSupported, match="kind: expected one of torch, rpd, got 'nsys'"), \
            wave64.profile(tmp_path / "out", kind="nsys"):
        raise AssertionError("the block must not run")


def test_one_profile_at_a_time(tmp_path):
    """In another process: torch's profiler ends its process where one is started in another."""
    code = ("import torch, wave64, sys\n"
            "with wave64.profile(sys.argv[1] + '/outer'):\n"
            "    try:\n"
            "        with wave64.profile(sys.argv[1] + '/inner'): torch.ones(3)\n"
            "    except wave64.NotSupported as error: print(error)\n"
            "with wave64.profile(sys.argv[1] + '/next'): torch.ones(3)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "profile: expected no profile that runs already, got one of torch's" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["next.trace.json.gz", "outer.trace.json.gz"]


def test_a_server_records_by_rpd_for_so_many_steps(tmp_path, rpd):
    profiler = Profiler()
    assert profiler.start(StartProfile(str(tmp_path / "p"), num_steps=2, activities=("RPD",))).error is None
    assert profiler.start(StartProfile(str(tmp_path))).error == "a profile is on its way; stop it first"
    profiler.step()
    assert [call[0] for call in rpd.calls] == ["setFilename", "start"]
    profiler.step()
    assert [call[0] for call in rpd.calls] == ["setFilename", "start", "stop", "flush"]
    assert rpd.calls[0][1].endswith("-TP-0.rpd")
    assert profiler.stop().error == "no profile is on its way; start one first"
