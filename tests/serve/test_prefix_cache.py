"""The prefix cache: a state machine over scheduler, pages and tree; what is shared, evicted and said; and models."""

import random

import pytest
from helpers_scheduler import PAGE, World, alone, nodes_of, prompt_without_stop, sequence
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wave64.serve.engine import scheduler as scheduler_module
from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.prefix_cache import PrefixCache

OVERTAKES = 3


class Engine(RuleBasedStateMachine):
    """Requests come, go on where an earlier one ended, and are aborted; steps run, overlap and fail. At the end all
    have said what they say alone."""

    @initialize(num_pages=st.integers(10, 20), max_running=st.integers(1, 5), budget=st.integers(1, 30),
                overlap=st.booleans(), policy=st.sampled_from(["fcfs", "lpm"]),
                reuse=st.sampled_from([True] * 3 + [False]), host_pages=st.sampled_from([0, 5, 12, 60]),
                late=st.booleans(), early=st.booleans())  # fmt: skip
    def start(self, num_pages, max_running, budget, overlap, policy, reuse, host_pages, late, early):
        self.world = World(num_pages, max_running, budget, overlap, policy, reuse, host_pages, late, early)
        self.asked, self.ended = {}, set()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=18), max_new=st.integers(0, 20), scored=st.booleans())
    def add(self, prompt, max_new, scored):
        rid = f"r{len(self.asked)}"
        self.asked[rid] = prompt, max_new, scored
        self.world.add(rid, prompt, max_new, scored)

    @precondition(lambda self: any(len(prompt) + len(self.world.generated.get(rid, ())) < 18
                                   for rid, (prompt, *_) in self.asked.items()))
    @rule(data=st.data(), new=st.integers(1, 3), max_new=st.integers(0, 16))
    def go_on(self, data, new, max_new):
        """The next turn of a chat."""
        texts = [[*prompt, *self.world.generated.get(rid, ())] for rid, (prompt, *_) in self.asked.items()]
        text = data.draw(st.sampled_from([text for text in texts if len(text) < 18]))
        self.add(text + [1] * new, max_new, False)

    @rule(times=st.integers(1, 8), chunk=st.one_of(st.none(), st.integers(1, 9)))
    def step(self, times, chunk=None):
        """chunk: of prompts, where that is less than of any step."""
        for _ in range(times):
            self.world.step(chunk)

    @precondition(lambda self: len(self.world.scheduler))
    @rule(data=st.data())
    def abort(self, data):
        rid = data.draw(st.sampled_from(sorted(self.world.scheduler._live)))
        self.world.scheduler.abort(rid)
        self.ended.add(rid)

    @precondition(lambda self: len(self.world.scheduler))
    @rule(is_late=st.booleans())
    def fail(self, is_late):
        """The next step raises, before or after it has changed the page tables."""
        step = self.world.scheduler.schedule()
        if is_late:
            self.world._forward(step)
        self.world._commit()
        self.ended |= {seq.request.rid for seq in self.world.scheduler.drop()}

    @rule()
    def flush(self):
        done = self.world.scheduler.flush()
        assert done == (not len(self.world.scheduler))
        assert not done or self.world.scheduler.cache.num_pages == 0

    @invariant()
    def pages_are_accounted_for(self):
        if hasattr(self, "world"):
            self.world.check_pages()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for _ in range(2000):
            if not self.world.has_work:
                break
            self.step(1)
        self.world.check_end()
        passed = 0
        for rid, oldest in self.world.let_in:
            passed = 0 if rid == oldest else passed + 1
            assert passed <= OVERTAKES, "the oldest would wait for ever"
        for rid, (prompt, max_new, scored) in self.asked.items():
            got, expected = self.world.generated.get(rid, []), alone(prompt, max_new)
            assert got == expected[: len(got)]
            if rid not in self.ended:
                assert got == expected
                assert not scored or self.world.prompt_scores[rid] == [None, *prompt[1:]]


