"""Leases: the pages each running sequence holds. Owns the page rows by slot and every call into pool and tree.

A lease is a row of pages: first those shared with the radix tree, then its own. It holds one reference on each until
`close`, which its owner calls when the last step in flight that may touch the pages has retired. Leases know nothing of
requests or steps; arrays are indexed by slot, so that growing many leases by a page is one vector operation.

Pages move from a lease's own to published only as a whole prefix: `publish` while the sequence computes, stopping where
another sequence published the same units first, and for the last time once it is about to leave.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headrace.cache.offload import Offload, PageLoad
from headrace.cache.page_pool import PageIds, PagePool
from headrace.cache.radix_tree import NO_MATCH, UNIT_BYTES, Match, Namespace, Node, RadixTree

SlotIds = npt.NDArray[np.int64]
UnitsOf = Callable[[int, int, int], bytes]
"""(slot, first, last) -> the units of positions first..last-1 of the sequence that holds the slot."""


class LeaseTable:
    """One possible lease per slot.

    pages        int32 [slots, columns], page ids in order of position; valid below `num_pages`
    num_pages    int64 [slots], pages held
    num_matched  int64 [slots], leading pages that were found in the tree when the lease was opened
    """

    def __init__(
        self,
        units: UnitsOf,
        *,
        num_slots: int,
        num_columns: int,
        num_pages: int,
        page_size: int,
        prefix_cache: bool,
        num_host_pages: int = 0,
        max_page_moves: int = 0,
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(self.pool, page_size)
        self.offload = Offload(self.tree, self.pool, num_host_pages, max_page_moves) if num_host_pages else None
        self.num_evicted_pages = 0
        self.pages = np.zeros((num_slots, num_columns), dtype=np.int32)
        self.num_pages = np.zeros(num_slots, dtype=np.int64)
        self.num_matched = np.zeros(num_slots, dtype=np.int64)
        self._units = units
        self._prefix_cache = prefix_cache
        self._num_published = [0] * num_slots
        self._may_publish = [False] * num_slots
        self._has_met_other = [False] * num_slots
        self._nodes: list[Node | None] = [None] * num_slots
        self._namespaces = [Namespace(0)] * num_slots

    @property
    def num_available(self) -> int:
        """Pages that a lease could grow by now: free ones and unreferenced cached ones."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def num_used(self) -> int:
        """Pages that are neither free nor reclaimable."""
        return self.pool.num_pages - 1 - self.num_available

    def match(self, namespace: Namespace, units: bytes, max_pages: int) -> Match:
        """The longest published prefix of `units` of at most `max_pages` pages. Changes nothing."""
        return self.tree.match(namespace, units, max_pages) if self._prefix_cache and max_pages > 0 else NO_MATCH

    def open(self, slot: int, namespace: Namespace, match: Match) -> None:
        """Start the lease of `slot` with the pages of `match`, which was made since the tree last changed."""
        assert self.num_pages[slot] == 0, f"slot {slot} still holds a lease"
        count = match.num_pages
        if count:
            self._nodes[slot] = self.tree.pin_match(match)
            self.pages[slot, :count] = shared = match.page_ids()
            self.pool.retain(shared)
        self.num_pages[slot] = count
        self.num_matched[slot] = count
        self._num_published[slot] = count
        self._may_publish[slot] = self._prefix_cache
        self._has_met_other[slot] = False
        self._namespaces[slot] = namespace

    def begin_load(self, namespace: Namespace, units: bytes, match: Match, host_pages: list[int]) -> None:
        """Have what goes on where `match` ends, which was made since the tree last changed, copied from the host into
        pages of nobody, evicting as needed. The caller has checked `num_available`."""
        assert self.offload is not None, "there are no host pages"
        below = self.tree.pin_match(match) if match.num_pages else None
        page_bytes, first = self.page_size * UNIT_BYTES, match.num_pages
        part = units[first * page_bytes : (first + len(host_pages)) * page_bytes]
        self.offload.begin_load(PageLoad(namespace, below, part, self._take(len(host_pages)), host_pages))

    def grow(self, slot: int, num_pages: int) -> PageIds:
        """Append pages to one lease, evicting as needed; int32 [num_pages]. The caller has checked `num_available`."""
        pages = self._take(num_pages)
        first = int(self.num_pages[slot])
        self.pages[slot, first : first + num_pages] = pages
        self.num_pages[slot] = first + num_pages
        return pages

    def grow_each(self, slots: SlotIds) -> tuple[SlotIds, PageIds]:
        """Append one page to each of these leases; returns their columns and page ids, one per slot."""
        pages = self._take(len(slots))
        columns = self.num_pages[slots]
        self.pages[slots, columns] = pages
        self.num_pages[slots] = columns + 1
        return columns, pages

    def publish(self, slot: int, num_tokens: int, *, is_last: bool = False) -> None:
        """Publish the whole pages among the first `num_tokens` positions, whose KV earlier steps, or steps already
        decided, write. Stops for good before a page that another sequence published first, but for the last time: a
        lease about to close goes on below it."""
        first, count = self._num_published[slot], num_tokens // self.page_size
        if count <= first or not self._may_publish[slot] or (self._has_met_other[slot] and not is_last):
            return
        units = self._units(slot, first * self.page_size, count * self.page_size)
        pages, old = self.pages[slot, first:count], self._nodes[slot]
        node, num_reached = self.tree.insert(self._namespaces[slot], units, pages, below=old, through=is_last)
        self._has_met_other[slot] = num_reached < count - first
        self._num_published[slot] = first + num_reached
        if num_reached:
            self.tree.pin(node)
            self._nodes[slot] = node
            if old is not None:
                self.tree.unpin(old)

    def never_publish(self, slot: int) -> None:
        """Publish no more pages of this lease: its KV is not what its namespace promises."""
        self._may_publish[slot] = False

    def may_publish(self, slot: int) -> bool:
        """Whether what is computed on this lease can be found again once it is closed."""
        return self._may_publish[slot]

    @property
    def num_keepable(self) -> int:
        """Pages that the host may be told to keep beside those that it was told."""
        return 0 if self.offload is None else self.offload.tier.num_pages - self.offload.tier.num_kept

    def keep(self, slot: int) -> list[bytes]:
        """Have the host keep the published pages of this lease beyond its end, if it can; returns what to `drop`."""
        digests, node = list[bytes](), self._nodes[slot]
        while self.num_keepable and node is not None:
            digests, node = self.tree.page_digests(node) + digests, node.parent
        if self.offload is None or len(digests) > self.num_keepable:
            return []
        self.offload.tier.keep(digests)
        return digests

    def drop(self, digests: list[bytes]) -> None:
        """The host need not keep these any longer."""
        if self.offload is not None:
            self.offload.tier.drop(digests)

    def close(self, slot: int) -> None:
        """Drop the lease's references; pages that nothing else holds become free."""
        node = self._nodes[slot]
        if node is not None:
            self.tree.unpin(node)
            self._nodes[slot] = None
        self.pool.release(self.pages[slot, : self.num_pages[slot]])
        self.num_pages[slot] = 0
        self._may_publish[slot] = False

    def flush(self) -> int:
        """Free all unreferenced cached pages and unpublish the rest for good. Returns how many pages were freed."""
        num_freed = self.tree.flush()
        if self.offload is not None:
            self.offload.flush()
        self._nodes = [None] * len(self._nodes)
        self._may_publish = [False] * len(self._may_publish)
        return num_freed

    def _take(self, num_pages: int) -> PageIds:
        short = num_pages - self.pool.num_free
        if short > 0:
            self.num_evicted_pages += self.tree.evict(short)
        return self.pool.allocate(num_pages)
