"""Further log-probabilities of consecutive positions: written in parts, in any order, packed as a range."""

from __future__ import annotations

import numpy as np

from headrace.scheduler.position_extras import PositionExtras
from headrace.types.plan import PositionLogprobs
from headrace.types.request import unpack_floats, unpack_ids
from headrace.types.sampling_params import LogprobOptions


def values_of(first: int, last: int, num_top: int, num_asked: int) -> PositionLogprobs:
    """Of positions first..last-1, each value naming its position and column."""
    rows = 100 * np.arange(first, last)[:, None]
    top, asked = rows + np.arange(num_top), rows + 50 + np.arange(num_asked)
    return PositionLogprobs(top.astype(np.int32), -top.astype(np.float32), -asked.astype(np.float32))


def test_any_range_is_what_was_written() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_top, num_asked = int(rng.integers(0, 4)), int(rng.integers(0, 3))
        extras = PositionExtras(LogprobOptions(num_top=num_top, token_ids=tuple(range(num_asked))))
        length = int(rng.integers(1, 300))
        edges = np.unique(np.concatenate(([0, length], rng.integers(0, length, 5)))).tolist()
        whole = values_of(0, length, num_top, num_asked)
        for first, last in rng.permutation(list(zip(edges, edges[1:], strict=False))).tolist():
            extras.write(first, whole, first, last)
        first, last = sorted(rng.integers(0, length + 1, 2).tolist())
        packed, expected = extras.pack(first, last), values_of(first, last, num_top, num_asked)
        assert unpack_ids(packed.top_ids).tolist() == expected.top_ids.ravel().tolist()
        assert unpack_floats(packed.top_logprobs).tolist() == expected.top_logprobs.ravel().tolist()
        assert unpack_floats(packed.asked_logprobs).tolist() == expected.asked_logprobs.ravel().tolist()


def test_what_was_never_written_is_zero() -> None:
    extras = PositionExtras(LogprobOptions(num_top=2))
    assert unpack_ids(extras.pack(0, 70).top_ids).tolist() == [0] * 140
