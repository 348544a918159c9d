"""The prefix cache: pages of tokens that were computed before, for sequences that begin with the same tokens.

A tree of full pages. A node is one page and its key the page's tokens, compared one by one; the path from the root is
all that stands before them, on which keys and values depend. So two sequences share a page exactly if all their tokens
up to its end are the same. Pure Python: page numbers, no tensors.

With a host tier a node's page is copied to host memory once it is in the tree, so that evicting it costs nothing and
leaves the node, with its host page alone; a sequence that finds it has the page copied back. A step carries what is to
be copied (`Schedule.stores`, `Schedule.loads`), and its copies run while it computes: so it computes nothing of a page
that it loads, and a page that it stores is not evicted for it.
"""

from __future__ import annotations

from collections import OrderedDict

from wave64.serve.engine.pages import PagePool


class Node:
    """A full page of the tree. `page` is -1 once it is evicted, `host` where host memory has no copy."""

    __slots__ = ("children", "host", "key", "page", "parent", "users")

    def __init__(self, key: tuple[int, ...], page: int, parent: Node | None) -> None:
        self.key, self.page, self.parent, self.host = key, page, parent, -1
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0  # running sequences whose first tokens end in this page, or go on behind it


class PrefixCache:
    """Owns the pages of its tree, and gives those that no sequence uses to whoever allocates: the least recently used
    first, and a page never before those behind it.

    A path is a list of nodes from the root's child downwards. Who uses a node uses all of the path to it. All nodes of
    a path have pages; nodes with a host page alone may be below it.
    """

    def __init__(self, pool: PagePool, enabled: bool = True, host_pool: PagePool | None = None) -> None:
        """host_pool: the pages of the host tier, if there is one."""
        self.pool, self.enabled, self.host_pool = pool, enabled, host_pool
        self._root = Node((), -1, None)
        # Without users. In the order in which they will be evicted: a node's descendants have no users either, and lost
        # them earlier, so that the first is always a leaf.
        self._unused: OrderedDict[Node, None] = OrderedDict()
        self._hosted: OrderedDict[Node, None] = OrderedDict()  # with a host page alone; in the same order
        self.storing: dict[Node, None] = {}  # whose host pages the next step is to fill
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
            if child is None or child.page < 0:
                return
            path.append(node := child)

    def hosted(self, path: list[Node], tokens: list[int], limit: int) -> list[Node]:
        """What follows behind a path that match() has made, with a host page alone."""
        size, node, found = self.pool.page_size, path[-1] if path else self._root, list[Node]()
        if not self._hosted:
            return found
        for start in range(len(path) * size, limit - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            found.append(node := child)
        return found

    def load(self, path: list[Node], nodes: list[Node], pages: list[int]) -> None:
        """Append nodes that hosted() has found behind this path, which a sequence uses, to it. They have these pages
        from now on, and the caller has them filled."""
        for node, page in zip(nodes, pages, strict=True):
            del self._hosted[node]
            node.page, node.users = page, 1
            path.append(node)
        self.num_pages += len(nodes)

    def forget(self, nodes: list[Node]) -> None:
        """Take nodes without users out of the tree, with all below them: what their pages hold is unknown."""
        for node in nodes:
            if node.parent is not None:
                self._forget(node)

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
            self._store(node)
        elif node.page < 0:  # computed anew, instead of loaded
            del self._hosted[node]
            node.page = page
            self.num_pages += 1
        else:
            self.pool.free([page])
            if not node.users:
                del self._unused[node]
        node.users += 1
        path.append(node)
        return node.page

    def clear(self) -> None:
        """Free all pages that no sequence uses, and those of the host tier that are not copies of others."""
        self._evict(len(self._unused))
        while self._hosted:
            self._forget(next(iter(self._hosted)))

    def _store(self, node: Node) -> None:
        """Give the node a host page, if there is one, and have it filled."""
        if self.host_pool is None:
            return
        if not self.host_pool.num_free and self._hosted:
            self._forget(next(iter(self._hosted)))
        if self.host_pool.num_free:
            node.host, = self.host_pool.allocate(1)
            self.storing[node] = None

    def _evict(self, count: int) -> None:
        for _ in range(count):
            node = next(iter(self._unused))
            if node.host < 0 or node in self.storing:
                self._forget(node)
                continue
            del self._unused[node]
            self.pool.free([node.page])
            node.page = -1
            self.num_pages -= 1
            self._hosted[node] = None

    def _forget(self, node: Node) -> None:
        """Take a node without users out of the tree, with all below it."""
        for child in list(node.children.values()):
            self._forget(child)
        assert node.parent is not None
        assert not node.users
        del node.parent.children[node.key]
        if node.page >= 0:
            del self._unused[node]
            self.pool.free([node.page])
            self.num_pages -= 1
        else:
            del self._hosted[node]
        if node.host >= 0:
            assert self.host_pool is not None
            self.host_pool.free([node.host])
            self.storing.pop(node, None)
        node.page, node.host, node.parent = -1, -1, None
