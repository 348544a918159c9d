"""The three tiers of the suite, `pytest --tier quick|suite|long`, and which test belongs to which.

quick   what a developer runs at every save: no server, no machine code, and of every operator, backend and architecture
        one case (a drawn one would be another each time; it is the first)
suite   everything but what is marked long: what `setup_rocm.py test` and CI run
long    everything, what is marked `@pytest.mark.long` too (each has a short form in the suite), and MORE_EXAMPLES
        times the examples of every hypothesis test, drawn anew at each run
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import settings

TIERS = ("quick", "suite", "long")
TESTS = Path(__file__).parent
MORE_EXAMPLES = 20

#: Fixtures that start a server, train, or compile for a GPU: not for `quick`.
SLOW_FIXTURES = {"server", "compiling", "reports", "tuned", "forms", "golden"}
#: Modules, and folders of them, that `quick` leaves out: they start processes or execute machine code throughout.
SLOW_MODULES = ("gfx942", "bench", "serve/test_launch.py", "serve/test_demo.py", "serve/test_demo_deepseek.py",
                "serve/test_memory.py", "test_build.py", "test_setup_rocm.py")


def select(items: Iterable[pytest.Item], tier: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(those that run, those that do not), both in order."""
    chosen, rest, seen = [], [], set()
    for item in items:
        runs = tier == "long" or item.get_closest_marker("long") is None
        if runs and tier == "quick":
            runs = not _is_slow(item) and _group(item) not in seen
            seen.add(_group(item))
        (chosen if runs else rest).append(item)
    return chosen, rest


def widen(items: Iterable[pytest.Item]) -> None:
    """For `long`: more examples of hypothesis tests, which are no longer the same at every run. A failure prints its
    example and the decorator that repeats it."""
    for test in {item.function for item in items if getattr(item.function, "is_hypothesis_test", False)}:
        given = test._hypothesis_internal_use_settings
        test._hypothesis_internal_use_settings = settings(
            given, max_examples=MORE_EXAMPLES * given.max_examples, derandomize=False, database=None, print_blob=True)


def _is_slow(item: pytest.Item) -> bool:
    if item.get_closest_marker("slow") is not None or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
        return True
    path = item.path.relative_to(TESTS).as_posix()
    return path.startswith(SLOW_MODULES)


def _group(item: pytest.Function) -> tuple:
    """Tests of one operator's cases form a group, others are a group each."""
    parameters = getattr(item, "callspec", None)
    if parameters is None or "case" not in parameters.params:
        return (item.nodeid,)
    others = tuple(str(value) for name, value in sorted(parameters.params.items()) if name != "case")
    return (item.path, item.originalname, *others)
