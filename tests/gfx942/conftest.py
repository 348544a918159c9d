"""The option that renews golden files, known to pytest where this folder is named on its command line; the process in
which Triton compiles; and what the tests here executed on the emulator, told at the end."""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import launched
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


def pytest_terminal_summary(terminalreporter):
    """Of each architecture: what was executed, of what there is. "planned" comes from the test that looks for what is
    left out, so without it nobody knows how many binaries large cases launch."""
    told = [(name, value) for report in terminalreporter.stats.get("passed", ()) if report.when == "call"
            for name, value in report.user_properties if name in ("emulated", "planned")]
    for arch in launched.ARCHS:
        ran = [value for name, value in told if name == "emulated" and value["arch"] == arch]
        if not ran:
            continue
        kernels = {tuple(kernel) for value in ran for kernel in value["kernels"] if kernel[0].endswith(".co")}
        binaries = {key for value in ran for key in value.get("binaries", ())}
        rows = {tuple(row) for value in ran for row in value.get("rows", ())}
        of_large = {key for name, value in told if name == "planned" and value["arch"] == arch
                    for key in value["binaries"]}
        tables = sum(len(table.rows) for table in launched.tables(arch).values())
        symbols = len(launched.hip_symbols(arch))
        words = [f"{len(kernels)} of {symbols} HIP kernels", f"{len(rows)} of {tables} tuned rows",
                 f"{len(binaries)} Triton binaries"]
        if of_large:
            words[-1] += f", among them {len(of_large & binaries)} of the {len(of_large)} of large cases"
        words.append(f"{sum(value['instructions'] for value in ran):,} wave instructions")
        terminalreporter.write_line(f"emulated {arch}: {', '.join(words)}")
