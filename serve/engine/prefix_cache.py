"""The prefix cache: pages of tokens that were computed before, for sequences that begin with the same tokens.

A tree of full pages. A node is one page and its key the page's tokens, compared one by one; the path from the root is
all that stands before them, on which keys and values depend. So two sequences share a page exactly if all their tokens
up to its end are the same. Pure Python: page numbers, no tensors.
"""

from __future__ import annotations

from collections import OrderedDict

from wave64.serve.engine.pages import PagePool


class Node:
    """A full page of the tree. `page` is -1 once it is evicted."""

    __slots__ = ("children", "key", "page", "parent", "users")

    def __init__(self, key: tuple[int, ...], page: int, parent: Node | None) -> None:
        self.key, self.page, self.parent = key, page, parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0  # running sequences whose first tokens end in this page, or go on behind it


class PrefixCache:
    """Owns the pages of its tree, and gives those that no sequence uses to whoever allocates: the least recently used
    first, and a page never before those behind it.

    A path is a list of nodes from the root's child downwards. Who uses a node uses all of the path to it.
    """

    def __init__(self, pool: PagePool, enabled: bool = True) -> None:
        self.pool, self.enabled = pool, enabled
        self._root = Node((), -1, None)
        # Without users. In the order in which they will be evicted: a node's descendants have no users either, and lost
        # them earlier, so that the first is always a leaf.
        self._unused: OrderedDict[Node, None] = OrderedDict()
        self.num_pages = 0  # of the tree

    @property
    def num_unused(self) -> int:
        """Pages of the tree that no sequence uses."""
        return len(self._unused)

    @property
    def num_available(self) -> int:
        """Pages that allocate() can give."""
        return self.pool.num_free + len(self._unused)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, evicting where the pool has fewer. Raises RuntimeError, and evicts nothing, where not so
        many are available."""
        if count > self.num_available:
            raise RuntimeError(f"PrefixCache: {count} pages wanted, {self.num_available} available")
        self._evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def match(self, path: list[Node], tokens: list[int], limit: int) -> None:
        """Make `path`, that of an earlier call or an empty list, the longest one whose pages hold the first of `tokens`
        and end within `limit` of them."""
        size = self.pool.page_size
        del path[limit // size :]
        while path and path[-1].page < 0:
            path.pop()
        node = path[-1] if path else self._root
        for start in range(len(path) * size, limit - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size])) if node.children else None
            if child is None:
                return
            path.append(node := child)

    def use(self, path: list[Node]) -> None:
        """A sequence starts to use these pages; they stay until it releases them."""
        for node in path:
            if not node.users:
                del self._unused[node]
            node.users += 1

    def release(self, path: list[Node]) -> None:
        """A sequence uses these pages no more."""
        for node in reversed(path):
            node.users -= 1
            if not node.users:
                self._unused[node] = None

    def insert(self, path: list[Node], key: tuple[int, ...], page: int) -> int:
        """Append the page behind `path`, which holds these tokens, to the path of a sequence that uses it, and hand it
        to the tree. Returns the page to use from now on: the tree's, where it had these tokens already; `page` is free
        then."""
        parent = path[-1] if path else self._root
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, page, parent)
            self.num_pages += 1
        else:
            self.pool.free([page])
            if not node.users:
                del self._unused[node]
        node.users += 1
        path.append(node)
        return node.page

    def clear(self) -> None:
        """Free all pages that no sequence uses."""
        self._evict(len(self._unused))

    def _evict(self, count: int) -> None:
        for _ in range(count):
            node, _ = self._unused.popitem(last=False)
            assert node.parent is not None
            assert not node.children
            del node.parent.children[node.key]
            self.pool.free([node.page])
            node.page, node.parent = -1, None
            self.num_pages -= 1
