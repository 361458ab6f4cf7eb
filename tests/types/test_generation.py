"""A `Generation` as JSON."""

from __future__ import annotations

import json
import math

import pytest

from headrace import Generation, RequestError
from headrace.types.errors import ErrorInfo
from headrace.types.generation import Times

WHOLE = Generation(
    request_id="a",
    index=1,
    token_ids=[5, 7],
    text="é",
    logprobs=[-0.1, -1e-300],
    top_logprobs=[{5: -0.1, 9: -math.inf}, {}],
    prompt_logprobs=[None, -2.5, -math.inf],
    prompt_token_ids_logprobs=[None, {3: -1.5}],
    finish_reason="stop",
    matched=7,
    version_spans=[("step-1", 1), ("step-2", 1)],
    version_epochs=[1, 2],
    times=Times(1.0, 2.0, 3.0, 4.0),
    seed=(1 << 64) - 1,
)


def test_json_and_back() -> None:
    line = WHOLE.to_json()
    assert Generation.from_json(line) == Generation.from_json(line.decode()) == WHOLE
    assert Generation.from_json(line).times is not None and b"\n" not in line
    failed = Generation(request_id="b", token_ids=[], logprobs=[], error=ErrorInfo("RequestError", "no", "input_ids"))
    assert Generation.from_json(failed.to_json()) == failed


def test_it_is_json_for_others() -> None:
    """No number that JSON lacks: they are strings."""
    values = json.loads(WHOLE.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert values["prompt_logprobs"] == [None, -2.5, "-inf"] and values["top_logprobs"][0]["9"] == "-inf"
    assert values["version_spans"] == [["step-1", 1], ["step-2", 1]]
    assert Generation.from_json(json.dumps({**values, "of_a_later_version": 1})) == WHOLE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"request_id": 5}', "[" * 2000, b"\xff"], ids=range(6))
def test_what_is_no_generation_is_refused(text: str | bytes) -> None:
    with pytest.raises(RequestError, match="json is no generation") as caught:
        Generation.from_json(text)
    assert caught.value.field == "json"
