"""An engine whose ranks are a trainer's processes: real ones over gloo, which live on whatever becomes of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from headrace import Engine
from tests.engine import rank_group_bodies as bodies
from tests.engine.builders import save_model
from tests.engine.test_closing import NUM_CYCLES
from tests.engine.test_ranks import GREEDY, outputs
from tests.rl.trainer_ranks import run_ranks, start_ranks

SECONDS = 240.0


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("new"), seed=1)


@pytest.mark.parametrize(
    ("num_ranks", "far", "groups", "settings"),
    [
        (2, False, ["mesh", "group"], {}),
        (2, True, ["group", "mesh"], {}),
        (4, False, ["world"], {"pp_size": 2}),
    ],
    ids=["two", "two machines", "two stages"],
)
def test_a_trainers_ranks_are_one_engine(
    model_folder: Path,
    new_folder: Path,
    engine: Engine,
    num_ranks: int,
    far: bool,
    groups: list[str],
    settings: dict[str, Any],
) -> None:
    given = str(model_folder), str(new_folder), num_ranks, far, groups, settings
    leading, *following = run_ranks(num_ranks, bodies.whole_life, *given, seconds=SECONDS)
    expected = [each.token_ids for each in outputs(engine, GREEDY)]
    for ids, digest, other, is_same, is_back in leading:
        assert ids == expected and digest == engine.digest() and other != digest and is_same and is_back
    for each in following:
        assert each == [[("RequestError", "rank_group", True)] * 7] * len(groups)


def lives(started: Any, ranks: set[int], which: int, how: int) -> dict[int, Any]:
    """What the ranks that are left come to."""
    try:
        return {rank: started.result(rank, SECONDS) for rank in ranks}
    finally:
        pid = started.processes[which].pid
        if how == bodies.STOP:
            os.kill(pid, signal.SIGKILL)
        started.end()


@pytest.mark.parametrize("how", [bodies.KILL, bodies.STOP], ids=["killed", "stopped"])
def test_a_rank_that_is_lost_is_named_and_harms_no_other_process(model_folder: Path, how: int) -> None:
    started = start_ranks(4, bodies.lost, str(model_folder), how, 2)
    kind, message, seconds = lives(started, {0, 1, 3}, 2, how)[0]
    assert kind == "DeviceLostError" and f"rank 2 (process {started.processes[2].pid} of the trainer" in message
    assert seconds < 20.0  # 5 s, on a machine of one's own


@pytest.mark.parametrize("how", [bodies.KILL, bodies.STOP], ids=["killed", "stopped"])
def test_rank_0_is_lost_and_the_others_live(model_folder: Path, how: int) -> None:
    started = start_ranks(2, bodies.leader_is_lost, str(model_folder), how)
    assert lives(started, {1}, 0, how) == {1: "lives"}


def test_a_rank_that_does_not_come_is_named_and_ranks_meet_however_often_one_has_called_before(
    model_folder: Path,
) -> None:
    seen = run_ranks(2, bodies.calls_in_vain, str(model_folder), seconds=SECONDS)
    for (*in_vain, last), missing in zip(seen, ([1], [0, 0, 1]), strict=True):
        assert last[0] == "no error"
        for (kind, field, message), rank in zip(in_vain, missing, strict=True):
            assert kind == "DeadlineError" and field == "start_timeout" and f"rank {rank} has not come" in message


def test_what_is_refused_is_refused_on_every_rank(model_folder: Path, new_folder: Path) -> None:
    """The next engine is none the worse for it."""
    leading, following = run_ranks(2, bodies.settings_of_one, str(model_folder), str(new_folder), seconds=SECONDS)
    fields = ["no_such", "no_such", "tp_size", "dtype", "nnodes", "weights", "rank_group", ""]
    for found in (leading, following):
        assert [field for _, field, _ in found] == fields
        assert [kind for kind, _, _ in found] == ["ConfigError"] * 7 + ["no error"]
    assert "process" in leading[1][2] and "of the trainer" in leading[3][2]


def test_what_fails_on_one_rank_alone_is_said_on_all_at_once(model_folder: Path) -> None:
    (led, led_after), (followed, after) = run_ranks(2, bodies.fails_alone, str(model_folder), seconds=SECONDS)
    assert followed[0] == "OSError" and after[0] == led_after[0] == "no error"
    assert led[0] == "InternalError" and "rank 1 failed: OSError: the disk is on fire" in led[2]


def test_every_rank_gives_its_engine_to_a_pusher(model_folder: Path, new_folder: Path) -> None:
    seen = run_ranks(2, bodies.pushes_its_own, str(model_folder), str(new_folder), seconds=SECONDS)
    assert seen == [(True, "pushed", True), (False, "pushed", True)]


@pytest.mark.parametrize("settings", [{}, {"pp_size": 2}], ids=["shares", "stages"])
def test_what_ranks_held_is_gone_when_shutdown_returns(model_folder: Path, settings: dict[str, Any]) -> None:
    for found in run_ranks(2, bodies.starts_and_ends, str(model_folder), NUM_CYCLES, settings, seconds=SECONDS):
        assert found == [found[0]] * len(found)
