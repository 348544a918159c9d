"""The page allocator: which pages of the KV pool are free. Pure Python: page numbers, no tensors."""

from __future__ import annotations


class PagePool:
    """Pages 0 .. num_pages - 1 of `page_size` tokens each. A page has one owner, a sequence or the prefix cache, or it
    is free."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"PagePool: expected at least one page of one token, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._is_free = [True] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is likely still in cache

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages. Raises RuntimeError when fewer than that are free."""
        if count > len(self._free):
            raise RuntimeError(f"PagePool: {count} pages wanted, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. Raises RuntimeError at one that is free already."""
        for page in pages:
            if self._is_free[page]:
                raise RuntimeError(f"PagePool: expected a page that has an owner, got page {page}, which is free")
            self._is_free[page] = True
            self._free.append(page)
