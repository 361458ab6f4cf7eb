"""The worker for older code, with verl's own `DataProto` and a config of OmegaConf's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from headrace.rl.demo import POLICY
from headrace.rl.verl_worker import HeadraceRolloutWorker
from tests.rl.test_verl_worker import (
    ROLLOUT,
    model,
    test_log_probs_are_those_that_were_drawn_with,
    test_rows_come_back_with_their_responses,
    test_what_ends_early_is_padded,
    test_what_is_wrong_is_named,
    worker,
)

__all__ = [
    "model",
    "test_log_probs_are_those_that_were_drawn_with",
    "test_rows_come_back_with_their_responses",
    "test_what_ends_early_is_padded",
    "test_what_is_wrong_is_named",
    "worker",
]

with warnings.catch_warnings(action="ignore"):  # verl's own
    from omegaconf import OmegaConf
    from verl import DataProto

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def proto() -> Any:
    return DataProto


def test_a_config_of_omegaconf_is_read_with_its_references() -> None:
    rollout = {**ROLLOUT, "response_length": "${length}"}
    config = OmegaConf.create({"length": 6, "model": {"path": str(POLICY)}, "rollout": rollout})
    assert HeadraceRolloutWorker(config)._launch.response_length == 6
