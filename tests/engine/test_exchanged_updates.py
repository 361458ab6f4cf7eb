"""Shadow updates of a whole engine whose memory is exchanged, over a driver that maps the host's pages."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import DeviceLostError, Engine, SamplingParams
from headrace.runner.runner import Runner
from tests.engine.builders import SETTINGS, model_of, named_tensors
from tests.runner.mapped_driver import MappedDriver, mapped_driver

PROMPT = [11, 12, 13, 14, 15]
PARAMS = SamplingParams(max_new_tokens=8, temperature=1.0, ignore_eos=True, seed=3)
NUM_TOKENS = 300
LONG = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, seed=5)


@pytest.fixture
def driver() -> Iterator[MappedDriver]:
    with mapped_driver() as found:
        yield found


def start(folder: Path, **settings: Any) -> Engine:
    return Engine(folder, inprocess=True, **{**SETTINGS, "numerics": "invariant", **settings})


def answer(engine: Engine) -> tuple[list[int], list[float]]:
    engine.flush_cache()
    [found] = engine.generate(input_ids=PROMPT, sampling_params=PARAMS)
    return list(found.token_ids), list(found.logprobs)


def test_each_update_is_served_and_memory_comes_and_goes(model_folder: Path, driver: MappedDriver) -> None:
    sets = [named_tensors(model_of(seed)) for seed in range(2)]
    with start(model_folder, keep_weights_copy=True) as engine:
        num_memories = driver.num_memories
        expected = [(engine.digest(), answer(engine))]
        for number in range(1, 13):
            engine.update_weights_from_tensor(sets[number % 2], version=str(number), mode="shadow")
            expected.append((engine.digest(), answer(engine)))
            assert driver.num_memories == num_memories + 1
            if number % 5 == 0:
                engine.release_memory_occupation()
                assert driver.num_memories == 0
                engine.resume_memory_occupation()
                assert expected[-1] == (engine.digest(), answer(engine)) and driver.num_memories == num_memories
        assert expected == [expected[0], *expected[1:3] * 6] and expected[0] == expected[2] != expected[1]
    del engine
    gc.collect()
    assert driver.num_memories == 0 and not driver.reserved


def test_requests_run_on_over_exchanges(model_folder: Path, driver: MappedDriver) -> None:
    sets = [named_tensors(model_of(seed)) for seed in range(2)]
    with start(model_folder) as engine:
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.extend(engine.generate(input_ids=[PROMPT] * 3, sampling_params=LONG))
        )
        thread.start()
        for number in range(1, 7):
            update = engine.update_weights_from_tensor
            update(sets[number % 2], version=str(number), mode="shadow", in_flight="keep")
        thread.join(60)
        assert all(sum(count for _, count in each.version_spans) == NUM_TOKENS for each in found) and len(found) == 3
        assert driver.calls.count("cuMemRetainAllocationHandle") == 6 + 1  # and one for the twin


def test_a_step_that_finds_no_memory_gets_what_is_kept(
    model_folder: Path, driver: MappedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(model_folder) as engine:
        num_memories = driver.num_memories
        engine.update_weights_from_tensor(named_of(1), version="new", mode="shadow")
        expected, real = answer(engine), Runner.launch
        faults = [torch.OutOfMemoryError("CUDA out of memory")]
        monkeypatch.setattr(Runner, "launch", lambda *step: real(*step) if not faults else raise_(faults.pop()))
        assert driver.num_memories == num_memories + 1
        assert answer(engine) == expected and driver.num_memories == num_memories and not faults


def raise_(fault: Exception) -> Any:
    raise fault


def test_an_exchange_that_fails_ends_the_engine_with_its_cause(model_folder: Path, driver: MappedDriver) -> None:
    with start(model_folder) as engine:
        driver.calls.clear()
        session = engine.begin_update("new", [(name, tuple(each.shape), "float32") for name, each in named_of(1)])
        engine.stage(session, named_of(1))
        driver.refuses["cuMemMap"] = 2
        with pytest.raises(DeviceLostError, match="CUDA driver error 2"):
            engine.commit(session)
        driver.refuses.clear()


def named_of(seed: int) -> Any:
    return named_tensors(model_of(seed))
