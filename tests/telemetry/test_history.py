"""What is kept of an engine's past: bounded, numbered, and never told twice."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.telemetry import History, HistoryPoint, SampleNote, UpdateNote, sum_of
from headrace.telemetry.history import MAX_POINTS, MAX_SAMPLES, MAX_UPDATES


def sample(request_id: str, index: int = 0, **more: Any) -> SampleNote:
    facts: dict[str, Any] = {"time": 1.0, "finish": "stop", "seconds": 0.5, "num_prompt_tokens": 3, "num_tokens": 4}
    return SampleNote(request_id=request_id, index=index, **{**facts, **more})


def update(version: str) -> UpdateNote:
    facts: dict[str, Any] = {"epoch": 1, "num_tensors": 2, "num_bytes": 8, "mode": "shadow", "road": "a folder"}
    return UpdateNote(time=1.0, seconds=0.1, version=version, pause_ms=0.5, **facts)


def test_who_looks_again_gets_what_is_new() -> None:
    history = History()
    history.note_point(HistoryPoint(time=1.0, version="a"))
    history.note_update(update("b"))
    history.note_sample(sample("x"))
    first = history.since(0)
    assert (first.points["version"], [each.version for each in first.updates]) == (["a"], ["b"])
    assert [each.request_id for each in first.samples] == ["x"]
    again = history.since(first.last)
    assert (again.points["time"], again.updates, again.samples, again.last) == ([], [], [], first.last)
    history.note_point(HistoryPoint(time=2.0))
    history.note_sample(sample("y"))
    news = history.since(first.last)
    assert (news.points["time"], [each.request_id for each in news.samples]) == ([2.0], ["y"])
    assert len(history.since(news.last + 1).points["time"]) == 2, "a number of another history's"
    assert History().source != history.source == news.source


def test_nothing_grows_for_ever() -> None:
    history = History()
    for number in range(5 * MAX_POINTS):
        history.note_point(HistoryPoint(time=float(number)))
        history.note_update(update(str(number)))
        history.note_sample(sample(str(number)))
    part = history.since(0)
    assert len(part.points["time"]) <= MAX_POINTS
    assert (len(part.updates), len(part.samples)) == (MAX_UPDATES, MAX_SAMPLES)
    assert part.samples[-1].request_id == part.updates[-1].version == str(5 * MAX_POINTS - 1)


def test_points_reach_back_to_the_start_and_are_fine_at_the_end() -> None:
    history = History()
    times = [float(number) for number in range(4 * MAX_POINTS)]
    for time in times:
        history.note_point(HistoryPoint(time=time))
    kept = history.since(0).points["time"]
    assert kept[0] == 0.0 and kept == sorted(set(kept))
    assert kept[-MAX_POINTS // 4 :] == times[-MAX_POINTS // 4 :]
    assert max(after - before for before, after in zip(kept, kept[1:], strict=False)) <= 64


def test_rewards_find_their_samples() -> None:
    history = History()
    for index in range(3):
        history.note_sample(sample("group", index))
    history.note_sample(sample("one"))
    seen = history.since(0).last
    assert history.note_rewards({"group": [1.0, None, -1.0], "one": 0.5, "gone": [2.0, 2.0]}) == 3
    assert (history.num_rewards, history.reward_total) == (5, 4.5)
    news = history.since(seen).samples
    assert [(each.request_id, each.index, each.reward) for each in news] == [
        ("group", 0, 1.0),
        ("group", 2, -1.0),
        ("one", 0, 0.5),
    ]
    history.note_sample(sample("one"))
    assert history.since(0).samples[-1].reward is None, "another one of the same name"


def test_several_are_shown_as_one() -> None:
    first = HistoryPoint(time=1.0, state="ready", version="a", num_running=2, num_generated_tokens=10.0)
    second = HistoryPoint(time=2.0, state="ready", version="b", num_running=3, num_generated_tokens=5.0)
    found = sum_of([first, second], 3.0)
    assert (found.time, found.state, found.version) == (3.0, "ready", "a, b")
    assert (found.num_running, found.num_generated_tokens) == (5, 15.0)


@pytest.mark.parametrize("given", [1, 1.5, [1.5], (1,)])
def test_a_reward_is_a_number_or_a_list(given: Any) -> None:
    history = History()
    history.note_sample(sample("x"))
    assert history.note_rewards({"x": given}) == 1
    assert history.since(0).samples[0].reward == (given if isinstance(given, (int, float)) else given[0])
