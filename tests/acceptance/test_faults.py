"""Ask 14: one request, or one broken check, cannot kill the engine, and costs nobody else a token."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headrace import Engine, Generation, InternalError, SamplingParams
from headrace.runner.runner import Runner, RunnerStep
from headrace.scheduler.planner import StepPlanner
from headrace.text import ToolCall, ToolCallParser, ToolCallStyle
from headrace.types.plan import StepPlan

POISON = 95
DEPTHS = pytest.mark.parametrize("overlap_depth", [0, 1, 3])
EngineOn = Callable[..., Engine]


class Faults:
    """Makes the runner's steps fail: for a poisoned prompt from a position on, and at random."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.failure_rate = 0.0
        self.fatal_position: int | None = None
        self.num_failures = 0
        self._prompts: dict[int, list[int]] = {}

    def strike(self, plan: StepPlan) -> None:
        for init in plan.new_slots:
            self._prompts[init.slot] = init.token_ids[: init.num_prompt_tokens].tolist()
        ends = (plan.row_starts + plan.row_lengths).tolist()
        for slot, end in zip(plan.row_slots.tolist(), ends, strict=True):
            if self.fatal_position is not None and end > self.fatal_position and POISON in self._prompts[slot]:
                self.num_failures += 1
                raise ValueError("a poisoned prompt")
        if self.random.random() < self.failure_rate:
            self.num_failures += 1
            raise MemoryError("no room at this moment")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Off until a test switches one of them on. A step fails before its plan is looked at, or after it was executed."""
    found = Faults()
    launch = Runner.launch

    def faulty(runner: Runner, plan: StepPlan) -> RunnerStep:
        if plan.step_id % 2:
            found.strike(plan)
            return launch(runner, plan)
        step = launch(runner, plan)
        found.strike(plan)
        return step

    monkeypatch.setattr(Runner, "launch", faulty)
    return found


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Some share a prefix of pages, some are longer than a step."""
    rng = random.Random(seed)
    stem = [rng.randrange(3, 90) for _ in range(12)]
    found = [[rng.randrange(3, 90) for _ in range(rng.choice((1, 5, 30, 60)))] for _ in range(count)]
    return [stem + prompt if index % 3 == 0 else prompt for index, prompt in enumerate(found)]


def params(count: int) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=6 + 5 * (index % 5), seed=index, ignore_eos=True) for index in range(count)]


def values(pieces: list[Generation]) -> list[tuple[list[int], list[float], list[float]]]:
    return [(piece.token_ids, piece.logprobs, [x for x in piece.prompt_logprobs if x is not None]) for piece in pieces]


def settings(overlap_depth: int) -> dict[str, Any]:
    return {
        "overlap_depth": overlap_depth,
        "numerics": "invariant",
        "kv_pool_tokens": 1024,
        "max_running_requests": 6,
        "max_num_batched_tokens": 48,
    }


def check_baseline(engine: Engine) -> None:
    """Everything has come back, and the engine serves."""
    metrics = engine.metrics()
    assert metrics["num_used_tokens"] == metrics["num_running"] == metrics["num_waiting"] == 0
    engine.flush_cache()
    assert engine.metrics()["num_free_pages"] == 1024 / 4
    assert engine.is_ready and engine.generate(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=2))


@DEPTHS
def test_failures_at_random_steps_change_no_token(engine_on: EngineOn, faults: Faults, overlap_depth: int) -> None:
    engine = engine_on(**settings(overlap_depth))

    def generate() -> list[Generation]:
        return engine.generate(input_ids=prompts(16), sampling_params=params(16), return_prompt_logprobs=True)

    expected = values(generate())
    engine.flush_cache()
    faults.failure_rate = 0.12
    found = values(generate())
    faults.failure_rate = 0.0
    assert found == expected
    metrics = engine.metrics()
    assert faults.num_failures >= 5 and metrics["num_isolated_failures"] == 0
    assert 0 < metrics["num_failed_steps"] <= faults.num_failures
    check_baseline(engine)


