"""The contract's judge: every clause accepts what is just inside its bound and refuses what is just outside; so a judge
that is half as strict as it says fails here."""

import pytest
import torch

from wave64 import OPS
from wave64.testing import contract, judge

#: Half a unit in the last place of 1; of fp32, eight.
FLOORS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
JUST = 0.04  # how close to its bound, either way
CASE = {case.id: case for case in OPS["paged_attention"].cases()}["batch"]


def refused(got, own, exact):
    return judge.compare(got, own, exact)[2]


@pytest.mark.parametrize("dtype", FLOORS)
def test_the_floor_is_what_is_stated(dtype):
    assert judge.floor(dtype) == FLOORS[dtype]


def drawn(rows=4, width=256):
    """Exact values of which every row has largest 1, and a generous dtype to be off in."""
    exact = torch.rand(rows, width, dtype=torch.float64) * 2 - 1
    exact[:, 0] = 1
    return exact


def judged(monkeypatch, dtype):
    """Numbers of fp64 are judged as if of another dtype, so that no rounding blurs how far off they are."""
    monkeypatch.setattr(judge, "floor", lambda _: FLOORS[dtype])


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("own_off", [0.0, 0.01])
def test_one_element_is_held_to_twice_the_reference_and_the_floor(monkeypatch, dtype, own_off):
    judged(monkeypatch, dtype)
    exact = drawn()
    own, bound = exact.clone(), 2 * own_off + FLOORS[dtype]
    own[1, 5] += own_off
    for factor, fails in ((1 - JUST, False), (1 + JUST, True)):
        got = exact.clone()
        got[1, 7] += bound * factor
        assert bool(refused(got, own, exact)) == fails


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("own_off", [0.0, 0.01])
def test_the_root_mean_square_is_held_to_twice_the_reference_and_the_floor(monkeypatch, dtype, own_off):
    judged(monkeypatch, dtype)
    exact = drawn()
    sign = torch.where(torch.rand(exact.shape) < 0.5, -1.0, 1.0).double()
    length = exact.square().mean(1, keepdim=True).sqrt()
    own, bound = exact + own_off * length * sign, 2 * own_off + FLOORS[dtype]
    for factor, fails in ((1 - JUST, False), (1 + JUST, True)):  # by the worst element it is far inside
        got = exact + bound * factor * length * sign
        assert judge.distances(got, exact)[:, 0].max() < 0.7 * bound
        assert bool(refused(got, own, exact)) == fails


@pytest.mark.parametrize("statistic", ["worst element", "root mean square"])
def test_a_small_row_is_held_to_its_own_spread_and_to_the_reference_in_it(monkeypatch, statistic):
    judged(monkeypatch, torch.bfloat16)
    exact = drawn()
    exact[2] *= 1e-3
    own = exact.clone()
    own[0] += 0.2  # what the reference is off elsewhere is no excuse
    own[2, 9] += 1e-3 * 0.01
    size = exact[2].abs().max() if statistic == "worst element" else exact[2].square().mean().sqrt()
    bound = 2 * 0.01 + FLOORS[torch.bfloat16] if statistic == "worst element" else FLOORS[torch.bfloat16]
    for factor, fails in ((1 - JUST, False), (1 + 2 * JUST, True)):
        got = exact.clone()
        if statistic == "worst element":
            got[2, 9] += bound * factor * size
        else:
            bound = (2 * judge.distances(own[2:3], exact[2:3])[0, 1] + FLOORS[torch.bfloat16]).item()
            got[2] += bound * factor * size * torch.where(torch.rand(256) < 0.5, -1.0, 1.0)
        why = refused(got, own, exact)
        assert bool(why) == fails
        assert not fails or f"in row 2, {'of the ' * (statistic != 'root mean square')}{statistic}" in why


def test_infinities_and_nan_are_the_same_or_refused():
    exact = torch.tensor([[1.0, float("-inf"), float("nan"), 2.0]])
    assert not refused(exact.clone(), exact, exact)
    for at, value in ((1, 0.0), (1, float("inf")), (2, 0.0), (0, float("nan")), (3, float("inf"))):
        got = exact.clone()
        got[0, at] = value
        assert "error inf" in refused(got, exact, exact)


def test_a_reference_that_is_not_finite_excuses_nothing():
    exact = torch.ones(2, 3)
    own = exact.clone()
    own[0, 0] = float("inf")
    assert "the reference" in refused(exact, own, exact)


def test_a_row_of_zeros_is_to_be_zeros():
    exact = torch.ones(3, 8)
    exact[1] = 0
    got = exact.clone()
    assert not refused(got, exact, exact)
    got[1, 3] = 1e-9
    assert "in row 1" in refused(got, exact, exact)


def test_attention_with_a_quarter_of_its_elements_zeroed_is_refused():
    """A few rows are of short sequences and large, most are small: to the largest of all, every third element is
    nothing."""
    op, args = OPS["paged_attention"], contract.draw(CASE, "cpu", 0)
    exact = op.reference(**{name: contract.widen(value) for name, value in args.items()})
    own = op.reference(**args)
    got = own.clone()
    bound = judge.compare(own, own, exact)[1]
    small = exact.abs() < 0.9 * bound * exact.abs().max()
    got[small] = 0
    why = refused(got, own, exact)
    assert "in row" in why
    assert refused(own, own, exact) == ""
    sign = (torch.arange(got.numel()).view_as(got) % 4 == 0) & (exact != 0)
    zeroed = own.masked_fill(sign, 0)
    assert refused(zeroed, own, exact)
