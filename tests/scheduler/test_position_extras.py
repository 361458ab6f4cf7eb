"""What else is asked of consecutive positions: written in parts, in any order, packed as a range; and when it ends."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from headrace.scheduler.position_extras import PositionExtras
from headrace.types.plan import PositionLogprobs, StepPlan, StepResult
from headrace.types.request import unpack_floats, unpack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.scheduler.builders import answer, finish_all, make, planned, request


def values_of(first: int, last: int, num_top: int, num_asked: int) -> PositionLogprobs:
    """Of positions first..last-1, each value naming its position and column."""
    rows = 100 * np.arange(first, last)[:, None]
    top, asked = rows + np.arange(num_top), rows + 50 + np.arange(num_asked)
    counts = np.arange(first, last, dtype=np.int32) % 4  # some keep nothing
    kept = [100 * position + 70 + at for position in range(first, last) for at in range(position % 4)]
    values = top.astype(np.int32), -top.astype(np.float32), -asked.astype(np.float32)
    return PositionLogprobs(*values, np.array(kept, np.int32), counts)


def test_any_range_is_what_was_written() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_top, num_asked = int(rng.integers(0, 4)), int(rng.integers(0, 3))
        keeps = bool(rng.integers(0, 2))
        extras = PositionExtras(LogprobOptions(num_top=num_top, token_ids=tuple(range(num_asked))), keeps=keeps)
        length = int(rng.integers(1, 300))
        edges = np.unique(np.concatenate(([0, length], rng.integers(0, length, 5)))).tolist()
        whole = values_of(0, length, num_top, num_asked)
        for first, last in rng.permutation(list(zip(edges, edges[1:], strict=False))).tolist():
            extras.write(first, whole, first, last)
        assert extras.num_kept == (len(whole.kept_ids) if keeps else 0)
        extras.write(first, whole, first, last)
        assert extras.num_kept == (len(whole.kept_ids) if keeps else 0), "what is written again counts once"
        first, last = sorted(rng.integers(0, length + 1, 2).tolist())
        packed, expected = extras.pack(first, last), values_of(first, last, num_top, num_asked)
        assert unpack_ids(packed.top_ids).tolist() == expected.top_ids.ravel().tolist()
        assert unpack_floats(packed.top_logprobs).tolist() == expected.top_logprobs.ravel().tolist()
        assert unpack_floats(packed.asked_logprobs).tolist() == expected.asked_logprobs.ravel().tolist()
        assert unpack_ids(packed.kept_ids).tolist() == (expected.kept_ids.tolist() if keeps else [])
        assert unpack_ids(packed.kept_counts).tolist() == (expected.kept_counts.tolist() if keeps else [])


def test_what_was_never_written_is_zero() -> None:
    extras = PositionExtras(LogprobOptions(num_top=2))
    assert unpack_ids(extras.pack(0, 70).top_ids).tolist() == [0] * 140
    packed = PositionExtras(LogprobOptions(), keeps=True).pack(2, 5)
    assert (unpack_ids(packed.kept_counts).tolist(), packed.kept_ids) == ([0, 0, 0], b"")


def keeping(plan: StepPlan, counts: list[int]) -> StepResult:
    """The tokens of a plan, of which each could have been so many."""
    extras = {
        row: msgspec.structs.replace(
            values_of(0, 1, 0, 0), kept_ids=np.arange(count, dtype=np.int32), kept_counts=np.array([count], np.int32)
        )
        for row, count in enumerate(counts)
    }
    return msgspec.structs.replace(answer(plan), extras=extras)


@pytest.mark.parametrize("max_new", [2, 9], ids=["with its last token", "on the way"])
def test_a_request_that_could_have_been_too_much_ends_alone(max_new: int) -> None:
    scheduler = make()
    for handle, most in ((1, 6), (2, 5)):
        scheduler.add(request(handle, 5, max_new, logprobs=LogprobOptions(max_kept=most)), 0.0)
    assert scheduler.apply(keeping(planned(scheduler), [3, 3])) == []
    deltas = {delta.handle: delta for delta in scheduler.apply(keeping(planned(scheduler), [3, 3]))}
    finish = deltas[2].finish
    assert finish is not None and finish.error is not None and finish.type == "error"
    assert (finish.error.code, finish.error.field) == ("RequestError", "sampling_params.top_p")
    assert "more than 5" in finish.message
    assert unpack_ids(deltas[2].extras.kept_counts).tolist() == [3, 3]
    ended = [*deltas.values(), *finish_all(scheduler)]
    assert {delta.handle: delta.finish.type for delta in ended if delta.finish} == {1: "length", 2: "error"}
    assert (scheduler.metrics()["num_failed"], scheduler.metrics()["num_finished"]) == (1, 1)
    assert scheduler.metrics()["num_used_tokens"] == 0
