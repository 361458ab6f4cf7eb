"""Two devices that hold one model together: transformers' tokens, updates on both, and the loss of one."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from headrace import EngineDeadError, SamplingParams
from tests.engine.test_ranks import rank_pids
from tests.gpu.builders import Checkpoints, Starter, bits, check_greedy, greedy, random_ids
from tests.gpu.test_released_memory import num_replays, taken_bytes

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device"),
]
TWO: dict[str, Any] = {"tp_size": 2, "inprocess": False, "max_running_requests": 16, "max_graph_tokens": 64}
STAGES: dict[str, Any] = {"tp_size": 1, "pp_size": 2}
PROMPTS = [random_ids(random.Random(number), 5 + 40 * number) for number in range(8)]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("qwen3-even-vocabulary", {}),
        ("llama-biases", {"numerics": "invariant"}),
        ("qwen2-tied", {"cuda_graphs": False, "overlap_depth": 0}),
        ("qwen3", STAGES),
        ("qwen2-tied", STAGES | {"cuda_graphs": False}),
    ],
)
def test_two_devices_compute_what_transformers_does(
    start: Starter, checkpoints: Checkpoints, variant: str, settings: Any
) -> None:
    checkpoint = checkpoints.get(variant)
    engine = start(checkpoint, dtype="float32", **(TWO | settings))
    for prompt, piece in zip(PROMPTS, engine.generate(input_ids=PROMPTS, sampling_params=greedy(40)), strict=True):
        check_greedy(checkpoint, prompt, piece, 1e-3)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_batch_mates_on_two_devices(start: Starter, checkpoints: Checkpoints, numerics: str) -> None:
    """Few rows and many, sums by words, by flags and over NCCL, tokens by vocabulary and, where mates are truncated, of
    whole rows: what is drawn is the same, and with invariant numerics each bit."""
    dtype = "bfloat16" if numerics == "invariant" else "float32"
    engine = start(
        checkpoints.get("qwen3-even-vocabulary"),
        **(TWO | {"numerics": numerics, "dtype": dtype, "max_running_requests": 64}),
    )
    sampled = [SamplingParams(temperature=1.0, max_new_tokens=24, seed=number) for number in range(8)]

    def among(num_mates: int, **limits: Any) -> Any:
        mates = [random_ids(random.Random(100 + number), 10 + number) for number in range(num_mates)]
        params = [
            SamplingParams(temperature=0.8, max_new_tokens=12, seed=number, **limits) for number in range(num_mates)
        ]
        return engine.generate(input_ids=PROMPTS + mates, sampling_params=sampled + params)[: len(PROMPTS)]

    alone = [
        engine.generate(input_ids=[prompt], sampling_params=[each])[0]
        for prompt, each in zip(PROMPTS, sampled, strict=True)
    ]
    for found in (among(0), among(40), among(40, top_k=5), among(3, top_p=0.9)):
        if numerics == "invariant":
            assert bits(found) == bits(alone)
        for first, second in zip(found, alone, strict=True):
            assert first.token_ids[:4] == second.token_ids[:4]
            assert np.allclose(first.logprobs[:4], second.logprobs[:4], atol=0.05)


@pytest.mark.parametrize(("mode", "place"), [("shadow", "cuda"), ("inplace", "cpu")])
def test_an_update_there_and_back(start: Starter, checkpoints: Checkpoints, mode: Any, place: str) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", **TWO)
    digests = [engine.digest()]
    for version, target in (("new", new), ("old", old), ("again", new)):
        tensors = [(name, tensor.to(place)) for name, tensor in target.named_tensors()]
        engine.update_weights_from_tensor(tensors, version=version, mode=mode)
        digests.append(engine.digest())
        piece = engine.generate(input_ids=PROMPTS[3], sampling_params=greedy(20))[0]
        check_greedy(target, PROMPTS[3], piece, 1e-3)
    assert digests[0] == digests[2] != digests[1] == digests[3]


@pytest.mark.parametrize("layout", [{}, STAGES])
def test_memory_goes_and_comes_on_both_devices(start: Starter, checkpoints: Checkpoints, layout: Any) -> None:
    """All of it, and graphs alone, without which steps run meanwhile: all ranks capture them again in one order."""
    settings = {"memory_saver": True, "keep_weights_copy": True, "numerics": "invariant"}
    engine = start(checkpoints.get(), **(TWO | settings | layout))

    def answers() -> Any:
        return bits(engine.generate(input_ids=PROMPTS, sampling_params=greedy(20)))

    def free_memory() -> int:
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(2))

    expected, digests = answers(), engine.digest()
    for _ in range(2):
        before, replays = free_memory(), num_replays(engine)
        engine.release_memory_occupation()
        assert free_memory() - before > 0.9 * taken_bytes(engine, checkpoints)
        engine.resume_memory_occupation()
        assert answers() == expected and engine.digest() == digests and num_replays(engine) > replays
        replays = num_replays(engine)
        engine.release_memory_occupation(["cuda_graph"])
        assert answers() == expected and num_replays(engine) == replays
        engine.resume_memory_occupation(["cuda_graph"])
        assert answers() == expected and num_replays(engine) > replays


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_engine_in_seconds(start: Starter, checkpoints: Checkpoints, how: int) -> None:
    engine = start(checkpoints.get(), **TWO, max_core_restarts=0)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(engine.generate, input_ids=PROMPTS, sampling_params=greedy(4000))
        time.sleep(0.5)
        (rank,) = rank_pids(engine)
        os.kill(rank, how)
        with pytest.raises(EngineDeadError, match="rank 1"):
            asked.result(timeout=10.0)
