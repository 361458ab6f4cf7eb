"""Steps that are slowed down or traced, and that nothing stands around them otherwise."""

from __future__ import annotations

import gc
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from headrace.types.messages import FreezeGc, Profile, SlowDown
from headrace.types.profile import ProfileTerms
from tests.core.harness import Core, request


def stands(core: Core) -> tuple[bool, bool]:
    """Whether somebody stands before a step, and behind it."""
    stepper = core.loop.replica.stepper
    return stepper.submit != core.executor.submit, stepper.collect != core.executor.collect


def generate(core: Core, handle: int, num_tokens: int = 6) -> list[int]:
    core.submit(request(handle, max_new_tokens=num_tokens))
    core.settle()
    return core.tokens(handle)


def test_steps_are_slowed_down_until_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("headrace.core.probing.time.sleep", slept.append)
    core = Core()
    tokens = generate(core, 1)
    assert stands(core) == (False, False) and not slept
    core.call(SlowDown, 0.25)
    assert generate(core, 2) == tokens and slept == [0.25] * 6
    core.call(SlowDown, 0.0)
    assert generate(core, 3) == tokens and len(slept) == 6 and stands(core) == (False, False)


def events(path: str) -> list[Any]:
    with gzip.open(path) as file:
        found: list[Any] = json.load(file)["traceEvents"]
        return found


def test_a_trace_is_of_what_came_between(tmp_path: Path) -> None:
    core = Core()
    assert core.refused(Profile, None).code == "UpdateConflictError", "nothing to stop"
    path = core.call(Profile, ProfileTerms(str(tmp_path / "new"), "mine"), kind=str)
    assert path == str(tmp_path / "new" / "mine-TP-0.trace.json.gz") and not Path(path).exists()
    assert stands(core) == (False, False)
    assert core.refused(Profile, ProfileTerms()).code == "UpdateConflictError", "one at a time"
    generate(core, 1)
    assert core.call(Profile, None, kind=str) == path and events(path)
    assert core.call(Profile, None, kind=str) == path, "a stop may be repeated"
    again = core.refused(Profile, ProfileTerms(str(tmp_path / "new"), "mine"))
    assert (again.code, again.field) == ("RequestError", "profile_id"), "no trace is written over another"


def test_a_trace_of_some_steps_ends_by_itself(tmp_path: Path) -> None:
    core = Core()
    path = core.call(Profile, ProfileTerms(str(tmp_path), num_steps=3), kind=str)
    assert stands(core) == (False, True)
    generate(core, 1, num_tokens=2)
    assert not Path(path).exists()
    generate(core, 2, num_tokens=4)
    assert events(path) and stands(core) == (False, False)
    assert core.call(Profile, None, kind=str) == path
    other = core.call(Profile, ProfileTerms(str(tmp_path)), kind=str)
    assert other != path
    assert core.call(Profile, None, kind=str) == other


def test_a_trace_that_cannot_be_written_ends_no_step(tmp_path: Path) -> None:
    core = Core()
    folder = tmp_path / "gone"
    core.call(Profile, ProfileTerms(str(folder), num_steps=1), kind=str)
    folder.rmdir()
    assert len(generate(core, 1)) == 6
    assert core.refused(Profile, None).code == "UnavailableError"
    taken = tmp_path / "file"
    taken.write_text("")
    assert core.refused(Profile, ProfileTerms(str(taken / "x"))).field == "output_dir"
    assert core.refused(Profile, ProfileTerms(activities=("GPU",))).field == "activities"


def test_a_core_that_ends_traces_no_more(tmp_path: Path) -> None:
    first, second = Core(), Core()
    first.call(Profile, ProfileTerms(str(tmp_path)), kind=str)
    assert second.refused(Profile, ProfileTerms(str(tmp_path))).code == "UnavailableError", "one in a process"
    first.loop.replica.probes.close()
    second.call(Profile, ProfileTerms(str(tmp_path)), kind=str)
    assert events(second.call(Profile, None, kind=str)) is not None


def test_what_is_frozen_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    kept = [[number] for number in range(1000)]
    Core().call(FreezeGc)
    assert gc.get_freeze_count() >= before + len(kept)