def generate_apart(engine: Engine, crowd: list[list[int]]) -> list[list[int] | InternalError]:
    """Each prompt in a call of its own, all at once; tokens or the error of each."""

    def call(prompt: list[int], each: SamplingParams) -> list[int] | InternalError:
        try:
            return engine.generate(input_ids=prompt, sampling_params=each)[0].token_ids
        except InternalError as error:
            return error

    with ThreadPoolExecutor(len(crowd)) as pool:
        return list(pool.map(call, crowd, params(len(crowd))))


@pytest.mark.parametrize(("overlap_depth", "fatal_position"), [(0, 25), (1, 0), (3, 25), (3, 0)])
def test_only_the_guilty_request_fails(
    engine_on: EngineOn, faults: Faults, overlap_depth: int, fatal_position: int
) -> None:
    engine = engine_on(**settings(overlap_depth))
    crowd = [[POISON] * 24, *prompts(12)]
    expected = generate_apart(engine, crowd)
    engine.flush_cache()
    faults.fatal_position = fatal_position
    guilty, *innocent = generate_apart(engine, crowd)
    metrics = engine.metrics()
    assert isinstance(guilty, InternalError) and "a poisoned prompt" in guilty.message
    assert innocent == expected[1:]
    assert metrics["num_isolated_failures"] == 1 and 3 <= metrics["num_failed_steps"] <= 12
    faults.fatal_position = None
    check_baseline(engine)


def test_several_guilty_are_found_in_a_crowd(engine_on: EngineOn, faults: Faults) -> None:
    engine = engine_on(**settings(1))
    guilty = {2, 7, 8}
    crowd = [[*prompt, POISON] if index in guilty else prompt for index, prompt in enumerate(prompts(14))]
    expected = generate_apart(engine, crowd)
    engine.flush_cache()
    faults.fatal_position = 0
    found = generate_apart(engine, crowd)
    assert {index for index, outcome in enumerate(found) if isinstance(outcome, InternalError)} == guilty
    assert all(found[index] == expected[index] for index in range(14) if index not in guilty)
    faults.fatal_position = None
    check_baseline(engine)


@DEPTHS
def test_a_broken_invariant_is_reported_and_survived(
    engine_on: EngineOn, monkeypatch: pytest.MonkeyPatch, overlap_depth: int
) -> None:
    engine = engine_on(**settings(overlap_depth))
    expected = values(engine.generate(input_ids=prompts(10), sampling_params=params(10)))
    engine.flush_cache()
    real, countdown = StepPlanner._add_chunk, iter([*[False] * 7, True, *[False] * 5, True, True])

    def broken(planner: StepPlanner, *args: object) -> None:
        real(planner, *args)  # type: ignore[arg-type]
        assert not next(countdown, False), "pages do not add up"

    monkeypatch.setattr(StepPlanner, "_add_chunk", broken)
    assert values(engine.generate(input_ids=prompts(10), sampling_params=params(10))) == expected
    assert engine.metrics()["num_invariant_breaches"] == 3
    check_baseline(engine)


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_no_text_that_looks_like_a_tool_call_is_an_error(style: ToolCallStyle) -> None:
    """Whole calls are mutilated at random; what is no call any more is shown as it was written."""
    rng = random.Random(3)
    call = '{"name": "add", "%s": {"a": [1, 2.5e3], "b": "\\u00e9 {}\\"", "c": null}}'
    whole = f"<tool_call>\n{call % 'arguments'}\n</tool_call>" if style == "hermes" else call % "parameters"
    num_calls = num_texts = 0
    for _ in range(3000):
        text = list(whole)
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            at = rng.randrange(len(text))
            text[at : at + rng.choice((0, 1, 1, 5))] = rng.choice(
                ('"', "{", "}", "\\", "\ud800", "\x00", "<", "9" * 400)
            )
        written = "".join(text)
        parser = ToolCallParser(style, frozenset({"add"}))
        shown, calls = "", list[ToolCall]()
        while text:
            size = rng.randint(1, 40)
            more, found = parser.push("".join(text[:size]))
            text, shown, calls = text[size:], shown + more, calls + found
        more, found = parser.finish()
        shown, calls = shown + more, calls + found
        num_calls, num_texts = num_calls + len(calls), num_texts + (not calls)
        assert calls or shown == written
    assert num_calls > 300 and num_texts > 300
