"""The page allocator: a page has one owner, or is free."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wave64.serve.engine.pages import PagePool


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from(["allocate", "free"]), st.integers(0, 12))))
def test_a_page_has_one_owner_or_is_free(num_pages, actions):
    pool, held = PagePool(num_pages, 4), []
    for action, number in actions:
        if action == "allocate" and number <= pool.num_free:
            new = pool.allocate(number)
            assert len(new) == number
            assert not {*new} & {page for pages in held for page in pages}, "nothing held a new page"
            held.append(new)
        elif action == "free" and held:
            pool.free(held.pop(number % len(held)))
        pages = {page for pages in held for page in pages}
        assert pages <= set(range(num_pages))
        assert pool.num_free == num_pages - len(pages)


def test_a_free_page_is_not_freed():
    pool = PagePool(3, 16)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(RuntimeError, match=f"got page {pages[0]}, which is free"):
        pool.free(pages)
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
