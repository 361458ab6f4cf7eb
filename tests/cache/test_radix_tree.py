"""The tree against a model that keeps every published prefix in a plain dictionary."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from headrace.cache import Namespace, PagePool, RadixTree
from headrace.cache.radix_tree import MAX_EDGE_PAGES, Node
from tests.cache.trees import nodes, num_pages

NOW, OLD = Namespace(1), Namespace(0)


def units(*token_ids: int) -> bytes:
    return np.array(token_ids, dtype=np.int32).tobytes()


def published(tree: RadixTree, pool: PagePool, namespace: Namespace, *token_ids: int) -> Node:
    """Publish tokens on fresh pages that only the tree holds from then on; the page size is 2."""
    pages = pool.allocate(len(token_ids) // 2)
    node, _ = tree.insert(namespace, units(*token_ids), pages)
    pool.release(pages)
    return node


def num_matched(tree: RadixTree, namespace: Namespace, *token_ids: int) -> int:
    return tree.match(namespace, units(*token_ids), 100).num_pages


def test_matches_whole_pages_up_to_the_limit() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, 1, 2, 3, 4, 5, 6)
    assert num_matched(tree, NOW, 1, 2, 3, 4, 5, 6, 7) == 3
    assert num_matched(tree, NOW, 1, 2, 3, 4, 5) == 2
    assert num_matched(tree, NOW, 1, 2, 3, 9) == 1
    assert num_matched(tree, NOW, 2, 1) == 0
    assert tree.match(NOW, units(1, 2, 3, 4, 5, 6), 2).num_pages == 2
    assert tree.match(NOW, units(1, 2, 3, 4), 2).page_ids().tolist() == [1, 2]


def test_namespaces_never_match_each_other() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    own = Namespace(1, (7, 2), "a")
    published(tree, pool, own, 1, 2)
    others = [own._replace(epoch=epoch) for epoch in (0, 2)] + [own._replace(extra_key=key) for key in ("", "b")]
    others += [own._replace(adapter=adapter) for adapter in (None, (7, 1), (8, 2), (2, 7))]
    for other in others:
        assert num_matched(tree, other, 1, 2) == 0
    assert num_matched(tree, Namespace(1, (7, 2), "a"), 1, 2) == 1


def test_units_published_already_keep_their_pages() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, 1, 2, 3, 4)
    again = pool.allocate(3)
    _, count = tree.insert(NOW, units(1, 2, 3, 4, 5, 6), again)
    assert count == 3
    assert tree.match(NOW, units(1, 2, 3, 4, 5, 6), 3).page_ids().tolist() == [1, 2, int(again[2])]
    assert pool.release(again) == 2


def test_insert_can_stop_before_units_published_already() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    root = published(tree, pool, NOW, 1, 2)
    published(tree, pool, NOW, 1, 2, 3, 4)
    node, count = tree.insert(NOW, units(3, 4, 7, 8), pool.allocate(2), below=root, through=False)
    assert node is root and count == 0 and num_pages(tree) == 2


def test_evicts_least_recently_used_leaves_first() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    first = published(tree, pool, NOW, 1, 2, 3, 4)
    published(tree, pool, NOW, 5, 6)
    tree.pin(first)
    tree.unpin(first)
    assert tree.evict(1) == 1
    assert num_matched(tree, NOW, 5, 6) == 0 and num_matched(tree, NOW, 1, 2, 3, 4) == 2
    assert tree.evict(1) == 1
    assert num_matched(tree, NOW, 1, 2, 3, 4) == 1
    assert tree.evict(5) == 1 and tree.num_evictable == num_pages(tree) == 0
    assert pool.num_free == 19


def test_evicts_old_epochs_before_anything_current() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, 1, 2)
    old = published(tree, pool, OLD, 1, 2, 3, 4)
    tree.pin(old)
    tree.unpin(old)
    assert tree.evict(2) == 2
    assert num_matched(tree, OLD, 1, 2) == 0 and num_matched(tree, NOW, 1, 2) == 1


def test_a_parent_is_evicted_only_after_its_children() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, 1, 2)
    published(tree, pool, NOW, 5, 6)
    leaf = published(tree, pool, NOW, 1, 2, 3, 4)
    tree.pin(leaf)
    published(tree, pool, NOW, 7, 8)
    tree.unpin(leaf)
    left = []
    for _ in range(4):
        tree.evict(1)
        left.append([num_matched(tree, NOW, *key) for key in ((1, 2, 3, 4), (5, 6), (7, 8))])
    assert left == [[2, 0, 1], [2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_pinned_prefixes_survive_and_are_not_counted() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, 1, 2, 3, 4, 5, 6)
    match = tree.match(NOW, units(1, 2, 3, 4), 2)
    assert match.num_unpinned == 2
    node = tree.pin_match(match)
    assert tree.num_evictable == 1 and tree.match(NOW, units(1, 2, 3, 4), 2).num_unpinned == 0
    assert tree.evict(10) == 1
    assert num_matched(tree, NOW, 1, 2, 3, 4, 5, 6) == 2
    tree.unpin(node)
    assert tree.num_evictable == 2 and tree.evict(10) == 2


def test_flush_frees_what_nothing_else_holds() -> None:
    pool = PagePool(20)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, 1, 2, 3, 4)
    held = tree.match(NOW, units(1, 2), 1).page_ids()
    pool.retain(held)
    assert tree.flush() == 1
    assert num_matched(tree, NOW, 1, 2) == 0 and num_pages(tree) == tree.num_evictable == 0
    assert pool.release(held) == 1 and pool.num_free == 19


def test_long_prefixes_are_cut_into_short_edges() -> None:
    count = 3 * MAX_EDGE_PAGES + 5
    pool = PagePool(count + 1)
    tree = RadixTree(pool, 2)
    published(tree, pool, NOW, *range(2 * count))
    assert max(len(node.pages) for node in nodes(tree)) == MAX_EDGE_PAGES
    assert num_matched(tree, NOW, *range(2 * count)) == 100
    assert tree.match(NOW, units(*range(2 * count)), count).num_pages == count
    assert tree.evict(count) == count


def test_use_without_eviction_does_not_grow_the_heap() -> None:
    pool = PagePool(200)
    tree = RadixTree(pool, 2)
    nodes = [published(tree, pool, NOW, index, index) for index in range(50)]
    for _ in range(20):
        for node in nodes:
            tree.pin(node)
            tree.unpin(node)
    assert len(tree._heap) <= len(nodes)
    for _ in range(50):
        tree.evict(1)
    assert not tree._heap and not tree._roots


UNIT_PAIRS = ((0, 1), (-1, 1), (-(1 << 31), 0), ((1 << 31) - 1, -(1 << 31)), (0x01010101, 0x01010100))
"""Token ids, and words of a digest: units of any value, those that differ in one byte only among them."""


class Model:
    """Every published prefix by (namespace, tokens), with its page and the leases that hold it."""

    def __init__(self) -> None:
        self.pages: dict[tuple[Namespace, tuple[int, ...]], int] = {}

    def match(self, namespace: Namespace, token_ids: list[int], size: int) -> list[int]:
        found = []
        for end in range(size, len(token_ids) + 1, size):
            page = self.pages.get((namespace, tuple(token_ids[:end])))
            if page is None:
                break
            found.append(page)
        return found


def drop_evicted(model: Model, tree: RadixTree) -> None:
    """Forget the pages the tree let go."""
    left = {page for node in nodes(tree) for page in node.pages.tolist()}
    model.pages = {key: page for key, page in model.pages.items() if page in left}


def check_eviction(model: Model, tree: RadixTree, pinned: dict[Node, list[int]]) -> None:
    """What is left is closed under prefixes, holds all pinned pages, and nothing older than what went."""
    prefixes = {(namespace, key) for namespace, key in model.pages}
    size = min((len(key) for _, key in prefixes), default=1)
    assert all(len(key) == size or (namespace, key[:-size]) in prefixes for namespace, key in prefixes)
    left = set(model.pages.values())
    assert all(set(pages) <= left for pages in pinned.values())


def random_tokens(random_: random.Random) -> list[int]:
    return [random_.randrange(2) for _ in range(random_.randint(0, 14))]


def test_random_use_agrees_with_the_model() -> None:
    for seed in range(120):
        random_ = random.Random(seed)
        size = random_.choice((1, 2, 3))
        values = random_.choice(UNIT_PAIRS)
        pool = PagePool(40)
        tree, model = RadixTree(pool, size), Model()
        pinned: dict[Node, list[int]] = {}
        for _ in range(60):
            play_event(random_, size, values, pool, tree, model, pinned)
            assert num_pages(tree) == len(model.pages)
            held = {page for pages in pinned.values() for page in pages}
            assert tree.num_evictable == len(set(model.pages.values()) - held)
            assert (tree.num_pages, tree.num_nodes) == (num_pages(tree), len(nodes(tree)))
            assert pool.num_free == 39 - len(model.pages)
        for node in pinned:
            tree.unpin(node)
        tree.evict(40)
        assert pool.num_free == 39 and not tree._roots


def play_event(
    random_: random.Random,
    size: int,
    values: tuple[int, int],
    pool: PagePool,
    tree: RadixTree,
    model: Model,
    pinned: dict[Node, list[int]],
) -> None:
    namespace = Namespace(random_.randrange(2), None, random_.choice(("", "x")))
    token_ids = [values[unit] for unit in random_tokens(random_)]
    expected = model.match(namespace, token_ids, size)
    match = tree.match(namespace, units(*token_ids), 100)
    assert match.page_ids().tolist() == expected and match.num_pages == len(expected)
    event = random_.random()
    whole = len(token_ids) // size
    if event < 0.4 and 0 < whole <= pool.num_free:
        insert(token_ids[: whole * size], namespace, size, pool, tree, model)
    elif event < 0.6 and expected:
        node = tree.pin_match(match)
        if node in pinned:
            tree.unpin(node)
        pinned[node] = expected
    elif event < 0.8 and pinned:
        node = random_.choice(list(pinned))
        del pinned[node]
        tree.unpin(node)
    elif event < 0.95:
        evict(random_.randint(1, 6), tree, model, pinned)


def insert(
    token_ids: list[int], namespace: Namespace, size: int, pool: PagePool, tree: RadixTree, model: Model
) -> None:
    pages: npt.NDArray[np.int32] = pool.allocate(len(token_ids) // size)
    _, count = tree.insert(namespace, units(*token_ids), pages)
    assert count == len(pages)
    for index, page in enumerate(pages.tolist()):
        model.pages.setdefault((namespace, tuple(token_ids[: (index + 1) * size])), page)
    pool.release(pages)


def evict(count: int, tree: RadixTree, model: Model, pinned: dict[Node, list[int]]) -> None:
    before = dict(model.pages)
    evictable = tree.num_evictable
    assert tree.evict(count) == min(count, evictable)
    drop_evicted(model, tree)
    check_eviction(model, tree, pinned)
    held = {page for pages in pinned.values() for page in pages}
    gone = {key for key in before if key not in model.pages}
    if any(namespace.epoch == 1 for namespace, _ in gone):
        assert all(namespace.epoch == 1 or page in held for (namespace, _), page in model.pages.items())
