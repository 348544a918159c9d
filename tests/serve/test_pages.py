"""The page allocator: a page is free when the last sequence that holds it lets it go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wave64.serve.engine.pages import PagePool


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from(["allocate", "retain", "free"]), st.integers(0, 12))))
def test_a_page_is_free_when_its_last_holder_lets_it_go(num_pages, actions):
    pool, held = PagePool(num_pages, 4), []
    for action, number in actions:
        if action == "allocate" and number <= pool.num_free:
            new = pool.allocate(number)
            assert len(new) == number
            assert not {*new} & {page for pages in held for page in pages}, "nothing held a new page"
            held.append(new)
        elif action == "retain" and held:  # a sequence that begins as another one does
            prefix = held[number % len(held)][: number + 1]
            pool.retain(prefix)
            held.append(prefix)
        elif action == "free" and held:
            pool.free(held.pop(number % len(held)))
        pages = {page for pages in held for page in pages}
        assert pages <= set(range(num_pages))
        assert pool.num_free == num_pages - len(pages)


def test_a_free_page_is_neither_freed_nor_retained():
    pool = PagePool(3, 16)
    pages = pool.allocate(2)
    pool.free(pages)
    for verb in (pool.free, pool.retain):
        with pytest.raises(RuntimeError, match=f"got page {pages[0]}, which is free"):
            verb(pages)
    assert pool.num_free == 3


def test_more_than_there_is_raises():
    pool = PagePool(3, 16)
    pool.allocate(2)
    with pytest.raises(RuntimeError, match="2 pages wanted, 1 of 3 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_sizes():
    pool = PagePool(3, 16)
    assert pool.num_tokens == 48
    assert [pool.pages_for(n) for n in (1, 16, 17, 48)] == [1, 1, 2, 3]
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0, 16)


def test_what_was_freed_last_is_given_first():
    """It is the most likely to be in a cache still."""
    pool = PagePool(8, 4)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.free(second)
    assert set(pool.allocate(2)) == set(second)
    pool.free(first)
    assert set(pool.allocate(2)) == set(first)
