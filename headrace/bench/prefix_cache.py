"""`headrace bench prefix-cache`: what matching and publishing a finished sequence costs the prefix cache, per page.

Every sequence is matched, the rest of its pages are taken from the pool, and the whole is published, as the scheduler
does; nothing is evicted, so the tree only grows. Half of the sequences start with one of 1,000 prompts of half their
length (groups and turns), the other half share nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from headrace.cache import Namespace, PagePool, RadixTree

_NUM_SHARED_PROMPTS = 1000
_NAMESPACE = Namespace(0)


class PrefixCacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How much to match and insert."""

    num_sequences: int = 100_000
    num_tokens: int = 1000
    page_size: int = 16


def run(options: PrefixCacheOptions, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Match and insert `num_sequences` sequences of `num_tokens` tokens; returns microseconds per page."""
    num_sequences, num_tokens, page_size = msgspec.structs.astuple(options)
    num_pages = num_tokens // page_size
    pool = PagePool(num_sequences * num_pages + 1)
    tree = RadixTree(pool, page_size)
    source = np.random.default_rng(0)
    prompts = source.integers(0, 150_000, (_NUM_SHARED_PROMPTS, num_tokens // 2), dtype=np.int32)
    match_seconds = insert_seconds = 0.0
    num_matched = 0
    for index in range(num_sequences):
        if index % 1000 == 0:
            on_progress(f"{index} of {num_sequences} sequences")
        tokens = source.integers(0, 150_000, num_pages * page_size, dtype=np.int32)
        if index % 2:
            tokens[: num_tokens // 2] = prompts[source.integers(_NUM_SHARED_PROMPTS)]
        units = tokens.tobytes()
        start = time.perf_counter()
        match = tree.match(_NAMESPACE, units, num_pages)
        matched = time.perf_counter()
        fresh = pool.allocate(num_pages - match.num_pages)
        tree.insert(_NAMESPACE, units, np.concatenate([match.page_ids(), fresh]))
        pool.release(fresh)
        insert_seconds += time.perf_counter() - matched
        match_seconds += matched - start
        num_matched += match.num_pages
    total = num_sequences * num_pages
    return {
        "bench": "prefix-cache",
        "num_sequences": num_sequences,
        "num_tokens": num_tokens,
        "page_size": page_size,
        "num_pages": total,
        "hit_rate": round(num_matched / total, 4),
        "match_microseconds_per_page": round(1e6 * match_seconds / total, 4),
        "insert_microseconds_per_page": round(1e6 * insert_seconds / total, 4),
        "microseconds_per_page": round(1e6 * (match_seconds + insert_seconds) / total, 4),
        "microseconds_per_sequence": round(1e6 * (match_seconds + insert_seconds) / num_sequences, 2),
    }
