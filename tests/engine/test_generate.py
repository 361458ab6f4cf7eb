"""Generation end to end on a real model, in process."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import AsyncEngine, DeadlineError, Engine, Generation, RequestError, SamplingParams, ShutdownError
from headrace.engine import GenerateItem, GenerateOptions, bounds, fields, pacing
from headrace.engine.seeds import sample_seed
from headrace.text.encoding import INLINE_CHARACTERS
from headrace.types.sampling_params import LogprobMode
from tests.engine.builders import EOS_ID, LETTERS, SETTINGS, VOCAB_SIZE, model_of, reference_logprobs
from tests.in_pieces import in_pieces

PROMPT = [10, 20, 30, 40, 50]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True, seed=1)
LETTERS_40 = SamplingParams(max_new_tokens=40, seed=3, logit_bias=LETTERS)


def one(found: list[Generation]) -> Generation:
    [generation] = found
    return generation


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.005)


def test_greedy_tokens_and_logprobs_are_the_model_s(engine: Engine) -> None:
    found = one(engine.generate(input_ids=PROMPT, sampling_params=GREEDY))
    expected = reference_logprobs(model_of(0), PROMPT + found.token_ids)[len(PROMPT) - 1 : -1]
    assert found.token_ids == expected.argmax(-1).tolist()
    assert np.allclose(found.logprobs, expected.max(-1), atol=1e-4)
    assert (found.finish_reason, found.version_spans) == ("length", [("default", 16)])
    assert (found.num_prompt_tokens, found.logprob_mode, found.prompt_logprob_mode) == (5, "temperature", "raw")


def test_score_is_the_model_s_logprob_of_the_prompt(engine: Engine) -> None:
    ids = list(range(5, 60, 3))
    expected = reference_logprobs(model_of(0), ids)
    found = one(engine.score(input_ids=ids, top_logprobs=3, logprob_token_ids=[7, 9], logprob_start=2))
    assert found.token_ids == [] and found.finish_reason == "length"
    assert found.prompt_logprobs[:2] == [None, None] and len(found.prompt_logprobs) == len(ids)
    for position in range(2, len(ids)):
        row = expected[position - 1]
        value = found.prompt_logprobs[position]
        top, asked = found.prompt_top_logprobs[position], found.prompt_token_ids_logprobs[position]
        assert value is not None and top is not None and asked is not None
        assert abs(value - row[ids[position]]) < 1e-4
        assert list(top) == np.argsort(-row)[:3].tolist()
        assert np.allclose([asked[7], asked[9]], row[[7, 9]], atol=1e-4)


def test_score_of_texts_and_in_another_mode(engine: Engine) -> None:
    texts = ["hello", "worlds apart"]
    params = {"temperature": 0.5}
    found = engine.score(texts, sampling_params=params, prompt_logprob_mode="temperature")
    for text, generation in zip(texts, found, strict=True):
        ids = list(text.encode())
        expected = reference_logprobs(model_of(0), ids, temperature=0.5)
        picked = [expected[i - 1][ids[i]] for i in range(1, len(ids))]
        assert generation.prompt_logprob_mode == "temperature"
        assert generation.prompt_logprobs[1:] == pytest.approx(picked, abs=1e-4)


def test_generated_tokens_with_top_and_asked_logprobs(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=6, seed=4, temperature=0.7, ignore_eos=True)
    modes: list[tuple[LogprobMode, float]] = [("raw", 1.0), ("temperature", 0.7)]
    for mode, temperature in modes:
        asked: GenerateOptions = {"logprob_mode": mode, "top_logprobs": 2, "logprob_token_ids": [3]}
        found = one(engine.generate(input_ids=PROMPT, sampling_params=params, **asked))
        assert found.logprob_mode == mode
        expected = reference_logprobs(model_of(0), PROMPT + found.token_ids, temperature)[len(PROMPT) - 1 :]
        for position, token in enumerate(found.token_ids):
            row = expected[position]
            assert abs(found.logprobs[position] - row[token]) < 1e-4
            assert list(found.top_logprobs[position]) == np.argsort(-row)[:2].tolist()
            assert abs(found.token_ids_logprobs[position][3] - row[3]) < 1e-4


def test_the_tokens_that_each_one_could_have_been(engine: Engine) -> None:
    """The least that hold top_p of the mass; with mode "sampled" log-probabilities are over these; streamed, too."""
    params = SamplingParams(max_new_tokens=6, seed=4, temperature=0.7, top_p=0.6, ignore_eos=True)
    asked: GenerateOptions = {"return_kept_token_ids": True, "logprob_mode": "sampled"}
    found = one(engine.generate(input_ids=PROMPT, sampling_params=params, **asked))
    expected = np.exp(reference_logprobs(model_of(0), PROMPT + found.token_ids, 0.7)[len(PROMPT) - 1 : -1])
    assert len(found.kept_token_ids) == 6
    for row, token, logprob, kept in zip(expected, found.token_ids, found.logprobs, found.kept_token_ids, strict=True):
        least = np.sort(row[kept])[0]
        assert token in kept and kept == np.flatnonzero(row >= least).tolist()
        assert row[kept].sum() >= 0.6 > row[row > least].sum()
        assert logprob == pytest.approx(np.log(row[token] / row[kept].sum()), abs=1e-4)
    pieces = in_pieces(lambda: list(engine.stream(input_ids=PROMPT, sampling_params=params, **asked)))
    assert sum((piece.kept_token_ids for piece in pieces), []) == found.kept_token_ids
    greedy = one(engine.generate(input_ids=PROMPT, sampling_params=GREEDY, return_kept_token_ids=True))
    assert greedy.kept_token_ids == [[token] for token in greedy.token_ids]


def test_tokens_that_could_have_been_are_bounded_for_all_samples_of_a_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=8, top_k=3, seed=1, n=2, ignore_eos=True)
    monkeypatch.setattr(bounds, "MAX_CALL_KEPT_IDS", 2 * 8 * 3)
    found = engine.generate(input_ids=PROMPT, sampling_params=params, return_kept_token_ids=True)
    assert [list(map(len, each.kept_token_ids)) for each in found] == [[3] * 8] * 2
    monkeypatch.setattr(bounds, "MAX_CALL_KEPT_IDS", 2 * 8 * 3 - 1)
    with pytest.raises(RequestError, match="more than 23") as caught:
        engine.generate(input_ids=PROMPT, sampling_params=params, return_kept_token_ids=True)
    assert caught.value.field == "sampling_params.top_p"


def test_a_seed_gives_one_sample_wherever_it_stands(engine: Engine, start: Callable[..., Engine]) -> None:
    """Across calls, batch positions and mates, n, streams, and engines."""
    params = SamplingParams(max_new_tokens=24, seed=99, ignore_eos=True)
    alone = one(engine.generate(input_ids=PROMPT, sampling_params=params))
    assert alone.seed == 99
    mates = [[i + 1] * (3 * i + 1) for i in range(6)]
    batch = engine.generate(input_ids=[*mates, PROMPT, PROMPT], sampling_params=params)
    several = engine.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 24, "seed": 99, "n": 4, "ignore_eos": True}
    )
    fresh = one(start(prefix_cache=False, overlap_depth=1).generate(input_ids=PROMPT, sampling_params=params))
    for again in (batch[6], batch[7], several[0], fresh):
        assert again.token_ids == alone.token_ids
        assert np.allclose(again.logprobs, alone.logprobs, atol=1e-5)
    assert [each.seed for each in several] == [sample_seed(99, index) for index in range(4)]
    assert len({tuple(each.token_ids) for each in several}) == 4
    for each in several:
        replay = one(
            engine.generate(
                input_ids=PROMPT, sampling_params=SamplingParams(max_new_tokens=24, seed=each.seed, ignore_eos=True)
            )
        )
        assert replay.token_ids == each.token_ids


def test_engines_without_a_seed_draw_different_samples_that_their_seeds_repeat(start: Callable[..., Engine]) -> None:
    params = {"max_new_tokens": 24, "ignore_eos": True}

    def samples(seed: int | None) -> tuple[list[list[int]], int]:
        engine = start(seed=seed)
        return [each.token_ids for each in engine.generate(input_ids=[PROMPT] * 3, sampling_params=params)], (
            engine.resolved.engine.seed
        )

    (first, seed), (second, other), (again, _) = samples(None), samples(None), samples(None)
    assert seed != other and not any(one in second or one in again for one in first)
    assert samples(seed) == (first, seed)


def test_requests_without_a_seed_differ_and_can_be_replayed(engine: Engine) -> None:
    params = {"max_new_tokens": 12, "ignore_eos": True}
    first, second = engine.generate(input_ids=[PROMPT, PROMPT], sampling_params=params)
    assert first.seed != second.seed and first.token_ids != second.token_ids
    replay = one(engine.generate(input_ids=PROMPT, sampling_params={**params, "seed": second.seed}))
    assert replay.token_ids == second.token_ids


def test_results_are_prompt_major(engine: Engine) -> None:
    params = [{"max_new_tokens": 2, "n": 2}, {"max_new_tokens": 3, "n": 1}]
    found = engine.generate(["a", "bb"], sampling_params=params, request_id=["x", "y"])
    assert [(g.request_id, g.prompt_index, g.index, len(g.token_ids)) for g in found] == [
        ("x", 0, 0, 2),
        ("x", 0, 1, 2),
        ("y", 1, 0, 3),
    ]
    assert [g.num_prompt_tokens for g in found] == [1, 1, 2]


def test_a_stop_string_cuts_the_sample_it_would_have_been(engine: Engine) -> None:
    whole = one(engine.generate(input_ids=PROMPT, sampling_params=LETTERS_40))
    assert len(whole.text) == 40 and whole.text.isalpha()
    stop = whole.text[9:12]
    end = whole.text.index(stop) + 3
    params = {"max_new_tokens": 40, "seed": 3, "logit_bias": LETTERS, "stop": [stop, "~~~"]}
    cut = one(engine.generate(input_ids=PROMPT, sampling_params=params))
    assert cut.token_ids == whole.token_ids[:end] and cut.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-5)
    assert (cut.text, cut.finish_reason, cut.matched) == (whole.text[: end - 3], "stop", stop)
    assert cut.version_spans == [("default", end)]
    kept = one(engine.generate(input_ids=PROMPT, sampling_params={**params, "no_stop_trim": True}))
    assert kept.text == whole.text[:end]
    pieces = list(engine.stream(input_ids=PROMPT, sampling_params=params))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert [token for piece in pieces for token in piece.token_ids] == cut.token_ids
    wait_for(lambda: engine.metrics()["num_used_tokens"] == 0)


def test_a_stop_token_ends_with_itself(engine: Engine) -> None:
    whole = one(engine.generate(input_ids=PROMPT, sampling_params=LETTERS_40))
    token = whole.token_ids[7]
    end = whole.token_ids.index(token) + 1
    params = {"max_new_tokens": 40, "seed": 3, "logit_bias": LETTERS, "stop_token_ids": [token]}
    cut = one(engine.generate(input_ids=PROMPT, sampling_params=params))
    assert (cut.token_ids, cut.matched, cut.finish_reason) == (whole.token_ids[:end], token, "stop")
    assert cut.text == whole.text[: end - 1]
    late = one(engine.generate(input_ids=PROMPT, sampling_params={**params, "min_new_tokens": end + 2}))
    assert len(late.token_ids) >= end + 2 and token not in late.token_ids[: end + 1]


def test_end_of_sequence_stops_unless_ignored(engine: Engine) -> None:
    params = {"max_new_tokens": 8, "logit_bias": {EOS_ID: 1000.0}}
    stopped = one(engine.generate("a", sampling_params=params))
    assert (stopped.token_ids, stopped.text, stopped.matched) == ([EOS_ID], "", EOS_ID)
    assert one(engine.generate("a", sampling_params={**params, "ignore_eos": True})).token_ids == [EOS_ID] * 8


def test_streams_join_to_what_generate_returns(engine: Engine) -> None:
    params = [{"max_new_tokens": 20, "seed": i, "n": 2, "ignore_eos": True} for i in range(4)]
    prompts = [[i + 1, i + 2, i + 3] for i in range(4)]
    whole = engine.generate(input_ids=prompts, sampling_params=params, top_logprobs=1)

    def stream() -> dict[tuple[int, int], list[Generation]]:
        found: dict[tuple[int, int], list[Generation]] = {}
        for piece in engine.stream(input_ids=prompts, sampling_params=params, top_logprobs=1):
            found.setdefault((piece.prompt_index, piece.index), []).append(piece)
        return found

    pieces = in_pieces(stream, pieces=lambda found: min(found.values(), key=len))
    for generation in whole:
        mine = pieces[generation.prompt_index, generation.index]
        assert [token for piece in mine for token in piece.token_ids] == generation.token_ids
        assert [value for piece in mine for value in piece.logprobs] == pytest.approx(generation.logprobs, abs=1e-5)
        assert [list(top) for piece in mine for top in piece.top_logprobs] == [list(t) for t in generation.top_logprobs]
        assert "".join(piece.text for piece in mine) == generation.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + ["length"]


def test_leaving_a_stream_frees_its_sequences(engine: Engine) -> None:
    stream = engine.stream(input_ids=[PROMPT, PROMPT], sampling_params=LONG)
    assert next(iter(stream)).token_ids
    stream.close()
    wait_for(lambda: engine.metrics()["num_running"] == 0)


def test_equal_prompts_share_their_pages(engine: Engine) -> None:
    prompt = [9] * 41
    before = engine.metrics()
    found = engine.generate(input_ids=prompt, sampling_params={"n": 8, "max_new_tokens": 2})
    after = engine.metrics()
    assert after["num_prefill_tokens"] - before["num_prefill_tokens"] < 41 + 8 * 5
    again = one(engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 2}))
    assert len(found) == 8 and again.num_cached_tokens >= 36
    other = one(engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 2}, extra_key="mine"))
    assert other.num_cached_tokens == 0, "another namespace"


class Background:
    """A call in a thread, with its outcome."""

    def __init__(self, call: Callable[[], list[Generation]]) -> None:
        self.found: list[Generation] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], list[Generation]]) -> None:
        try:
            self.found = call()
        except Exception as error:
            self.error = error

    def join(self) -> list[Generation]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.found


def test_abort_returns_what_there_is_in_every_state(start: Callable[..., Engine]) -> None:
    engine = start(max_running_requests=2)
    calls = []
    for number, name in enumerate(("run-1", "run-2", "wait-1")):
        long = functools.partial(engine.generate, input_ids=PROMPT, sampling_params=LONG, request_id=name)
        calls.append(Background(long))
        wait_for(functools.partial(holds, engine, number + 1))
    wait_for(lambda: engine.metrics()["num_generated_tokens"] > 20 and engine.metrics()["num_waiting"] == 1)
    assert engine.abort("nobody") == 0
    assert engine.abort("wait") == 0, "names match exactly"
    assert engine.abort("wait", prefix=True, message="enough") == 1
    queued = one(calls[2].join())
    assert (queued.token_ids, queued.finish_reason, queued.finish_message) == ([], "abort", "enough")
    assert engine.abort(all=True) == 2
    for call in calls[:2]:
        found = one(call.join())
        assert found.finish_reason == "abort" and len(found.token_ids) == len(found.logprobs) > 0
        assert sum(count for _, count in found.version_spans) == len(found.token_ids)
    assert engine.abort("run-1") == 0, "it has ended"
    wait_for(lambda: engine.metrics()["num_used_tokens"] == 0)


def holds(engine: Engine, num_sequences: int) -> bool:
    metrics = engine.metrics()
    return metrics["num_running"] + metrics["num_waiting"] == num_sequences


def test_abort_needs_a_name(engine: Engine) -> None:
    for arguments in ({}, {"request_id": ""}, {"request_id": 5}):
        with pytest.raises(RequestError) as caught:
            engine.abort(**arguments)
        assert caught.value.field == "request_id"


def test_a_live_name_is_not_given_twice(engine: Engine) -> None:
    stream = engine.stream(input_ids=PROMPT, sampling_params=LONG, request_id="taken")
    next(iter(stream))
    with pytest.raises(RequestError, match="in use") as caught:
        engine.generate(input_ids=[[1], [2]], request_id=["free", "taken"])
    assert caught.value.field == "request_id"
    engine.abort("taken")
    assert list(stream)[-1].finish_reason == "abort"
    assert engine.generate(input_ids=[[1], [2]], sampling_params={"max_new_tokens": 1}, request_id=["free", "taken"])


def test_a_request_over_its_time_is_an_error_and_freed(start: Callable[..., Engine]) -> None:
    engine = start(request_timeout=0.2)
    params = {"max_new_tokens": 1000, "ignore_eos": True}
    with pytest.raises(DeadlineError, match="request_timeout"):
        engine.generate(input_ids=[[i + 1] for i in range(64)], sampling_params=params)
    wait_for(lambda: engine.metrics()["num_running"] + engine.metrics()["num_waiting"] == 0)


def test_pause_holds_and_resume_goes_on(engine: Engine) -> None:
    engine.pause("keep")
    assert (engine.is_ready, engine.is_alive) == (False, True)
    call = Background(lambda: engine.generate(input_ids=PROMPT, sampling_params=GREEDY))
    wait_for(lambda: engine.metrics()["num_waiting"] == 1)
    engine.resume()
    assert (engine.is_ready, engine.is_alive) == (True, True)
    assert one(call.join()).finish_reason == "length"
    with pytest.raises(RequestError) as caught:
        engine.pause("sleep")  # type: ignore[arg-type]
    assert caught.value.field == "mode"


def test_bad_input_beside_a_good_request(engine: Engine) -> None:
    good = Background(
        lambda: engine.generate(
            input_ids=PROMPT, sampling_params={"max_new_tokens": 200, "seed": 1, "ignore_eos": True}
        )
    )
    for _ in range(20):
        with pytest.raises(RequestError):
            engine.generate(input_ids=[[1], [VOCAB_SIZE]])
    assert len(one(good.join()).token_ids) == 200


def test_flush_frees_the_cache(engine: Engine) -> None:
    engine.generate(input_ids=[7] * 40, sampling_params={"max_new_tokens": 1})
    assert engine.flush_cache() > 0
    assert engine.flush_cache() == 0
    assert one(engine.generate(input_ids=[7] * 40, sampling_params={"max_new_tokens": 1})).num_cached_tokens == 0


def test_coroutines_work_from_any_loop(model_folder: Path) -> None:
    engine = AsyncEngine(model_folder, inprocess=True, **SETTINGS)

    async def main() -> list[list[int]]:
        calls = [engine.generate(input_ids=PROMPT, sampling_params=GREEDY) for _ in range(8)]
        found = [one(each).token_ids for each in await asyncio.gather(*calls)]
        pieces = [piece async for piece in engine.stream(input_ids=PROMPT, sampling_params=GREEDY)]
        found.append([token for piece in pieces for token in piece.token_ids])
        task = asyncio.create_task(engine.generate(input_ids=PROMPT, sampling_params=LONG))
        while (await engine.metrics())["num_running"] == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while (await engine.metrics())["num_running"]:
            await asyncio.sleep(0)
        return found

    found = asyncio.run(main())
    assert len({tuple(ids) for ids in found}) == 1
    asyncio.run(engine.shutdown())
    asyncio.run(engine.shutdown())
    assert not engine.is_alive
    with pytest.raises(ShutdownError):
        asyncio.run(engine.generate(input_ids=PROMPT))


def test_the_lower_level_runs_on_the_engine_s_loop(engine: Engine) -> None:
    """What a server does: submit single sequences and read their streams."""

    async def scenario() -> tuple[Generation, list[Generation], list[int]]:
        item = GenerateItem(prompt="hello", params=GREEDY, request_id="mine", index=1)
        whole = engine.asynchronous.submit(item)
        with pytest.raises(RequestError, match="in use"):
            engine.asynchronous.submit(item)
        streamed = engine.asynchronous.submit(GenerateItem(prompt="hello", params=GREEDY, stream=True))
        pieces = [piece async for piece in streamed]
        return await whole.result(), pieces, whole.prompt_token_ids

    whole, pieces, prompt_ids = engine.asynchronous.runtime.wait(scenario())
    assert (whole.request_id, whole.index, prompt_ids) == ("mine", 1, list(b"hello"))
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids


@pytest.mark.parametrize("num_prompts", [1, 5])
def test_very_many_prompts_leave_the_loop_to_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, num_prompts: int
) -> None:
    monkeypatch.setattr(pacing, "TURN_SECONDS", -1.0)  # a turn of each
    refused = [[VOCAB_SIZE]] * num_prompts  # ended at once: nobody waits for the core

    async def scenario() -> int:
        num_others = 0

        async def others() -> None:
            nonlocal num_others
            while True:
                num_others += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        before = num_others
        found = await engine.asynchronous.generate(input_ids=refused, return_errors=True)
        assert [each.finish_reason for each in found] == ["error"] * num_prompts
        task.cancel()
        return num_others - before

    assert engine.asynchronous.runtime.wait(scenario()) == 2 * num_prompts  # sent, and read


def test_a_call_cancelled_while_it_sends_leaves_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "TURN_SECONDS", -1.0)
    client = engine.asynchronous.runtime.client

    async def scenario() -> None:
        task = asyncio.create_task(engine.asynchronous.generate(input_ids=[PROMPT] * 5, sampling_params=LONG))
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(client._sinks) == 2
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and not client._sinks

    engine.asynchronous.runtime.wait(scenario())


@pytest.mark.parametrize(
    ("given", "is_much"),
    [
        (list(range(1000)), False),
        ([PROMPT] * 5, False),
        (np.zeros((5, 1000)), False),
        ("a" * 1000, False),
        ([PROMPT] * 1000, True),
        (["a"] * 1000, True),
        (np.zeros((1000, 5)), True),
        ("a" * 100_000, True),
    ],
)
def test_much_is_read_in_another_thread(given: Any, is_much: bool) -> None:
    assert (fields.reading_cost(given) > INLINE_CHARACTERS) == is_much
