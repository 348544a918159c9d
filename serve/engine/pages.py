"""The page allocator: which pages of the KV pool are free. Pure Python; it knows numbers, not tensors."""

from __future__ import annotations


class PagePool:
    """Pages 0 .. num_pages - 1 of `page_size` tokens each. A page belongs to one sequence or to nobody."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"PagePool: expected at least one page of one token, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is likely still in cache

    @property
    def num_free(self) -> int:
        """Pages that belong to nobody."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Ask `num_free` first: raises RuntimeError when there are fewer."""
        if count > len(self._free):
            raise RuntimeError(f"PagePool: {count} pages wanted, {len(self._free)} of {self.num_pages} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Give back pages that `allocate` gave."""
        self._free.extend(pages)
