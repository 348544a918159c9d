"""The three tiers of the suite, `pytest --tier quick|suite|long`, and which test belongs to which.

quick   what a developer runs at every save: no server, no machine code; every test with its first parameters, for each
        operator and backend; a few examples of every hypothesis test
suite   everything but what is marked long: what `setup_rocm.py test` and CI run
long    everything, what is marked `@pytest.mark.long` too (each has a short form in the suite), and many more
        examples of every hypothesis test, drawn anew at each run
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import settings

TIERS = ("quick", "suite", "long")
TESTS = Path(__file__).parent
EXAMPLES = {"quick": 0.2, "long": 20}  # times as many of a hypothesis test as the suite draws

#: Fixtures that start a server, train, or compile for a GPU: not for `quick`.
SLOW_FIXTURES = {"server", "compiling", "reports", "tuned", "forms", "golden"}
#: Modules, and folders of them, that `quick` leaves out: they start processes or execute machine code throughout.
SLOW_MODULES = ("gfx942", "bench", "ops/test_emulated_ranks.py", "ops/test_profile.py", "ops/test_sparse_pools.py",
                "serve/test_clients.py", "serve/test_deepseek_parity.py", "serve/test_demo.py",
                "serve/test_demo_deepseek.py", "serve/test_launch.py", "serve/test_memory.py",
                "serve/test_offline.py", "serve/test_page.py", "serve/test_parallel.py",
                "serve/test_parallel_faults.py", "serve/test_parallel_nodes.py", "serve/test_replicas.py",
                "serve/test_soak.py", "serve/test_weights_deepseek.py", "test_backends.py", "test_build.py",
                "test_command_line.py", "test_device_compilers.py", "test_hip_library.py", "test_setup_rocm.py",
                "test_standin_hip.py", "test_tuning.py", "test_typing.py")

#: Modules of which a test takes as long as hundreds of others: they run first, so that no worker is left with one while
#: the rest have nothing more to do. Two of them read what every kernel compiles to (`reports`): they follow each other,
#: so that one worker has both, and no other waits for what it compiles.
FIRST = ("test_typing.py", "test_build.py", "test_tuning.py", "gfx942/test_budgets.py", "gfx942/test_forms.py")


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


def ordered(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Those of FIRST, in its order, then all others as they were."""
    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(TESTS).as_posix()
        return FIRST.index(path) if path in FIRST else len(FIRST)

    return sorted(items, key=rank)


def draw(items: Iterable[pytest.Function], times: float, anew: bool) -> None:
    """Hypothesis tests get `times` as many examples; anew: other ones at each run. A failure prints its example."""
    def drawn(given: settings) -> settings:
        count = max(1, int(times * given.max_examples))
        return settings(given, max_examples=count, derandomize=not anew, database=None)

    tests = [item for item in items if getattr(item.function, "is_hypothesis_test", False)]
    machines = {item.cls for item in tests if hasattr(getattr(item, "cls", None), "settings")}
    for test in {item.function for item in tests if getattr(item, "cls", None) not in machines}:
        test._hypothesis_internal_use_settings = drawn(test._hypothesis_internal_use_settings)
    for machine in machines:
        machine.settings = drawn(machine.settings)


def _is_slow(item: pytest.Item) -> bool:
    if item.get_closest_marker("slow") is not None or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
        return True
    path = item.path.relative_to(TESTS).as_posix()
    return path.startswith(SLOW_MODULES)


def _group(item: pytest.Function) -> tuple:
    """Of the tests of a group `quick` runs the first."""
    parameters = getattr(item, "callspec", None)
    of = parameters.params if parameters else {}
    return (item.path, item.originalname, *(str(getattr(of.get(name), "name", of.get(name)))
                                            for name in ("op", "kernel", "backend")))
