"""Sampling parameters: defaults, spellings, and a field named in every refusal."""

import itertools
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from headrace.types.errors import RequestError
from headrace.types.sampling_params import SamplingParams


def test_null_is_the_default_and_the_alias_is_the_seed() -> None:
    params = SamplingParams.from_dict({"temperature": None, "sampling_seed": 7, "stop": "x", "stop_token_ids": 3})
    assert params == SamplingParams(seed=7, stop=("x",), stop_token_ids=(3,))


def test_string_keys_of_a_logit_bias_are_token_ids() -> None:
    assert SamplingParams.from_dict({"logit_bias": {"5": -1.5}}).logit_bias == {5: -1.5}


GOOD: list[tuple[str, Any, Any]] = [
    *[("stop", given, ("x", "y")) for given in (["x", "y"], ("x", "y"), deque("xy"), np.array(["x", "y"]))],
    ("stop", "xy", ("xy",)),
    ("stop", None, ()),
    ("stop", [], ()),
    *[("stop_token_ids", given, (5, 6)) for given in ([5, 6], range(5, 7), np.array([5, 6]), torch.tensor([5, 6]))],
    *[("stop_token_ids", given, (5,)) for given in (5, np.int32(5), np.array(5), [np.int64(5)], {5}, torch.tensor(5))],
    ("stop_token_ids", None, ()),
    ("logit_bias", {"5": 1, "0": 2, "1000000000": 3}, {5: 1.0, 0: 2.0, 10**9: 3.0}),
    ("logit_bias", {np.int64(5): np.float32(0.5)}, {5: 0.5}),
    ("logit_bias", {}, {}),
    ("logit_bias", None, None),
    *[("n", given, 3) for given in (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3))],
    ("seed", np.uint64((1 << 64) - 1), (1 << 64) - 1),
    ("seed", None, None),
    ("max_new_tokens", np.int32(7), 7),
    ("max_new_tokens", None, 128),
    ("temperature", np.float32(0.7), float(np.float32(0.7))),
    ("temperature", torch.tensor(0.5), 0.5),
    ("temperature", 1, 1.0),
    ("temperature", np.int64(0), 0.0),
    ("top_p", np.float16(0.5), 0.5),
    ("ignore_eos", np.bool_(True), True),
    ("ignore_eos", torch.tensor(True), True),
]


@pytest.mark.parametrize(("name", "given", "kept"), GOOD, ids=range(len(GOOD)))
def test_plain_values_are_made_of_what_callers_have(name: str, given: Any, kept: Any) -> None:
    """In Python and in a dictionary alike."""
    for make in (SamplingParams.from_dict, lambda values: SamplingParams(**values)):
        found = getattr(make({name: given}), name)
        assert found == kept and type(found) is type(kept)
        parts = [*found, *getattr(found, "values", tuple)()] if isinstance(found, (tuple, dict)) else []
        assert {type(part) for part in parts} <= {int, float, str}


def test_iterators_are_read_to_their_end_or_bound() -> None:
    params = SamplingParams(stop=(stop for stop in "xy"), stop_token_ids=iter(range(3)))  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("x", "y"), (0, 1, 2))
    for name in ("stop", "stop_token_ids"):
        with pytest.raises(RequestError, match=f"{name} must hold at most"):
            SamplingParams.from_dict({name: itertools.repeat("1")})


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
    ("repetition_penalty", 1e-300),
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
    *[("logit_bias", {key: 1}) for key in ("1_0", "05", " 5 ", "+5", "-1", "", "5\n", "٥", "²", "0x5", "9" * 5000)],
    *[("logit_bias", {key: 1, "5": 2}) for key in (5, np.int64(5))],
    ("logit_bias", {"1": math.nan}),
    ("logit_bias", {"1": -(10**400)}),
    ("logit_bias", [1]),
    ("logit_bias", {str(i): 0 for i in range(4097)}),
    ("logit_bias", {5.0: 1}),
    ("logit_bias", {True: 1}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", "5"),
    ("max_new_tokens", 4.0),
    ("max_new_tokens", np.float64(4)),
    ("max_new_tokens", np.array([4])),
    ("max_new_tokens", np.bool_(True)),
    ("max_new_tokens", torch.tensor(True)),
    ("max_new_tokens", [4]),
    ("temperature", True),
    ("temperature", np.bool_(True)),
    ("temperature", np.array([0.5])),
    ("temperature", np.float32("nan")),
    ("temperature", 1j),
    ("temperature", b"1"),
    ("n", "3"),
    ("seed", np.int64(-1)),
    ("stop", ""),
    ("stop", b"x"),
    ("stop", {"x": 1}),
    ("stop", 5),
    ("stop", np.array("x")),
    ("stop_token_ids", "5"),
    ("stop_token_ids", [5.0]),
    ("stop_token_ids", True),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 5.0),
    ("ignore_eos", 1),
    ("ignore_eos", "true"),
    ("no_stop_trim", np.int64(1)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_dict({name: value})
    assert caught.value.field == f"sampling_params.{name}"
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name and caught.value.message.startswith(name)


@pytest.mark.parametrize("values", [{"temprature": 1.0}, {"seed": 1, "sampling_seed": 1}])
def test_unknown_and_doubled_keys_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SamplingParams.from_dict(values)


def test_a_name_nearly_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(RequestError, match="max_tokens is not a sampling parameter; max_new_tokens is"):
        SamplingParams.from_dict({"max_tokens": 4})
    with pytest.raises(RequestError, match="temprature is not a sampling parameter; temperature is"):
        SamplingParams.from_dict({"temprature": 1.0})
    with pytest.raises(RequestError, match="parameter$"):
        SamplingParams.from_dict({"zzz": 1.0})


@pytest.mark.parametrize("values", [[], "x", 3])
def test_not_an_object(values: Any) -> None:
    with pytest.raises(RequestError, match="must be an object"):
        SamplingParams.from_dict(values)
