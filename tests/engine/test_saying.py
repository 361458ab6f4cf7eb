"""What an engine says about itself while it starts, works and takes weights: on a terminal and in the log."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Engine, Generation, RequestError
from headrace.engine.core_host import load_tokenizer
from headrace.engine.lookback import Lookback
from headrace.engine.update_log import note_update
from headrace.engine.work_log import INTERVAL_SECONDS, WorkLog
from headrace.telemetry import LogContext, configure_logging
from headrace.types.messages import CoreStatus
from headrace.types.weights import UpdateReport
from tests.engine.builders import VOCAB_SIZE, model_of, named_tensors, save_model
from tests.telemetry.terminal import terminal


def test_a_start_and_many_prompts_show_how_far_they_are(
    start: Callable[..., Engine], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal() as screen:

        def tokenizer_once_seen(*given: Any) -> Any:
            """A start that lasts until what the core has told is drawn."""
            screen.wait_for(f"{model_folder.name}: weights [")
            return load_tokenizer(*given)

        monkeypatch.setattr("headrace.engine.starting.load_tokenizer", tokenizer_once_seen)
        engine = start()
        params = {"max_new_tokens": 8, "temperature": 0.0}
        expected = engine.generate(input_ids=[[5, 6]] * 6, sampling_params=params, progress=False)
        engine.generate(input_ids=[5, 6], sampling_params=params)  # a single one
        assert "generating" not in screen.text
        engine.slow_down(0.05)
        found = engine.generate(input_ids=[[5, 6]] * 6, sampling_params=params)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        screen.wait_for("/6  ")
        assert any(line.startswith("generating [") for line in screen.lines)
        assert "headrace-progress" not in [thread.name for thread in threading.enumerate()]
        with pytest.raises(RequestError) as caught:
            engine.generate(input_ids=[5], progress="yes")  # type: ignore[arg-type]
        assert caught.value.field == "progress"


def test_an_engine_without_progress_draws_nothing(start: Callable[..., Engine]) -> None:
    with terminal() as screen:
        start(progress=False).generate(input_ids=[[5, 6]] * 6, sampling_params={"max_new_tokens": 4})
        assert screen.text == ""


def test_a_sample_says_when_it_was_queued_started_and_ended(start: Callable[..., Engine]) -> None:
    engine, before = start(progress=False, max_running_requests=1), time.time()
    params = {"max_new_tokens": 8, "ignore_eos": True, "seed": 3}
    first, second = engine.generate(input_ids=[[5, 6]] * 2, sampling_params=params)
    assert first.times is not None and second.times is not None
    for times in (first.times, second.times):
        assert before - 0.1 <= times.queued <= times.started <= times.first_token <= times.ended <= time.time() + 0.1
    assert second.times.started >= first.times.first_token  # there was one slot
    pieces = list(engine.stream(input_ids=[5, 6], sampling_params=params))
    assert [piece.times for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].times is not None and pieces[-1].times.first_token < pieces[-1].times.ended
    (stopped,) = engine.generate(input_ids=[5, 6], sampling_params={**params, "stop": [first.text[1]]})
    assert stopped.times is not None and stopped.times.first_token > 0  # the front ended it
    scored = engine.score(input_ids=[[5, 6, 7]])[0].times
    assert scored is not None and scored.started > 0 and scored.first_token == 0.0
    bad, _ = engine.generate(input_ids=[[VOCAB_SIZE], [5]], sampling_params=params, return_errors=True)
    assert bad.times is not None and (bad.times.started, bad.times.first_token) == (0.0, 0.0)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=Generation)
    assert again == first and msgspec.to_builtins(again.times) == msgspec.to_builtins(first.times)
    assert msgspec.structs.replace(first, times=second.times) == first  # when it came is no part of what it is


def status(running: int = 0, prompt: int = 0, cached: int = 0, generated: int = 0, **more: Any) -> CoreStatus:
    metrics = {"num_prompt_tokens": prompt, "num_cached_tokens": cached, "num_generated_tokens": generated}
    given = {"state": "ready", "version": "step-3", "epoch": 1, "paused": "", "updating": False, "num_waiting": 0}
    sizes = {"num_used_tokens": 250, "max_total_num_tokens": 1000, "num_running": running, "metrics": metrics}
    return CoreStatus(**{**given, **sizes, **more})


def test_a_line_is_written_every_few_seconds_of_work_and_none_while_idle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")
    log = WorkLog()
    for second in range(100):
        log.note(status(), float(second))
    assert caplog.messages == []
    for second in range(100, 100 + int(INTERVAL_SECONDS) + 1):
        log.note(status(2, prompt=1000, cached=250, generated=10 * (second - 99)), float(second))
    (line,) = caplog.messages
    assert (
        line == "2 running, 0 waiting, 200 tokens/s in, 10 out, 25% of prompts cached, 25% of KV used, weights step-3"
    )
    log.note(status(prompt=1000, cached=250, generated=90), 200.0)  # what was done since is said once more
    assert len(caplog.messages) == 2 and "0 running" in caplog.messages[1]
    log.note(status(prompt=1000, cached=250, generated=90), 300.0)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(("state", "num_lines"), [({}, 1), ({"paused": "keep"}, 0), ({"released": ("kv_cache",)}, 0)])
def test_requests_that_get_nowhere_are_work_unless_they_are_held(
    state: dict[str, Any], num_lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headrace")
    log = WorkLog()
    for second in range(8):
        log.note(status(2, **state), float(second))
    assert len(caplog.messages) == num_lines


def test_another_core_begins_to_count_anew(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")
    log = WorkLog()
    log.note(status(1, prompt=1000, generated=500), 0.0)
    log.note(status(1, prompt=2000, generated=20), 50.0)
    assert caplog.messages == []
    log.note(status(1, prompt=2000, generated=120), 60.0)
    assert ", 0 tokens/s in, 10 out," in caplog.messages[0]


def test_an_engine_tells_of_its_work(
    start: Callable[..., Engine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.engine.work_log.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("headrace.engine.client.WATCH_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "headrace")
    start().generate(input_ids=[[5, 6, 7]] * 4, sampling_params={"max_new_tokens": 64, "ignore_eos": True})
    deadline = time.monotonic() + 30
    while not any(line.endswith("weights default") and "tokens/s in" in line for line in caplog.messages):
        assert time.monotonic() < deadline, caplog.messages
        time.sleep(0.01)


def update_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if " are live: " in line]


def test_each_update_is_one_line_that_names_its_road(
    start: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, tensors = start(), named_tensors(model_of(1))
    caplog.set_level(logging.INFO, "headrace")
    report = engine.update_weights_from_tensor(tensors, "step-1", in_flight="abort")
    (line,) = update_lines(caplog)
    assert line.startswith(f"weights step-1 are live: {report.num_tensors} tensors, ")
    assert f" MB by shared memory, {report.mode}, in " in line and line.endswith(" ms without a step")
    session = engine.begin_update("step-2", None)
    engine.stage(session, tensors)
    engine.commit(session)
    engine.update_weights_from_bucket(tensors, "step-3")
    engine.update_weights_from_disk(save_model(tmp_path / "new", seed=2), "step-4")
    lines = update_lines(caplog)
    assert [line.split()[1] for line in lines] == ["step-1", "step-2", "step-3", "step-4"]
    assert " MB by a folder, " in lines[3]
    with pytest.raises(Exception, match="nobody"):
        engine.update_weights_from_tensor({"nobody": tensors[0][1]}, "step-5")
    assert len(update_lines(caplog)) == 4


def test_json_lines_have_what_the_words_say_as_fields() -> None:
    stream = StringIO()
    for as_json in (True, False):
        configure_logging(LogContext(), as_json=as_json, stream=stream)
        note_update(UpdateReport("7", 3, 10, 1_500_000_000, "shadow", 2.5, 4), {"HTTP"}, 1.25, Lookback())
    as_fields, plain = stream.getvalue().splitlines()
    said = "weights 7 are live: 10 tensors, 1.50 GB by HTTP, shadow, in 1250 ms, of which 2.5 ms without a step"
    assert plain.endswith(f"{said}, 4 requests aborted")
    found = json.loads(as_fields)
    assert found["message"] in plain
    assert (found["version"], found["num_bytes"], found["road"], found["ms"]) == ("7", 1_500_000_000, "HTTP", 1250.0)
