"""The options that renew golden files and the record, known to pytest where this folder is named on its command line;
the process in which Triton compiles; and what all tests here have in common."""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import budgets
import compiled
import pytest
import recorded
from once import once


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true",
                     help="write the measured figures to golden.json and bounds.json")
    parser.addoption("--renew-record", action="store_true",
                     help="obtain what recorded.json lacks or has of other sources, and write it there")


@pytest.fixture(scope="session")
def record(request) -> recorded.Record:
    """Results that need not be obtained anew."""
    return recorded.Record(renewing=request.config.getoption("renew_record", default=False),
                           all_anew=request.config.getoption("tier") == "long")


@pytest.fixture(scope="session")
def compiling():
    """A process without the interpreter that the other tests run Triton kernels in: Triton compiles there, and the
    machine code is executed. Whoever asks it waits, so that no more processes are busy than pytest has workers. It has
    no use for garbage collection: see `check.main`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=gc.disable)
        assert process.submit(gc.isenabled).result() is False  # it has started
    with process:
        yield process


@pytest.fixture(scope="session")
def reports(request, compiling, record, tmp_path_factory) -> dict[str, dict]:
    """What the compilers make of every kernel: see compiled.py. Made once, for all workers of a run."""
    def obtain() -> dict[str, dict]:
        return compiled.obtain(record, {arch: compiling.submit(compiled.shipped, arch).result()
                                        for arch in budgets.ARCHS})

    return once(request, tmp_path_factory, "compiled", obtain)
