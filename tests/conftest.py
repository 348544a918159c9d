"""Runs before anything imports triton: without a GPU its kernels are interpreted."""

import functools
import gc
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import tiers  # noqa: E402

MANY_OBJECTS = 200_000  # that Python's collector looks at


def pytest_addoption(parser):
    parser.addoption("--tier", choices=tiers.TIERS, default="suite", help="how much to run; see tests/tiers.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Twenty thousand tests, of which nothing ends: looking for garbage among them would take a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config, items):
    tier = config.getoption("--tier")
    chosen, rest = tiers.select(items, tier)
    if tier in tiers.EXAMPLES:
        tiers.draw(chosen, tiers.EXAMPLES[tier], anew=tier == "long")
    if rest:
        config.hook.pytest_deselected(items=rest)
    items[:] = tiers.ordered(chosen)


def pytest_runtest_setup(item):
    """A build may be of some architectures alone (--archs): tests that name another have no machine code to run. One
    that was asked for and is not there is not skipped."""
    named = (*getattr(getattr(item, "callspec", None), "params", {}).values(), getattr(item.module, "ARCH", None))
    for arch in {name for name in named if isinstance(name, str)} & _not_asked_for():
        pytest.skip(f"wave64 was built without code objects for {arch}")


@functools.cache
def _not_asked_for() -> set[str]:
    """The architectures that the build's notes name neither as compiled nor as without a compiler."""
    from wave64.arch import HIP_TARGETS
    from wave64.backends import hip

    notes = f"{hip.compilers()}\n{hip.missing_code_objects()}".splitlines() if hip._hip else HIP_TARGETS
    return set(HIP_TARGETS) - {line.partition(":")[0] for line in notes}


def pytest_unconfigure():
    gc.unfreeze()  # what ends with the process may look for leaks


def pytest_terminal_summary(terminalreporter):
    """Here, since where workers run the tests nothing else reads the folder's own conftest."""
    told = [told for report in terminalreporter.stats.get("passed", ()) if report.when == "call"
            for told in report.user_properties if told[0] in ("emulated", "planned")]
    if told:
        sys.path.append(str(Path(__file__).parent / "gfx942"))
        import summary

        for line in summary.lines(told):
            terminalreporter.write_line(line)
    ended = [report for how in ("passed", "skipped") for report in terminalreporter.stats.get(how, ())]
    results = [value for report in ended if report.when == "call"
               for name, value in report.user_properties if name == "recorded"]
    if results and terminalreporter.config.getoption("renew_record", default=False):
        import recorded

        recorded.write(results)
        terminalreporter.write_line(f"{recorded.RECORD.name}: {len(results)} results written")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors of a test live: "cuda" on a machine with a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Collections leave out what is there: of tests and modules nothing ends before the run does, and each collection
    that looks at them takes a second or two. Code under test undoes it at times, which is seen by how much is left."""
    if len(gc.get_objects(generation=2)) > MANY_OBJECTS:
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
