"""The tiers select what they say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiers
from hypothesis import given, settings
from hypothesis import strategies as st


def item(path: str, marks=(), fixtures=(), **params):
    """What tiers.py looks at of a collected test."""
    return SimpleNamespace(
        path=tiers.TESTS / path, nodeid=f"{path}::test{params}", originalname="test", fixturenames=fixtures,
        function=len, callspec=SimpleNamespace(params=params) if params else None,
        get_closest_marker=lambda name: name if name in marks else None)


ITEMS = {
    "plain": item("ops/test_op.py"),
    "first case": item("ops/test_contract.py", case="a", op="rms_norm"),
    "second case": item("ops/test_contract.py", case="b", op="rms_norm"),
    "another op's case": item("ops/test_contract.py", case="a", op="sample"),
    "server": item("serve/test_http.py", fixtures=("server",)),
    "machine code": item("gfx942/test_emulator.py"),
    "slow": item("ops/test_op.py", marks=("slow",), at=1),
    "long": item("serve/test_soak.py", marks=("long",)),
}


@pytest.mark.parametrize(("tier", "expected"), [
    ("quick", ["plain", "first case", "another op's case"]),
    ("suite", [name for name in ITEMS if name != "long"]),
    ("long", list(ITEMS)),
])
def test_each_tier_runs(tier, expected):
    chosen, rest = tiers.select(ITEMS.values(), tier)
    assert [name for name, each in ITEMS.items() if each in chosen] == expected
    assert len(chosen) + len(rest) == len(ITEMS)


def test_the_dearest_run_first_and_the_others_stay_in_order():
    given = [item(path) for path in ("ops/test_op.py", *reversed(tiers.FIRST), "serve/test_soak.py", tiers.FIRST[0])]
    assert [each.path.relative_to(tiers.TESTS).as_posix() for each in tiers.ordered(given)] == [
        tiers.FIRST[0], *tiers.FIRST, "ops/test_op.py", "serve/test_soak.py"]


def test_examples_are_multiplied():
    seen = []

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(st.integers())
    def drawn(x):
        seen.append(x)

    drawn()
    assert len(seen) == 3
    seen.clear()
    tiers.draw([SimpleNamespace(function=drawn), SimpleNamespace(function=len)], 20, anew=True)
    drawn()
    assert len(seen) == 3 * 20


def test_modules_that_are_named_are_there():
    assert all(Path(tiers.TESTS, name).exists() for name in (*tiers.SLOW_MODULES, *tiers.FIRST))
