"""The radix tree of published prefixes. Owns which prefixes have KV pages that new sequences may share.

Keys are whole pages of *units* below a namespace, so a prefix computed under other weights or another adapter can never
match. A unit is what a position is known by, UNIT_BYTES in memory. Of text it is the token id: the array that the model
gets is the key. What is no text has one placeholder id at all its positions; its units are the words of a digest of its
content, drawn out over them, with the sign bit set, so that none is a token id.

An edge holds up to `MAX_EDGE_PAGES` pages; children are found by the bytes of their first page, so matching compares
memory and never loops over units in Python.

A lease pins the node where its pages end; a node with a pinned child is pinned. Pages of unpinned nodes are evictable,
from the leaves, oldest epoch first and least recently used first: a heap holds each unpinned leaf once, and an entry
whose leaf was used since is pushed again when it surfaces, so an eviction costs O(log n) and never a walk.

The tree holds one reference on each of its pages. It does not know who leases them.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from headrace.cache.page_pool import PageIds, PagePool

MAX_EDGE_PAGES = 128
UNIT_BYTES = 4
_DIGEST_BYTES = 16


class Namespace(NamedTuple):
    """What KV depends on beside the units up to it. Prefixes of different ones never match.

    epoch      of the weights
    adapter    (uid, generation) of what is added to them, None: nothing
    extra_key  the caller's own, by which prefixes are kept apart
    """

    epoch: int
    adapter: tuple[int, int] | None = None
    extra_key: str = ""


class Node:
    """An edge and where it leads. `key` is the bytes of the units of `pages`; `num_pins` counts leases that end here
    and pinned children; `is_queued` says that the eviction heap has an entry for it. `digest`, of all units up to its
    end, is b"" until somebody asks."""

    __slots__ = ("children", "digest", "is_queued", "key", "last_use", "namespace", "num_pins", "pages", "parent")

    def __init__(self, namespace: Namespace, parent: Node | None, key: bytes, pages: PageIds, last_use: int) -> None:
        self.namespace = namespace
        self.parent = parent
        self.key = key
        self.pages = pages
        self.last_use = last_use
        self.children: dict[bytes, Node] = {}
        self.num_pins = 0
        self.is_queued = False
        self.digest = b""


class Match(NamedTuple):
    """The longest published prefix: it ends `num_edge_pages` into the edge of `node` (None: nothing matched).

    `num_unpinned` of its `num_pages` pages are evictable now and will not be once the match is leased.
    """

    node: Node | None
    num_edge_pages: int
    num_pages: int
    num_unpinned: int
    edges: tuple[PageIds, ...]

    def page_ids(self) -> PageIds:
        """The matched pages in order, int32 [num_pages]."""
        return np.concatenate(self.edges) if self.edges else np.empty(0, dtype=np.int32)


NO_MATCH = Match(None, 0, 0, 0, ())


class RadixTree:
    """Published prefixes of `page_size` units per page, whose pages come from `pool`."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.num_evictable = 0
        self.num_pages = 0
        self.num_nodes = 0
        """Of those that have pages."""
        self.notes_idle = False  # what becomes unpinned, for `next_idle`
        self._idle: deque[Node] = deque()
        self._pool = pool
        self._page_bytes = page_size * UNIT_BYTES
        self._roots: dict[Namespace, Node] = {}
        self._heap: list[tuple[int, int, int, Node]] = []
        self._clock = 0
        self._num_queued = 0

    def match(self, namespace: Namespace, units: bytes, max_pages: int) -> Match:
        """Find the longest published prefix of `units` of at most `max_pages` whole pages. Changes nothing."""
        node = self._roots.get(namespace)
        page_bytes = self._page_bytes
        end = min(max_pages, len(units) // page_bytes) * page_bytes
        offset = num_unpinned = num_edge_pages = 0
        edges: list[PageIds] = []
        while node is not None and offset < end:
            child = node.children.get(units[offset : offset + page_bytes])
            if child is None:
                break
            num_common = self._num_common_pages(child, units, offset, end)
            node, num_edge_pages = child, num_common
            edges.append(child.pages[:num_common])
            offset += num_common * page_bytes
            num_unpinned += 0 if child.num_pins else num_common
            if num_common < len(child.pages):
                break
        if not edges:
            return NO_MATCH
        return Match(node, num_edge_pages, offset // page_bytes, num_unpinned, tuple(edges))

    def pin_match(self, match: Match) -> Node:
        """Pin a non-empty match made since the tree last changed, cutting its last edge where the match ends."""
        node = match.node
        assert node is not None
        if match.num_edge_pages < len(node.pages):
            node = self._split(node, match.num_edge_pages)
        self.pin(node)
        return node

    def pin(self, node: Node) -> None:
        """Keep the path to `node` from eviction until the matching `unpin`."""
        above: Node | None = node
        while above is not None:
            above.num_pins += 1
            if above.num_pins > 1:
                return
            self.num_evictable -= len(above.pages)
            above = above.parent

    def unpin(self, node: Node, *, notes_idle: bool = True) -> None:
        """Undo one `pin`. The node counts as used now; `next_idle` may tell of it."""
        self._clock += 1
        node.last_use = self._clock
        above: Node | None = node
        while above is not None:
            above.num_pins -= 1
            if above.num_pins:
                return
            self.num_evictable += len(above.pages)
            if not above.children:
                self._queue(above)
            if self.notes_idle and notes_idle:
                self.note_idle(above)
            above = above.parent

    def note_idle(self, node: Node, *, is_first: bool = False) -> None:
        """Have `next_idle` tell of it, after the others or before them."""
        (self._idle.appendleft if is_first else self._idle.append)(node)

    def next_idle(self) -> Node | None:
        """A node that was unpinned, or cut off from one, and is still there, each told of once; None: no other."""
        while self._idle:
            node = self._idle.popleft()
            if node.parent is not None:
                return node
        return None

    def page_digests(self, node: Node) -> list[bytes]:
        """For each page of an edge, a digest of its namespace and of all units up to the page's end."""
        path = [node]
        while (above := path[-1].parent) is not None and not above.digest:
            path.append(above)
        before, found = _namespace_digest(node.namespace) if above is None else above.digest, list[bytes]()
        for each in reversed(path):
            found = list(self._digests(before, each.key, 0))
            before = each.digest = found[-1] if found else before  # a root has no page
        return found

    def digests_after(self, namespace: Namespace, units: bytes, match: Match, count: int) -> Iterator[bytes]:
        """The digests of up to `count` pages that go on after a match."""
        before = _namespace_digest(namespace)
        if match.node is not None:
            before = self.page_digests(match.node)[match.num_edge_pages - 1]
        return islice(self._digests(before, units, match.num_pages), count)

    def insert(
        self, namespace: Namespace, units: bytes, pages: PageIds, *, below: Node | None = None, through: bool = True
    ) -> tuple[Node, int]:
        """Publish `pages`, which hold `units`, below a node (None: the namespace's root).

        Units that are published already keep their pages; the rest becomes new nodes, whose pages the tree retains.
        With `through=False` the walk stops before the first page that is published already. Returns the last node
        reached and how many of `pages` lead to it; the caller pins the node if the pages stay leased.
        """
        assert len(units) == len(pages) * self._page_bytes > 0
        node = below if below is not None else self._root(namespace)
        offset = 0
        while offset < len(units):
            child = node.children.get(units[offset : offset + self._page_bytes])
            if child is None:
                return self._append(node, units[offset:], pages[offset // self._page_bytes :]), len(pages)
            if not through:
                break
            num_common = self._num_common_pages(child, units, offset, len(units))
            node = child if num_common == len(child.pages) else self._split(child, num_common)
            offset += num_common * self._page_bytes
        return node, offset // self._page_bytes

    def evict(self, num_pages: int) -> int:
        """Free `num_pages` unpinned pages, or all there are. Returns how many were freed."""
        num_freed = 0
        while num_freed < num_pages and self._heap:
            _, last_use, _, node = heapq.heappop(self._heap)
            node.is_queued = False
            if node.num_pins or node.children:
                continue
            if node.last_use > last_use:
                self._queue(node)
                continue
            num_freed += self._trim(node, min(len(node.pages), num_pages - num_freed))
        return num_freed

    def flush(self) -> int:
        """Unpublish everything; pages that no lease holds become free. Returns how many. Pins are void after it."""
        num_freed = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            num_freed += self._pool.release(node.pages)
            node.children.clear()
            node.parent = None
        self._roots.clear()
        self._heap.clear()
        self._idle.clear()
        self.num_evictable = self.num_pages = self.num_nodes = 0
        return num_freed

    def _root(self, namespace: Namespace) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(namespace, None, b"", np.empty(0, dtype=np.int32), self._clock)
        return root

    def _num_common_pages(self, node: Node, units: bytes, offset: int, end: int) -> int:
        """Whole pages that the edge of `node` shares with `units[offset:end]`."""
        key = node.key
        if offset + len(key) <= end and units.startswith(key, offset):
            return len(node.pages)
        num_units = min(len(key), end - offset) // UNIT_BYTES
        ours = np.frombuffer(key, dtype=np.int32, count=num_units)
        differs = ours != np.frombuffer(units, dtype=np.int32, count=num_units, offset=offset)
        first = int(differs.argmax())
        return (first if differs[first] else num_units) * UNIT_BYTES // self._page_bytes

    def _digests(self, before: bytes, units: bytes, first_page: int) -> Iterator[bytes]:
        """Of the whole pages of `units` from `first_page` on, each digest from the one before it."""
        size = self._page_bytes
        for start in range(first_page * size, len(units) - size + 1, size):
            before = hashlib.blake2b(before + units[start : start + size], digest_size=_DIGEST_BYTES).digest()
            yield before

    def _append(self, node: Node, units: bytes, pages: PageIds) -> Node:
        """Add a chain of new nodes below `node`. Edges are short so that cutting one costs little."""
        self._pool.retain(pages)
        self._clock += 1
        step = MAX_EDGE_PAGES
        for first in range(0, len(pages), step):
            key = units[first * self._page_bytes : (first + step) * self._page_bytes]
            child = Node(node.namespace, node, key, pages[first : first + step].copy(), self._clock)
            node.children[key[: self._page_bytes]] = child
            node = child
            self.num_nodes += 1
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        self._queue(node)
        return node

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut the edge of `node` after `num_pages`; returns the new upper node. Leases keep pointing at the lower."""
        parent = node.parent
        assert parent is not None and 0 < num_pages < len(node.pages)
        cut = num_pages * self._page_bytes
        upper = Node(node.namespace, parent, node.key[:cut], node.pages[:num_pages].copy(), node.last_use)
        parent.children[upper.key[: self._page_bytes]] = upper
        self.num_nodes += 1
        node.key = node.key[cut:]
        node.pages = node.pages[num_pages:].copy()
        node.parent = upper
        upper.children[node.key[: self._page_bytes]] = node
        upper.num_pins = 1 if node.num_pins else 0
        if self.notes_idle:
            self.note_idle(upper)
        return upper

    def _trim(self, node: Node, num_pages: int) -> int:
        """Drop the last pages of an unpinned leaf, and the leaf with its last page."""
        keep = len(node.pages) - num_pages
        self.num_evictable -= num_pages
        self.num_pages -= num_pages
        num_freed = self._pool.release(node.pages[keep:])
        if keep:
            node.pages = node.pages[:keep]
            node.key = node.key[: keep * self._page_bytes]
            node.digest = b""
            self._queue(node)
        else:
            self._remove(node)
        return num_freed

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._page_bytes]]
        self.num_nodes -= 1
        node.parent = None
        if parent.children or parent.num_pins:
            return
        if parent.parent is None:
            del self._roots[parent.namespace]
        else:
            self._queue(parent)

    def _queue(self, node: Node) -> None:
        """Enter an unpinned leaf into the heap, once. A root has no pages and never gets in."""
        if not node.is_queued and len(node.pages):
            node.is_queued = True
            self._num_queued += 1
            heapq.heappush(self._heap, (node.namespace.epoch, node.last_use, self._num_queued, node))


def _namespace_digest(namespace: Namespace) -> bytes:
    return hashlib.blake2b(repr(namespace).encode(), digest_size=_DIGEST_BYTES).digest()
