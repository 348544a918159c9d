"""A step that does not end is noticed, with stacks and words; one that ends, or compiles, is left alone."""

import subprocess
import sys
import threading
import types

import pytest
import zmq

from wave64.serve.engine import watchdog
from wave64.serve.engine.watchdog import COMPILERS, Watchdog
from wave64.serve.messages import Failed, Ready, decode_to_api

ENGINE = """
import sys, time
from wave64.serve.args import ServerArgs
from wave64.serve.engine import engine
from wave64.serve.engine.watchdog import dump_stacks_on_signal

def never_ends(self):
    time.sleep(1000)

engine.Engine.step = never_ends
dump_stacks_on_signal()
engine.run_engine(ServerArgs("demo-llama", max_total_tokens=512, watchdog_timeout=0.5), *sys.argv[1:])
"""


#: an engine of which a kernel's wait times out in its first step
WAITS = """
import sys, torch
from wave64.backends import peers
from wave64.distributed import Group
from wave64.serve.args import ServerArgs
from wave64.serve.engine import engine
from wave64.serve.messages import Request, SamplingParams

record = torch.zeros(16, dtype=torch.int32)
peers._KNOWN["world"] = peers.Peers(Group("world", 0, 2), (), (record.data_ptr(), 0), 3.0)

class Busy(engine.Engine):
    def __init__(self, *rest):
        super().__init__(*rest)
        self.add(Request("0", [5, 6], SamplingParams(max_new_tokens=8)))
        self.runner.model.register_forward_hook(self.time_out)

    def time_out(self, *_):
        record[:5] = torch.tensor([1, 1, 17, 2, 1])

engine.Engine = Busy
engine.run_engine(ServerArgs("demo-llama", max_total_tokens=512, disable_cuda_graph=True), *sys.argv[1:])
"""


class Expired(threading.Event):
    def __call__(self, seconds: float) -> None:
        self.seconds = seconds
        self.set()


class Clock:
    """Time that passes where the test says so. A watchdog looks once whenever it does."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.expired = 0.0, Expired()
        self._may_look, self._has_looked = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(watchdog, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self._has_looked.release()
        self._may_look.acquire()

    def watchdog(self, timeout_s: float) -> Watchdog:
        made = Watchdog(timeout_s, self.expired)
        self._has_looked.acquire()
        return made

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self._may_look.release()
        while not self._has_looked.acquire(timeout=0.01) and not self.expired.is_set():
            pass


def test_short_steps_are_left_alone_and_a_long_one_is_not(monkeypatch, capfd):
    clock = Clock(monkeypatch)
    dog = clock.watchdog(0.2)
    for _ in range(8):
        with dog.watching():
            clock.passes(0.15)
    assert not clock.expired.is_set()
    with dog.watching():
        clock.passes(0.15)
        assert not clock.expired.is_set()
        clock.passes(0.15)
        assert clock.expired.is_set()
    assert clock.expired.seconds == pytest.approx(0.3)
    assert "test_short_steps_are_left_alone_and_a_long_one_is_not" in capfd.readouterr().err


def test_compiling_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    module = types.ModuleType(f"{COMPILERS[0]}.compiler")
    exec("def compile(wait): return wait()", module.__dict__)
    dog = clock.watchdog(0.1)
    with dog.watching():
        module.compile(lambda: clock.passes(0.5))
        clock.passes(0.05)
        assert not clock.expired.is_set()
        clock.passes(0.1)  # what it does afterwards counts
        assert clock.expired.is_set()


def test_a_step_that_ends_while_it_is_looked_at_is_left_alone(monkeypatch):
    expired, looked = Expired(), threading.Event()

    def ends(frame) -> bool:
        dog._began = None
        looked.set()
        return False

    monkeypatch.setattr(watchdog, "_compiles", ends)
    dog = Watchdog(1e-9, expired, check_s=0.005)
    for _ in range(2):  # a watchdog that expires looks at no second step
        looked.clear()
        with dog.watching():
            assert looked.wait(60)
    assert not expired.is_set()


def end_of(script: str, tmp_path) -> tuple[str, str]:
    """The last words of an engine that ends by itself, and its log."""
    ends = [f"ipc://{tmp_path}/{name}" for name in ("requests", "outputs")]
    with zmq.Context() as context, context.socket(zmq.PULL) as outputs:
        outputs.bind(ends[1])
        with subprocess.Popen([sys.executable, "-c", script, *ends], stderr=subprocess.PIPE, text=True) as engine:
            said = []
            while not (said and isinstance(said[-1], Failed)) and outputs.poll(60_000):
                said.append(decode_to_api(outputs.recv()))
            if not said or not isinstance(said[-1], Failed):
                engine.kill()
            _, log = engine.communicate(timeout=60)
    assert isinstance(said[0], Ready)
    assert isinstance(said[-1], Failed)
    assert engine.returncode == 1
    return said[-1].error, log


@pytest.mark.slow
def test_an_engine_that_stands_still_ends_and_says_so(tmp_path):
    error, stacks = end_of(ENGINE, tmp_path)
    assert error.startswith("a step has not ended for ")
    assert "(--watchdog-timeout)" in error
    assert "in never_ends" in stacks


@pytest.mark.slow
def test_an_engine_whose_kernel_has_waited_in_vain_ends_and_says_for_whom(tmp_path):
    error, _ = end_of(WAITS, tmp_path)
    assert error == "rank 0 waited 3 s for rank 1 of group world in all_reduce, round 17 of block 2"
