"""Pages of published prefixes on their way to the host's memory and back. Owns what is copied, and when it counts.

What leases let go is copied to the host, once, while it is still in the tree: evicting it costs nothing then. A prefix
that goes on in the host's memory is brought back into pages of the pool, and published when it is there. Copies are
part of a step's plan and run beside it; `land` is told of its result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.cache.host_tier import HostTier
from headrace.cache.page_pool import PageIds, PagePool
from headrace.cache.radix_tree import Match, Namespace, Node, RadixTree

Moves = npt.NDArray[np.int32]
_SAVE, _LOAD = 0, 1


class PageSave(NamedTuple):
    """Pages of a pinned node that go to the host."""

    node: Node
    digests: list[bytes]
    pages: list[int]
    host_pages: list[int]


class PageLoad(NamedTuple):
    """Pages that are filled from the host; `units` are theirs, below a pinned node (None: a namespace's root)."""

    namespace: Namespace
    below: Node | None
    units: bytes
    pages: PageIds
    host_pages: list[int]


class StepMoves(NamedTuple):
    """What is copied beside one step."""

    saves: list[PageSave]
    loads: list[PageLoad]
    num_flushes: int

    def as_array(self) -> Moves:
        """As `StepPlan.page_moves`."""
        found = [(_SAVE, *pair) for save in self.saves for pair in zip(save.pages, save.host_pages, strict=True)]
        for load in self.loads:
            found += [(_LOAD, *pair) for pair in zip(load.pages.tolist(), load.host_pages, strict=True)]
        return np.array(found, np.int32).reshape(-1, 3)


class Offload:
    """The way between a tree and the host, `max_moves` pages a step each way."""

    def __init__(self, tree: RadixTree, pool: PagePool, num_host_pages: int, max_moves: int) -> None:
        self.tier = HostTier(num_host_pages)
        self.num_saved = 0
        self.num_loaded = 0
        self._tree = tree
        self._pool = pool
        self._max_moves = max_moves
        self._num_loading = 0
        self._num_flushes = 0
        self._step = StepMoves([], [], 0)
        tree.notes_idle = True

    @property
    def is_loading(self) -> bool:
        """Some pages are on their way back."""
        return self._num_loading > 0

    def begin_step(self) -> None:
        """Choose what is saved beside the next step. Before that publishes anything: its own pages are not written."""
        self._step = StepMoves([], [], self._num_flushes)
        room = self._max_moves
        while room > 0 and (node := self._tree.next_idle()) is not None:
            save = self._save(node, room)
            room -= len(save.pages)
            if save.pages:
                self._tree.pin(node)
                self._step.saves.append(save)

    def find(self, namespace: Namespace, units: bytes, match: Match, max_pages: int) -> list[int]:
        """The host pages that go on where `match` ends, as many as one step may load of at most `max_pages` in all."""
        most = min(max_pages - match.num_pages, self._max_moves)
        if most <= 0 or not self.tier.num_held:
            return []
        return self.tier.find(self._tree.digests_after(namespace, units, match, most))

    def begin_load(self, load: PageLoad) -> None:
        """Have it copied beside the step that is being planned. The pages are the load's until then."""
        self._step.loads.append(load)
        self.tier.begin_load(load.host_pages)
        self._num_loading += 1

    def end_step(self) -> StepMoves | None:
        """What is copied beside the step that has been planned; None: nothing."""
        step, self._step = self._step, StepMoves([], [], 0)
        return step if step.saves or step.loads else None

    def land(self, moves: StepMoves) -> None:
        """The copies are there."""
        is_flushed = moves.num_flushes != self._num_flushes
        for save in moves.saves:
            for digest, page in zip(save.digests, save.host_pages, strict=True):
                self.tier.end_save(digest, page)
            self.tier.touch(save.digests)
            self.num_saved += len(save.pages)
            if not is_flushed:
                self._tree.unpin(save.node, notes_idle=False)
        for load in moves.loads:
            self.tier.end_load(load.host_pages)
            self.num_loaded += len(load.pages)
            self._num_loading -= 1
            if not is_flushed:
                self._tree.insert(load.namespace, load.units, load.pages, below=load.below)
                if load.below is not None:
                    self._tree.unpin(load.below, notes_idle=False)
            self._pool.release(load.pages)

    def flush(self) -> None:
        """The tree is empty, and its pins are void: find nothing any more here either."""
        self.tier.clear()
        self._num_flushes += 1

    def _save(self, node: Node, room: int) -> PageSave:
        """Those pages of an edge that the host lacks and has room for; where `room` ends before them, the edge comes
        again, before any other could take that from it."""
        save, digests = PageSave(node, [], [], []), self._tree.page_digests(node)
        own = set(digests)
        self.tier.touch(digests)
        for digest, page in zip(digests, node.pages.tolist(), strict=True):
            if self.tier.has(digest):
                continue
            if len(save.pages) == room:
                self._tree.note_idle(node, is_first=True)
                break
            host_page = self.tier.begin_save(digest, beside=own)
            if host_page is None:
                break
            save.digests.append(digest)
            save.pages.append(page)
            save.host_pages.append(host_page)
        return save
