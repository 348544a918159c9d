"""The scheduler against random traffic, with a runner made of arithmetic (helpers_scheduler.py)."""

from typing import Any

import pytest
from helpers_scheduler import PAGE, World, alone, prompt_without_stop, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.scheduler import Scheduler

requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20),  # prompt: many begin as another does
        st.integers(0, 20),  # new tokens
        st.booleans(),  # prompt logprobs
        st.integers(0, 6),  # steps until it arrives
        st.one_of(st.none(), st.integers(0, 10)),  # steps until it is aborted
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(requests, st.integers(10, 24), st.integers(1, 6), st.integers(1, 30), st.booleans(), st.booleans(),
       st.sampled_from(["fcfs", "lpm"]), st.sampled_from([0, 0, 6, 40]), st.booleans())  # fmt: skip
def test_random_traffic(traffic, num_pages, max_running, budget, overlap, reuse, policy, host_pages, late):
    world = World(num_pages, max_running, budget, overlap, policy, reuse, host_pages, late)
    aborted, clock = set(), 0
    pending: list[Any] = [(f"r{i}", *what) for i, what in enumerate(traffic)]
    deadlines = {}
    while pending or world.has_work:
        while pending and pending[0][4] <= 0:
            rid, prompt, max_new, scored, _, abort = pending.pop(0)
            world.add(rid, prompt, max_new, scored)
            if abort is not None:
                deadlines[rid] = clock + abort
        if pending:
            pending[0] = (*pending[0][:4], pending[0][4] - 1, pending[0][5])
        for rid in [rid for rid, when in deadlines.items() if when <= clock]:
            del deadlines[rid]
            if world.scheduler.abort(rid) is not None:
                aborted.add(rid)
                assert rid not in world.scheduler
        world.step()
        clock += 1
        assert clock < 3000
    world.check_end()
    if policy == "fcfs" and not host_pages:  # younger ones go on while the host's pages come
        assert world.first_tokens == [rid for rid in world.arrivals if rid in world.generated]
    for i, (prompt, max_new, scored, _, _) in enumerate(traffic):
        rid, expected = f"r{i}", alone(prompt, max_new)
        if rid in aborted:
            assert world.generated.get(rid, []) == expected[: len(world.generated.get(rid, []))]
        else:
            assert world.generated[rid] == expected
            if scored:
                assert world.prompt_scores[rid] == [None, *prompt[1:]]


def test_the_latest_arrival_is_preempted_and_loses_nothing():
    world = World(num_pages=10, max_running=4, budget=100)
    for rid in "ab":
        world.add(rid, [ord(rid)] * 10, 28)
    preempted = 0
    while len(world.scheduler):
        world.step()
        if world.scheduler.waiting:
            assert [seq.request.rid for seq in world.scheduler.waiting] == ["b"]
            preempted += world.scheduler.waiting[0].num_generated > 0
    assert preempted
    assert world.generated == {rid: alone([ord(rid)] * 10, 28) for rid in "ab"}


def test_prompts_are_chunked_beside_decodes():
    world = World(num_pages=100, max_running=8, budget=8)
    world.add("short", [1, 2, 3], 20)
    world.step()
    world.add("long", list(range(20)), 3)
    world.add("later", [1], 3)
    steps = [world.step() for _ in range(3)]
    assert [step.counts for step in steps] == [[1, 8], [1, 8], [1, 4, 1]]
    assert [step.num_decodes for step in steps] == [1, 1, 1]
    assert [step.logits for step in steps] == [[1, 0], [1, 0], [1, 1, 1]]


def test_prompt_logprobs_go_in_small_chunks():
    world = World(num_pages=200, max_running=8, budget=1000)
    world.add("scored", list(range(300)), 1, scored=True)
    world.add("plain", list(range(1, 301)), 1)
    steps = [world.step() for _ in range(3)]
    assert [step.counts for step in steps] == [[128], [128], [44, 300]]
    assert [step.logits for step in steps] == [[128], [128], [44, 1]]


def test_two_scored_prompts_share_the_budget_of_logits():
    world = World(num_pages=200, max_running=8, budget=1000)
    for i, rid in enumerate("ab"):
        world.add(rid, list(range(i, i + 100)), 1, scored=True)
    assert [world.step().counts for _ in range(2)] == [[100, 28], [72]]
    assert world.prompt_scores["b"] == [None, *range(2, 101)]


def test_a_prompt_preempted_halfway_is_not_scored_twice():
    """While the long prompt goes one token a step, the older sequence grows into its pages."""
    world = World(num_pages=8, max_running=4, budget=1)
    world.add("a", next([x] for x in range(50) if len(alone([x], 30)) == 30), 30)
    world.add("b", list(range(20)), 1, scored=True)
    known, logits = 0, 0
    while len(world.scheduler):
        step = world.step()
        logits += sum(step.logits)
        for seq in world.scheduler.waiting:
            known = max(known, len(seq.prompt_logprobs))
    assert 5 < known < 20
    assert logits == len(world.generated["a"]) + 20  # a row per token and none for the same one again
    assert world.prompt_scores["b"] == [None, *range(1, 20)]


def test_a_newcomer_waits_until_those_that_run_can_grow():
    world = World(num_pages=5, max_running=4, budget=100)
    world.add("a", [1] * 7, 9)
    world.step()
    assert world.generated["a"], "it decodes, and needs a third page after the next token"
    world.add("b", [2] * 12, 1)  # three pages, as many as are free
    world.step()
    assert [seq.request.rid for seq in world.scheduler.waiting] == ["b"]


def test_drop_forgets_the_step_and_nothing_else():
    world = World(num_pages=100, max_running=2, budget=100)
    for rid in "abc":
        world.add(rid, [1, 2, 3], 5)
    world.scheduler.schedule()
    assert [seq.request.rid for seq in world.scheduler.drop()] == ["a", "b"]
    assert world.pool.num_free == 100
    while len(world.scheduler):
        world.step()
    assert world.generated == {"c": alone([1, 2, 3], 5)}


def test_tokens_may_be_chosen_before_the_step_in_front_is_committed():
    """Of steps that only decode; one that ends in the step in front is chosen for nothing."""
    world = World(num_pages=40, max_running=4, budget=40, overlap=True, early=True)
    for i in range(3):
        world.add(f"r{i}", prompt_without_stop(5 + i), 4 - i)
    world.run()
    assert world.generated == {f"r{i}": alone(prompt_without_stop(5 + i), 4 - i) for i in range(3)}
    assert world.num_early == 3
    world.add("scored", prompt_without_stop(6), 3, scored=True)
    world.run()
    assert world.num_early == 3
    world.check_end()


def test_what_cannot_be_queued_raises():
    scheduler = Scheduler(PagePool(4, PAGE), 4, 10)
    scheduler.add(sequence("a", [1] * 10, 6))
    with pytest.raises(ValueError, match="'a' is already there"):
        scheduler.add(sequence("a", [1], 1))
    with pytest.raises(ValueError, match="17 tokens do not fit a pool of 16"):
        scheduler.add(sequence("b", [1] * 10, 7))
    assert scheduler.abort("nobody") is None
