"""Which prefixes the host's memory holds pages of. Owns the host's page ids; must not know the tree, nor who copies.

A page is known by a digest of its namespace and of all units up to its end (`RadixTree.page_digests`), so that a page
is found without those before it: a chain of digests, by which vLLM's prefix cache goes as well. The least recently used
ones make room for others, but for those that are being copied from, and those kept for a sequence that comes back; of
one prefix the last page goes first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile


class HostTier:
    """Host pages 0..num_pages-1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._kept: dict[bytes, int] = {}  # held, and kept by somebody
        self._keepers: Counter[bytes] = Counter()
        self._coming: dict[bytes, int] = {}
        self._readers: Counter[int] = Counter()
        self._forgotten: set[int] = set()  # pages that a copy in flight still holds

    @property
    def num_held(self) -> int:
        """Pages that can be found."""
        return len(self._held) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that are kept, or will be once they are here."""
        return len(self._keepers)

    def has(self, digest: bytes) -> bool:
        """Whether that page is here, or on its way."""
        return self._is_here(digest) or digest in self._coming

    def keep(self, digests: Iterable[bytes]) -> None:
        """Let none of these make room for others, once it is here, until it is dropped as often as kept."""
        for digest in digests:
            self._keepers[digest] += 1
            if digest in self._held:
                self._kept[digest] = self._held.pop(digest)

    def drop(self, digests: Sequence[bytes]) -> None:
        """Undo one `keep` of these, of one prefix and in its order."""
        for digest in reversed(digests):
            self._keepers[digest] -= 1
            if self._keepers[digest]:
                continue
            del self._keepers[digest]
            if digest in self._kept:
                self._held[digest] = self._kept.pop(digest)

    def begin_save(self, digest: bytes, beside: Collection[bytes]) -> int | None:
        """A host page to copy that page to; None where only pages of `beside` could make room for it."""
        page = self._free.pop() if self._free else self._evict(beside)
        if page is not None:
            self._coming[digest] = page
        return page

    def end_save(self, digest: bytes, page: int) -> None:
        """The copy is there."""
        if page in self._forgotten:
            self._give_up(page)
        else:
            pages = self._kept if digest in self._keepers else self._held
            pages[digest] = self._coming.pop(digest)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The host pages of the first of these, up to one that is not here."""
        found = list(takewhile(self._is_here, digests))
        self.touch(found)
        return [self._kept[digest] if digest in self._kept else self._held[digest] for digest in found]

    def touch(self, digests: Sequence[bytes]) -> None:
        """These, of one prefix and in its order, are used now."""
        for digest in reversed(digests):
            if digest in self._held:
                self._held.move_to_end(digest)

    def begin_load(self, pages: Iterable[int]) -> None:
        """Keep these, of `find`, until `end_load`."""
        self._readers.update(pages)

    def end_load(self, pages: Iterable[int]) -> None:
        """They have been copied."""
        for page in pages:
            self._readers[page] -= 1
            if not self._readers[page]:
                del self._readers[page]
                if page in self._forgotten:
                    self._give_up(page)

    def clear(self) -> None:
        """Find nothing any more. What copies in flight hold is free when they end."""
        for page in (*self._held.values(), *self._kept.values()):
            if page in self._readers:
                self._forgotten.add(page)
            else:
                self._free.append(page)
        self._forgotten.update(self._coming.values())
        self._held.clear()
        self._kept.clear()
        self._coming.clear()

    def _is_here(self, digest: bytes) -> bool:
        return digest in self._held or digest in self._kept

    def _evict(self, but: Collection[bytes]) -> int | None:
        for digest, page in self._held.items():
            if digest in but:  # it is in use, and so are all after it
                return None
            if page not in self._readers:
                del self._held[digest]
                return page
        return None

    def _give_up(self, page: int) -> None:
        self._forgotten.discard(page)
        self._free.append(page)
