"""What came of a step, from rank to rank: as bytes it is what it was, and as a number it differs in every part."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from headrace.core.rank_results import ResultOn, digest_of, encode_result, result_decoder
from headrace.types.plan import PositionLogprobs, PromptLogprobs, StepResult


def extras() -> PositionLogprobs:
    floats = np.array([[-1.0, -2.5]], np.float32)
    return PositionLogprobs(
        top_ids=np.array([[3, 4]], np.int32),
        top_logprobs=floats,
        asked_logprobs=floats[:, :1],
        kept_ids=np.array([3, 4, 9], np.int32),
        kept_counts=np.array([3], np.int32),
    )


def result(extra: PositionLogprobs) -> StepResult:
    return StepResult(
        step_id=7,
        token_ids=np.array([[5], [6]], np.int32),
        logprobs=np.array([[-0.5], [-np.inf]], np.float32),
        num_tokens=np.array([1, 1], np.int32),
        extras={1: extra},
        prompt_logprobs={0: PromptLogprobs(2, np.array([-3.0], np.float32))},
    )


def test_bytes_are_what_they_were() -> None:
    given = result(extras())
    found = result_decoder.decode(encode_result(ResultOn.of(4, given))).taken()
    assert found is not None and found.step_id == 7 and digest_of(found) == digest_of(given)
    for name in PositionLogprobs.__struct_fields__:
        one, other = getattr(found.extras[1], name), getattr(given.extras[1], name)
        assert (one.dtype, one.shape, one.tolist()) == (other.dtype, other.shape, other.tolist())
    assert found.prompt_logprobs[0].logprobs.tolist() == [-3.0]


@pytest.mark.parametrize("name", PositionLogprobs.__struct_fields__)
def test_ranks_that_differ_in_anything_are_told_apart(name: str) -> None:
    changed = getattr(extras(), name).copy()
    changed.flat[0] += 1
    other = msgspec.structs.replace(extras(), **{name: changed})
    assert digest_of(result(other)) != digest_of(result(extras()))