@pytest.fixture(autouse=True)
def few_overtakes(monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_OVERTAKES", OVERTAKES)


class TestEngine(Engine.TestCase):
    settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


def chat(world: World, rid: str, prompt: list[int], max_new: int = 4) -> list[int]:
    """Run one request alone; prompt and answer."""
    world.add(rid, prompt, max_new)
    world.run()
    return prompt + world.generated[rid]


def test_a_second_turn_computes_only_what_is_new():
    """Answers are kept, too: of 13 + 4 tokens 16 have keys, four full pages."""
    world = World(num_pages=50, max_running=4, budget=100)
    text = chat(world, "a", prompt_without_stop(13))
    assert len(text) == 17
    assert world.cached["a"] == 0
    before = world.computed
    chat(world, "b", [*text, 3, 3], 1)
    assert (world.cached["b"], world.computed - before) == (16, 3)
    chat(world, "c", [*text[:11], 99], 1)
    assert world.cached["c"] == 8, "whole pages, up to the first token that differs"
    assert world.scheduler.cached_tokens == 24


def test_the_last_token_is_always_computed():
    """Its logits are wanted."""
    world = World(num_pages=50, max_running=4, budget=100)
    for rid, cached in (("a", 0), ("b", 4), ("c", 4)):
        chat(world, rid, list(range(8)), 1)
        assert world.cached[rid] == cached


def test_prompt_logprobs_are_computed_of_cached_prompts_too():
    world = World(num_pages=50, max_running=4, budget=100)
    chat(world, "a", list(range(12)))
    world.add("b", list(range(12)), 1, scored=True)
    world.run()
    assert (world.cached["b"], world.prompt_scores["b"]) == (0, [None, *range(1, 12)])


def test_what_was_used_last_is_evicted_last_and_leaves_first():
    pool = PagePool(6, PAGE)
    cache = PrefixCache(pool)

    def insert(*keys: int) -> list:
        path = []
        cache.match(path, [token for key in keys for token in [key] * PAGE], len(keys) * PAGE)
        cache.use(path)
        for key in keys[len(path) :]:
            cache.insert(path, (key,) * PAGE, cache.allocate(1)[0])
        cache.release(path)
        return path

    old, new = insert(1, 2, 3), insert(1, 4)
    assert (cache.num_pages, cache.num_available) == (4, 6)
    insert(1, 2)  # younger than 4 now; 3 is the oldest
    evicted = []
    while cache.num_unused:
        cache.allocate(pool.num_free + 1)
        evicted += [node.key[0] for node in (*old, new[-1]) if node.page < 0 and node.key[0] not in evicted]
    assert evicted == [3, 4, 2, 1]
    with pytest.raises(RuntimeError, match="1 pages wanted, 0 available"):
        cache.allocate(1)


def test_what_is_evicted_before_it_was_stored_leaves_the_tree():
    """Its host page holds nothing yet: a later sequence must not have it copied back."""
    pool, host_pool = PagePool(2, PAGE), PagePool(4, PAGE)
    cache, path, tokens = PrefixCache(pool, host_pool=host_pool), [], [5] * PAGE
    cache.insert(path, tuple(tokens), cache.allocate(1)[0])
    cache.release(path)
    assert list(cache.storing) == path
    cache.allocate(2)
    assert (list(cache.storing), cache.hosted([], tokens, PAGE), host_pool.num_free) == ([], [], 4)


def test_tokens_of_equal_hash_are_not_taken_for_each_other():
    """hash(-1) == hash(-2) in CPython, so do the tuples of them."""
    pool = PagePool(4, 2)
    cache = PrefixCache(pool)
    assert hash((-1, 5)) == hash((-2, 5))
    cache.insert([], (-1, 5), pool.allocate(1)[0])
    cache.match(path := [], [-2, 5, 0], 2)
    assert path == []
    cache.match(path, [-1, 5, 0], 2)
    assert len(path) == 1
    cache.match(path, [-1, 5, 0], 1)
    assert path == [], "what is behind the limit is left out of an earlier path, too"


def test_pages_in_use_are_not_evicted():
    world = World(num_pages=8, max_running=4, budget=100)
    chat(world, "a", list(range(12)), 0)
    world.add("b", [*range(12), 1], 0)  # uses three pages of the tree, and one more
    world.scheduler.schedule()
    cache = world.scheduler.cache
    assert (cache.num_unused, cache.num_available) == (0, 4)
    with pytest.raises(RuntimeError, match="5 pages wanted, 4 available"):
        cache.allocate(5)


def test_two_that_compute_the_same_share_pages_afterwards():
    """Neither could have taken the page from the other: its last token has to be computed."""
    world = World(num_pages=40, max_running=4, budget=100)
    for rid in "ab":
        world.add(rid, list(range(4)), 8)
    world.step()
    pages = [seq.pages[0] for seq in world.scheduler.running]
    assert pages[0] == pages[1]
    world.run()
    assert world.generated["a"] == world.generated["b"] == alone(list(range(4)), 8)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_being_computed_is_waited_for(overlap):
    """Four completions of one prompt, in chunks: its pages are computed once, and the last tokens of each."""
    world = World(num_pages=60, max_running=8, budget=8, overlap=overlap)
    for rid in "abcd":
        world.add(rid, list(range(30)), 1)
    world.run()
    assert world.cached == {"a": 0, "b": 28, "c": 28, "d": 28}
    assert world.computed == 30 + 3 * 2


def test_nobody_waits_for_one_that_is_gone():
    world = World(num_pages=60, max_running=8, budget=8, overlap=True)
    for rid in "ab":
        world.add(rid, list(range(30)), 1)
    world.step()
    world.scheduler.abort("a")
    assert world.step().rows
    world.run()
    assert world.generated["b"] == alone(list(range(30)), 1)


def test_a_preempted_sequence_finds_what_it_had_computed():
    """Two grow in ten pages; the younger is preempted, waits, and takes up the pages that were not given away."""
    world = World(num_pages=10, max_running=4, budget=100)
    for first, rid in ((0, "a"), (1000, "b")):
        world.add(rid, prompt_without_stop(10, 20, first), 20)
    while not world.scheduler.preemptions:
        world.step()
    victim, = world.scheduler.waiting
    had = len(victim.tokens) - 1
    while victim.row < 0:
        before = len(nodes_of(world.scheduler.cache._root))
        step = world.step()
    assert before > 0
    assert max(step.starts) > 0
    assert victim.cached_tokens == 0, "it is what the first prompt found"
    assert sum(step.counts) < had
    world.run()


def test_pages_of_a_step_that_never_ran_reach_the_next_one():
    """The second scored prompt is let in, and has no logits left in the step that fails: it goes on."""
    world = World(num_pages=200, max_running=8, budget=1000)
    for i, rid in enumerate("ab"):
        world.add(rid, list(range(i, i + 128)), 1, scored=True)
    step = world.scheduler.schedule()
    assert (len(step.rows), len(step.pages)) == (1, 2)
    world.scheduler.drop()
    world.add("c", list(range(200, 205)), 1)
    world.run()
    assert world.generated == {"b": alone(list(range(1, 129)), 1), "c": alone(list(range(200, 205)), 1)}


@pytest.mark.parametrize("late", [False, True])
def test_what_was_evicted_comes_back_from_the_host(late):
    """While it comes, others go on; alone, a request waits for it in its own step."""
    world = World(num_pages=8, max_running=4, budget=100, host_pages=20, late=late)
    first = chat(world, "a", prompt_without_stop(13, 4), 4)
    chat(world, "x", [5], 1)  # a step in which the last page is stored
    chat(world, "b", prompt_without_stop(24, 4, 1000), 4)  # takes seven of the eight pages
    before = world.computed
    chat(world, "c", [*first, 3], 1)
    assert (world.cached["c"], world.computed - before) == (16, 2)
    assert world.loaded > 0


def test_others_go_on_while_pages_come():
    world = World(num_pages=12, max_running=4, budget=100, host_pages=40)
    first = chat(world, "a", prompt_without_stop(21, 4), 4)
    chat(world, "x", [5], 1)
    chat(world, "b", prompt_without_stop(37, 4, 1000), 4)
    world.add("d", prompt_without_stop(2, 9, 2000), 9)
    world.step()
    world.add("c", [*first, 3], 1)
    coming, come = world.step(), world.step()
    assert (len(coming.loads) > 0, coming.reads_loads, coming.counts) == (True, False, [1])
    assert (come.loads, come.counts[0], sum(come.logits)) == ([], 1, 2)
    world.run()
    assert world.cached["c"] == 24


def test_a_step_that_fails_while_pages_come_leaves_none_behind():
    """Who was to have them fails with it, and the next one computes them."""
    world = World(num_pages=8, max_running=4, budget=100, host_pages=20)
    first = chat(world, "a", prompt_without_stop(13, 4), 4)
    chat(world, "b", prompt_without_stop(24, 4, 1000), 4)
    world.add("c", [*first, 3], 1)
    assert world.scheduler.schedule().loads
    assert [seq.request.rid for seq in world.scheduler.drop()] == ["c"]
    world.check_pages()
    text = [*first, 3]
    world.add("d", text, 1)
    world.run()
    assert world.generated["d"] == alone(text, 1)


def test_the_host_tier_under_random_traffic():
    """Chats whose texts together are several times the pool, that start alike and come at once; some are aborted, steps
    fail before and after they ran. What is not disturbed says what it says alone."""
    seen = dict(loaded=0, failed=0, anew=0)
    for seed in range(60):
        drawn = random.Random(seed)
        world = World(drawn.randrange(9, 14), drawn.randrange(1, 5), drawn.choice([3, 9, 100]), drawn.random() < 0.7,
                      drawn.choice(["fcfs", "lpm"]), host_pages=drawn.choice([4, 12, 40]), late=drawn.random() < 0.7)
        bases = [[base] * drawn.choice([4, 9]) + [drawn.randrange(3) for _ in range(20)] for base in range(5)]
        asked: dict[str, tuple[list[int], int]] = {}
        ended = set()
        scheduler, insert = world.scheduler, world.scheduler.cache.insert

        def noted(path, key, page, insert=insert, root=world.scheduler.cache._root):
            child = (path[-1] if path else root).children.get(key)
            seen["anew"] += child is not None and child.page < 0
            return insert(path, key, page)

        scheduler.cache.insert = noted
        for turn in range(60):
            if turn < 45 and drawn.random() < 0.7:
                base = drawn.choice(bases)
                prompt = base[: drawn.randrange(4, len(base))]
                for twin in range(drawn.choice([1, 1, 2])):
                    asked[rid := f"{turn} {twin}"] = prompt, drawn.randrange(6)
                    world.add(rid, prompt, asked[rid][1], scored=drawn.random() < 0.1)
            if len(scheduler) and drawn.random() < 0.08:
                scheduler.abort(rid := drawn.choice(sorted(scheduler._live)))
                ended.add(rid)
            if len(scheduler) and drawn.random() < 0.08:
                step = scheduler.schedule()
                if drawn.random() < 0.5:
                    world._forward(step)
                world._commit()
                ended |= {seq.request.rid for seq in scheduler.drop()}
                world.copies = [each for each in world.copies if each is not step]
                world.check_pages()
                seen["failed"] += bool(step.loads)
            world.step()
        world.run()
        for rid, (prompt, max_new) in asked.items():
            got, expected = world.generated.get(rid, []), alone(prompt, max_new)
            assert got == (expected[: len(got)] if rid in ended else expected)
        world.check_end()
        seen["loaded"] += world.loaded
    assert all(seen.values()), seen


def test_a_group_gets_what_its_cache_has_unless_it_has_far_more_to_do():
    worlds = [World(num_pages=60, max_running=4, budget=100, host_pages=60) for _ in range(3)]
    groups = [world.scheduler for world in worlds]
    text = list(range(40))
    chat(worlds[1], "short", text[:13], 1)
    chat(worlds[2], "long", text[:29], 1)

    def home(prompt: list[int]) -> int:
        return groups.index(scheduler_module.group_of(sequence("new", prompt, 1), groups))

    assert (home(text), home(text[:14]), home([90, 91])) == (2, 1, 0)
    for i in range(4):
        worlds[2].add(f"{i}", [50 + i], 1)
        assert home(text) == (2 if i < 3 else 1)
    for world in worlds[:2]:
        world.add("one", [60], 1)
    assert home(text) == 2
    assert home([90, 91]) == 0
    worlds[2].run()
    chat(worlds[2], "x", [5], 1)
    chat(worlds[2], "other", list(range(100, 330)), 1)  # all else is in the host tier now
    assert home(text) == 2


def test_groups_that_are_long_may_differ_by_more():
    worlds = [World(num_pages=60, max_running=4, budget=100) for _ in range(2)]
    groups = [world.scheduler for world in worlds]
    chat(worlds[1], "a", list(range(13)), 1)
    for i in range(80):
        worlds[0].add(f"{i}", [50], 1)
    new = sequence("new", list(range(13)), 1)
    for i in range(90):  # an eighth of the other's 80 more
        assert scheduler_module.group_of(new, groups) is groups[1]
        worlds[1].add(f"{i}", [50], 1)
    assert scheduler_module.group_of(new, groups) is groups[0]


def test_without_reuse_nothing_is_kept():
    world = World(num_pages=20, max_running=4, budget=100, reuse=False)
    for rid in "ab":
        chat(world, rid, list(range(12)))
    assert world.cached == {"a": 0, "b": 0}
    assert world.pool.num_free == 20


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abc"), ("lpm", "bca")])
def test_lpm_lets_in_first_what_is_cached(policy, order):
    world = World(num_pages=100, max_running=1, budget=100, policy=policy)
    chat(world, "0", list(range(20)))
    for rid, prompt in (("a", [90] * 20), ("b", [*range(18), 91]), ("c", [*range(10), 92])):
        world.add(rid, prompt, 2)
    world.run()
    assert "".join(world.first_tokens[1:]) == order


def test_lpm_counts_what_is_in_the_host_tier():
    world = World(num_pages=12, max_running=1, budget=100, policy="lpm", host_pages=40)
    chat(world, "0", list(range(20)), 1)
    chat(world, "x", [5], 1)
    chat(world, "1", list(range(100, 144)), 1)
    assert world.scheduler.cache._hosted
    for rid, prompt in (("a", [90] * 20), ("b", [*range(18), 91]), ("c", [*range(10), 92])):
        world.add(rid, prompt, 2)
    world.run()
    assert "".join(world.first_tokens[3:]) == "bca"


def test_lpm_passes_over_the_oldest_a_few_times_only():
    world = World(num_pages=100, max_running=1, budget=100, policy="lpm")
    chat(world, "0", list(range(20)))
    world.add("old", [90] * 20, 2)
    for i in range(2 * OVERTAKES):
        world.add(f"n{i}", [*range(18), i], 2)
    world.run()
    assert [rid for rid, _ in world.let_in].index("old") == 1 + OVERTAKES
