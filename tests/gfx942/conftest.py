"""The option that renews golden files, known to pytest where this folder is named on its command line; the process in
which Triton compiles; and what the tests here executed on the emulator, told at the end."""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true",
                     help="write the measured figures to golden.json and bounds.json")


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
