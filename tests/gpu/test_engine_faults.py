"""What may go wrong around an engine on a device: a trainer's settings, weights that are no numbers, a killed core;
reads and updates in pieces while requests run; generations that were cut."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
import torch

from headrace import Engine, EngineDeadError, NonFiniteError, SamplingParams
from headrace.engine import update
from tests.gpu.builders import Background, Checkpoints, Starter, bits, greedy, random_ids, wait_for

PROMPTS = [random_ids(random.Random(7), length) for length in (1, 9, 70, 300)]


def values(engine: Engine) -> list[tuple[list[int], bytes]]:
    engine.flush_cache()
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, seed=3)
    return bits(engine.generate(input_ids=PROMPTS, sampling_params=params))


def test_a_trainer_that_allows_short_products_changes_no_value(checkpoints: Checkpoints, start: Starter) -> None:
    engine = start(checkpoints.get(), dtype="float32", numerics="invariant")
    fast = start(checkpoints.get(), dtype="float32")
    expected = values(engine), values(fast)
    try:
        torch.set_float32_matmul_precision("high")
        torch.set_default_dtype(torch.bfloat16)
        late = start(checkpoints.get(), dtype="float32", numerics="invariant")
        assert (values(engine), values(fast), values(late)) == (*expected, expected[0])
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("settings", [{}, {"numerics": "invariant"}, {"cuda_graphs": False}])
def test_weights_that_are_no_numbers_end_their_requests_and_leave_nothing(
    checkpoints: Checkpoints, start: Starter, settings: dict[str, Any]
) -> None:
    checkpoint = checkpoints.get(dtype=torch.bfloat16)
    engine = start(checkpoint, check_finite=False, **settings)
    expected, good = values(engine), checkpoint.named_tensors()
    bad = [(name, torch.full_like(tensor, torch.nan) if "layers.1.mlp" in name else tensor) for name, tensor in good]
    engine.update_weights_from_tensor(bad, version="bad")
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 5}, {"presence_penalty": 1.0}, {"min_p": 0.1}]
    for kind in kinds:
        with pytest.raises(NonFiniteError):
            engine.generate(input_ids=PROMPTS[:2], sampling_params={"max_new_tokens": 4, **kind})
    with pytest.raises(NonFiniteError):
        engine.score(input_ids=PROMPTS[3])
    assert engine.metrics()["num_nonfinite"] >= len(kinds) + 1
    engine.update_weights_from_tensor(good, version="good")
    assert values(engine) == expected


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_updates_in_pieces_and_reads_between_steps(
    checkpoints: Checkpoints, start: Starter, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr(update, "BUFFER_BYTES", 1 << 18)
    old, new = checkpoints.get(dtype=torch.bfloat16), checkpoints.get(seed=1, dtype=torch.bfloat16)
    engine, cold = start(old), start(new)
    running = Background(engine, input_ids=PROMPTS * 16, sampling_params=greedy(2000))
    wait_for(lambda: engine.status().num_running > 0)
    before = engine.digest()
    report = engine.update_weights_from_tensor(new.named_tensors(), version="new", mode=mode, in_flight="keep")
    assert report.mode == mode
    assert engine.digest() == cold.digest() != before
    for name, expected in new.named_tensors()[:3]:
        assert torch.equal(engine.get_weights_by_name(name).float(), expected.float().cpu())
    assert running.is_running, "all of it happened beside the requests"
    engine.abort(all=True)
    assert all(sum(count for _, count in each.version_spans) == len(each.token_ids) for each in running.answer())
    assert values(engine) == values(cold)


def test_a_core_that_is_killed_comes_back_on_the_device(checkpoints: Checkpoints, start: Starter) -> None:
    engine = start(checkpoints.get(dtype=torch.bfloat16), inprocess=False, max_core_restarts=1)
    expected = values(engine)
    core = engine.asynchronous.runtime.host.pid
    os.kill(core, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        while True:
            engine.generate(input_ids=PROMPTS[0], sampling_params=greedy(2))
    wait_for(lambda: engine.asynchronous.runtime.host.pid != core and engine.is_ready, 120.0)
    assert values(engine) == expected


def test_a_generation_that_was_cut_goes_on_as_if_it_had_not_been(checkpoints: Checkpoints, start: Starter) -> None:
    engine = start(checkpoints.get(dtype=torch.bfloat16), numerics="invariant", overlap_depth=1)
    kinds: list[dict[str, Any]] = [
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.2, "frequency_penalty": -0.4, "temperature": 0.8},
        {"presence_penalty": 1.5, "temperature": 0.0},
        {"frequency_penalty": 0.5, "top_k": 30, "logit_bias": {9: 3.0}},
    ]
    whole_params = [SamplingParams(max_new_tokens=40, ignore_eos=True, seed=i, **kind) for i, kind in enumerate(kinds)]
    whole = engine.generate(input_ids=PROMPTS, sampling_params=whole_params)
    for cut in (1, 13, 39):
        rest = engine.generate(
            input_ids=[prompt + each.token_ids[:cut] for prompt, each in zip(PROMPTS, whole, strict=True)],
            sampling_params=[
                SamplingParams(max_new_tokens=40 - cut, ignore_eos=True, seed=i, **kind) for i, kind in enumerate(kinds)
            ],
            num_output_ids_in_prompt=cut,
        )
        for before, after in zip(whole, rest, strict=True):
            assert after.token_ids == before.token_ids[cut:]
            assert after.logprobs == before.logprobs[cut:]
