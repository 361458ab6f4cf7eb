"""KV pages in host memory, copied beside steps on a stream of their own: no bit moves, whatever runs meanwhile."""

from __future__ import annotations

import random
from typing import Any

import pytest

from headrace import SamplingParams
from tests.gpu.builders import Background, Checkpoints, Starter, random_ids

PARAMS = SamplingParams(max_new_tokens=40, temperature=1.0, ignore_eos=True, seed=3)
PROMPTS = [random_ids(random.Random(number), 300) for number in range(24)]


@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "fp8_e4m3"}, {"cuda_graphs": False, "overlap_depth": 0}])
def test_an_evicted_prefix_comes_back_bit_by_bit(start: Starter, checkpoints: Checkpoints, settings: Any) -> None:
    settings = {"numerics": "invariant", "kv_pool_tokens": 2048, **settings}
    plain = start(checkpoints.get(), **settings)
    expected = [(each.token_ids, each.logprobs) for each in plain.generate(input_ids=PROMPTS, sampling_params=PARAMS)]
    plain.shutdown()
    engine = start(checkpoints.get(), host_kv_tokens=1 << 14, **settings)
    for _ in range(3):
        found = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
        assert [(each.token_ids, each.logprobs) for each in found] == expected
    metrics = engine.metrics()
    assert metrics["num_pages_loaded"] > 24 * 18 and metrics["num_compiled_after_ready"] == 0
    assert 0 < metrics["page_save_s"] < metrics["uptime_s"] and 0 < metrics["page_load_s"] < metrics["uptime_s"]


def test_copies_beside_running_requests_leave_them_alone(start: Starter, checkpoints: Checkpoints) -> None:
    settings = {"numerics": "invariant", "kv_pool_tokens": 10240}
    long = SamplingParams(max_new_tokens=1500, temperature=1.0, ignore_eos=True, seed=1)
    engine = start(checkpoints.get(), host_kv_tokens=1 << 16, **settings)
    expected = engine.generate(input_ids=PROMPTS[:4], sampling_params=long)
    background = Background(engine, input_ids=PROMPTS[:4], sampling_params=long)
    others = [random_ids(random.Random(100 + number), 1000) for number in range(12)]
    for _ in range(3):
        engine.generate(input_ids=others, sampling_params=PARAMS)
    found = background.answer(120.0)
    assert [(each.token_ids, each.logprobs) for each in found] == [(e.token_ids, e.logprobs) for e in expected]
    assert engine.metrics()["num_pages_loaded"] > 0
