"""Triton kernels' machine code for gfx942 and gfx950, executed: every case that is not large keeps the contract.

They are executed in a process without the interpreter that the other tests run Triton kernels in; whoever asks it
waits, so that no more processes are busy than pytest has workers.
"""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import pytest

from wave64 import OPS
from wave64.testing.emulator.check import check_case

ARCHS = ("gfx942", "gfx950")


@pytest.fixture(scope="session")
def compiling():
    """A process in which Triton compiles. It has no use for garbage collection: see `check.main`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=gc.disable)
        assert process.submit(gc.isenabled).result() is False  # it has started
    with process:
        yield process


@pytest.mark.parametrize(("op", "case", "arch"), [
    pytest.param(op.name, case.id, arch, id=f"{op.name}-{case.id}-{arch}")
    for arch in ARCHS for op in OPS.values() if "triton" in op.backends for case in op.cases() if not case.large])
def test_machine_code_keeps_the_contract(op, case, arch, compiling, record_property):
    result = compiling.submit(check_case, op, "triton", arch, case).result()
    assert result.failures == {}
    if result.declined:
        pytest.skip("the kernel declines the arguments")
    assert result.passed == 1
    record_property("emulated", {name: value for name, value in asdict(result).items()
                                 if name in ("kernels", "instructions")})
