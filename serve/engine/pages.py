"""The page allocator: how many sequences hold each page of the KV pool. Pure Python: page numbers, no tensors."""

from __future__ import annotations


class PagePool:
    """Pages 0 .. num_pages - 1 of `page_size` tokens each. A page is free when nothing holds a reference to it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"PagePool: expected at least one page of one token, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is likely still in cache

    @property
    def num_free(self) -> int:
        """Pages without a reference."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, with one reference each. Raises RuntimeError when fewer than that are free."""
        if count > len(self._free):
            raise RuntimeError(f"PagePool: {count} pages wanted, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: list[int]) -> None:
        """Add a reference to each of the pages, which another sequence holds. Raises RuntimeError at a free one."""
        for page in pages:
            self._check_held(page)
            self._references[page] += 1

    def free(self, pages: list[int]) -> None:
        """Drop one reference to each of the pages; a page without any is free. Raises RuntimeError at a free one."""
        for page in pages:
            self._check_held(page)
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def _check_held(self, page: int) -> None:
        if not self._references[page]:
            raise RuntimeError(f"PagePool: expected a page that a sequence holds, got page {page}, which is free")
