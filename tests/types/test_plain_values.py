"""Names that are none, and which was meant."""

from __future__ import annotations

import pytest

from headrace.cluster.fleet_options import FleetOptions
from headrace.config import EngineConfig
from headrace.engine.requests import GenerateOptions
from headrace.types import plain_values
from headrace.types.errors import ConfigError
from headrace.types.plain_values import hint, meant_by
from headrace.types.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[("tp", "tp_size"), ("tensor_parallel_size", "tp_size"), ("max_model_len", "context_length")],
        *[("gpu_memory_utilization", "memory_fraction"), ("dtyp", "dtype"), ("nothing like it", "")],
        *[(7, ""), ("tp" * 100, "")],
    ],
)
def test_a_setting_is_found_by_what_others_call_it_and_by_its_spelling(name: object, meant: str) -> None:
    known = EngineConfig.__struct_fields__
    assert meant_by(name, known) == meant
    assert hint(name, known) == (f"; {meant} is" if meant else "")


def test_a_name_of_others_counts_only_where_ours_is_known() -> None:
    assert meant_by("tensor_parallel_size", SamplingParams.__struct_fields__) == ""
    assert meant_by("max_tokens", SamplingParams.__struct_fields__) == "max_new_tokens"
    with pytest.raises(ConfigError, match="^tp is not an engine setting; tp_size is$"):
        EngineConfig.from_dict({"model": "m", "tp": 2})


def test_what_others_names_mean_is_there() -> None:
    ours = {
        *FleetOptions.__struct_fields__,
        *EngineConfig.__struct_fields__,
        *SamplingParams.__struct_fields__,
        *GenerateOptions.__annotations__,
    }
    elsewhere = plain_values._NAMES_ELSEWHERE
    assert {each.removeprefix("no_") for each in elsewhere.values()} <= ours
    assert not ours & elsewhere.keys()
