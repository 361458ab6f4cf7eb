"""Pages are handed out once, held by count, and freed with the last reference."""

from __future__ import annotations

import random

import numpy as np
import pytest

from headrace.cache import PagePool


def test_page_zero_is_never_handed_out() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(4).tolist()) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_a_page_is_free_only_after_its_last_reference() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    assert pool.release(pages) == 1
    assert pool.num_free == 2
    assert pool.release(pages[:1]) == 1
    assert pool.num_free == 3 and not pool._references.any()


def test_our_own_mistakes_are_caught() -> None:
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(pages)


def test_random_holders_are_counted_exactly() -> None:
    random_ = random.Random(3)
    pool = PagePool(33)
    held: list[int] = []
    for _ in range(4000):
        if random_.random() < 0.4 and pool.num_free:
            held += pool.allocate(random_.randint(1, pool.num_free)).tolist()
        elif held and random_.random() < 0.3:
            page = random_.choice(held)
            pool.retain(np.array([page], dtype=np.int32))
            held.append(page)
        elif held:
            some = sorted(set(random_.sample(held, random_.randint(1, len(held)))))
            pool.release(np.array(some, dtype=np.int32))
            for page in some:
                held.remove(page)
        assert pool._references.tolist() == [held.count(page) for page in range(33)]
        assert sorted(pool._free[: pool.num_free].tolist()) == [page for page in range(1, 33) if page not in held]
