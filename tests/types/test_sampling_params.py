"""Sampling parameters: defaults, spellings, and a field named in every refusal."""

import math
from typing import Any

import pytest

from headrace.types.errors import RequestError
from headrace.types.sampling_params import SamplingParams


def test_null_is_the_default_and_the_alias_is_the_seed() -> None:
    params = SamplingParams.from_dict({"temperature": None, "sampling_seed": 7, "stop": "x", "stop_token_ids": 3})
    assert params == SamplingParams(seed=7, stop=("x",), stop_token_ids=(3,))


def test_string_keys_of_a_logit_bias_are_token_ids() -> None:
    assert SamplingParams.from_dict({"logit_bias": {"5": -1.5}}).logit_bias == {5: -1.5}


def test_temperature_below_a_millionth_is_greedy() -> None:
    assert SamplingParams(temperature=9e-7).is_greedy
    assert not SamplingParams(temperature=1e-6).is_greedy


BAD: list[tuple[str, Any]] = [
    ("max_new_tokens", -1),
    ("max_new_tokens", 1 << 60),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", "8"),
    ("max_new_tokens", True),
    ("min_new_tokens", 129),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("temperature", "1"),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1 << 40),
    ("min_p", -1),
    ("repetition_penalty", 0),
    ("presence_penalty", 1e9),
    ("frequency_penalty", [1]),
    ("n", 0),
    ("n", 10**9),
    ("seed", -1),
    ("seed", 1 << 64),
    ("seed", 1.0),
    ("stop", 5.0),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", ["x"] * 65),
    ("stop", ["x" * 1025]),
    ("stop_token_ids", ["1"]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", list(range(1025))),
    ("stop_token_ids", {"a": 1}),
    ("ignore_eos", "yes"),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": math.nan}),
    ("logit_bias", {"1": -(10**400)}),
    ("logit_bias", [1]),
    ("logit_bias", {str(i): 0 for i in range(4097)}),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_dict({name: value})
    assert caught.value.field == f"sampling_params.{name}"


@pytest.mark.parametrize("values", [{"temprature": 1.0}, {"seed": 1, "sampling_seed": 1}])
def test_unknown_and_doubled_keys_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SamplingParams.from_dict(values)


@pytest.mark.parametrize("values", [[], "x", 3])
def test_not_an_object(values: Any) -> None:
    with pytest.raises(RequestError, match="must be an object"):
        SamplingParams.from_dict(values)
