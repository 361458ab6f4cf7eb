"""Leases share published pages, keep their own, and give everything back once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.cache import LeaseTable, Namespace
from tests.cache.trees import num_pages

NOW = Namespace(0)
TOKENS: npt.NDArray[np.int32] = np.arange(20, dtype=np.int32)


def make_leases(*, num_pages: int = 20, prefix_cache: bool = True) -> LeaseTable:
    return LeaseTable(
        lambda _, first, last: TOKENS[first:last].tobytes(),
        num_slots=4,
        num_columns=10,
        num_pages=num_pages,
        page_size=2,
        prefix_cache=prefix_cache,
    )


def lease(leases: LeaseTable, slot: int, num_tokens: int) -> int:
    """Open a lease for that many tokens, as admission does; returns the pages it shares."""
    match = leases.match(NOW, TOKENS[:num_tokens].tobytes(), (num_tokens - 1) // 2)
    leases.open(slot, NOW, match)
    leases.grow(slot, -(-num_tokens // 2) - match.num_pages)
    return match.num_pages


def test_a_second_lease_shares_what_the_first_published() -> None:
    leases = make_leases()
    assert lease(leases, 0, 7) == 0
    leases.publish(0, 7)
    assert lease(leases, 1, 7) == 3
    assert leases.pages[0, :3].tolist() == leases.pages[1, :3].tolist()
    assert leases.pages[0, 3] != leases.pages[1, 3]
    assert leases.num_used == 5 and leases.num_pages[1] == 4 and leases.num_matched[1] == 3
    leases.close(0)
    assert leases.num_used == 4 and leases.tree.num_evictable == 0
    leases.close(1)
    assert leases.num_used == 0 and leases.num_available == 19 and leases.tree.num_evictable == 3


def test_growing_evicts_what_nobody_holds() -> None:
    leases = make_leases(num_pages=5)
    lease(leases, 0, 8)
    leases.publish(0, 8, is_last=True)
    leases.close(0)
    assert leases.pool.num_free == 0 and leases.num_available == 4
    leases.open(1, NOW, leases.match(NOW, TOKENS[:2].tobytes(), 1))
    assert leases.num_available == 3
    leases.grow(1, 2)
    assert leases.num_evicted_pages == 2 and leases.num_available == 1


def test_many_leases_grow_by_one_page_at_once() -> None:
    leases = make_leases()
    for slot in range(3):
        lease(leases, slot, 2 * slot + 1)
    columns, pages = leases.grow_each(np.array([2, 0]))
    assert columns.tolist() == [3, 1]
    assert [int(leases.pages[2, 3]), int(leases.pages[0, 1])] == pages.tolist()
    assert leases.num_pages.tolist() == [2, 2, 4, 0]


def test_a_page_published_by_another_stops_publishing_until_the_end() -> None:
    leases = make_leases()
    for slot in (0, 1):
        leases.open(slot, NOW, leases.match(NOW, b"", 0))
        leases.grow(slot, 4)
    leases.publish(0, 4)
    leases.publish(1, 6)
    leases.publish(1, 8)
    assert num_pages(leases.tree) == 2 and leases.num_used == 8
    leases.publish(1, 8, is_last=True)
    assert num_pages(leases.tree) == 4
    leases.close(1)
    assert leases.num_used == 4 and leases.tree.num_evictable == 2
    assert leases.match(NOW, TOKENS.tobytes(), 10).num_pages == 4
    leases.close(0)
    assert leases.num_used == 0


def test_kept_leases_are_never_published() -> None:
    leases = make_leases()
    lease(leases, 0, 8)
    leases.publish(0, 2)
    leases.never_publish(0)
    leases.publish(0, 4)
    leases.publish(0, 8, is_last=True)
    assert num_pages(leases.tree) == 1
    leases.close(0)
    assert leases.pool.num_free == 18
    lease(leases, 0, 8)
    leases.publish(0, 8, is_last=True)
    assert num_pages(leases.tree) == 4, "a new lease of the slot publishes again"


def test_flush_unpublishes_leased_pages_for_good() -> None:
    leases = make_leases()
    lease(leases, 0, 8)
    leases.publish(0, 8)
    lease(leases, 1, 8)
    leases.close(1)
    assert leases.flush() == 0
    leases.publish(0, 8, is_last=True)
    assert leases.match(NOW, TOKENS.tobytes(), 10).num_pages == 0 and leases.num_used == 4
    leases.close(0)
    assert leases.pool.num_free == 19


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    leases = make_leases(prefix_cache=False)
    for _ in range(2):
        assert lease(leases, 0, 8) == 0
        leases.publish(0, 8)
        leases.publish(0, 8, is_last=True)
        leases.close(0)
        assert leases.pool.num_free == 19 and num_pages(leases.tree) == 0
