"""Ask 11: an abort is complete, idempotent and returns partials, in every state; KV goes back to where it was."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from headrace import Engine, Generation, SamplingParams

LONG = SamplingParams(max_new_tokens=400, ignore_eos=True)


class Call:
    """One generate call in a thread of its own."""

    def __init__(self, engine: Engine, request_id: str, prompt: list[int]) -> None:
        self.request_id = request_id
        self.piece: Generation | None = None
        self._engine = engine
        self._prompt = prompt
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        [self.piece] = self._engine.generate(input_ids=self._prompt, sampling_params=LONG, request_id=self.request_id)

    def answer(self, timeout: float) -> Generation:
        self._thread.join(timeout)
        assert self.piece is not None, f"{self.request_id} had no answer within {timeout} s"
        return self.piece


def wait_for(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the state to test was not reached"
        time.sleep(0.005)


def check_aborted(piece: Generation) -> None:
    assert piece.finish_reason == "abort"
    assert len(piece.token_ids) == len(piece.logprobs) == sum(count for _, count in piece.version_spans)


def let_steps_pass(engine: Engine, count: int) -> None:
    """Wait for so many, or until nothing runs."""
    target = engine.metrics()["num_steps"] + count
    wait_for(lambda: engine.metrics()["num_steps"] >= target or not engine.metrics()["num_running"])


def test_abort_at_random_moments_frees_everything(engine_on: Callable[..., Engine]) -> None:
    """Queued, prefilling, decoding, preempted: a small pool and few slots make all of them common."""
    engine = engine_on(max_running_requests=6, kv_pool_tokens=480, max_num_batched_tokens=32, prefix_cache=False)
    rng = random.Random(1)
    num_partial = num_empty = 0
    for round_number in range(3):
        prompts = [[rng.randrange(3, 90) for _ in range(rng.randint(1, 60))] for _ in range(24)]
        calls = [Call(engine, f"{round_number}-{i}", prompt) for i, prompt in enumerate(prompts)]
        rng.shuffle(calls)
        for call in calls:
            let_steps_pass(engine, rng.randrange(8))
            engine.abort(call.request_id)
            engine.abort(call.request_id)
        for call in calls:
            piece = call.answer(10.0)
            if piece.finish_reason == "abort":
                check_aborted(piece)
                num_partial += bool(piece.token_ids)
                num_empty += not piece.token_ids
    assert num_partial > 10 and num_empty > 3
    wait_for(lambda: engine.metrics()["num_used_tokens"] == 0)
    assert engine.metrics()["num_preemptions"] > 0
    assert engine.metrics()["num_free_pages"] == 480 / 4


def test_abort_while_paused_returns_the_tokens_so_far(engine_on: Callable[..., Engine]) -> None:
    engine = engine_on()
    call = Call(engine, "a", [5, 6, 7])
    wait_for(lambda: engine.metrics()["num_generated_tokens"] > 5)
    engine.pause(mode="keep")
    late = Call(engine, "b", [8, 9])
    wait_for(lambda: engine.metrics()["num_waiting"] == 1)
    engine.abort("a")
    engine.abort("b")
    check_aborted(call.answer(5.0))
    assert call.piece is not None and len(call.piece.token_ids) > 5
    check_aborted(late.answer(5.0))
    assert late.piece is not None and late.piece.token_ids == []
    engine.resume()
    assert engine.generate(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=2))[0].token_ids


def test_abort_of_what_is_finished_or_unknown_changes_nothing(engine_on: Callable[..., Engine]) -> None:
    engine = engine_on()
    [piece] = engine.generate(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=3), request_id="done")
    assert len(piece.token_ids) <= 3
    for name in ("done", "never"):
        engine.abort(name)
    assert engine.generate(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=3), request_id="done")
