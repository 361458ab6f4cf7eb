"""Once an engine is ready nothing is compiled or loaded any more, whatever it is asked for.

In a process of its own: a kernel that another test of this process left in memory would hide that this engine's start
forgot it.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from headrace import Engine, SamplingParams
from headrace.types.weights import UpdateMode
from tests.gpu.builders import VOCAB_SIZE, Checkpoints, Starter, check_aligned, random_ids

NUM_ROWS = 256
NUM_TOKENS = 1500
"""The most prompt tokens of a call: together some make steps beyond those that are captured, some steps of one."""
NUM_AT_ONCE = 3


def random_params(choose: random.Random) -> SamplingParams:
    """Any mixture of processors."""
    return SamplingParams(
        max_new_tokens=choose.randint(1, 5),
        seed=choose.getrandbits(64),
        temperature=choose.choice([0.0, 0.0, 0.6, 1.0, 1.0, 2.0]),
        top_k=choose.choice([-1, -1, 1, 5, 50, 1000]),
        top_p=choose.choice([1.0, 1.0, 0.95, 0.2]),
        min_p=choose.choice([0.0, 0.0, 0.0, 0.1]),
        repetition_penalty=choose.choice([1.0, 1.0, 1.0, 1.2]),
        presence_penalty=choose.choice([0.0, 0.0, 0.0, 0.5]),
        frequency_penalty=choose.choice([0.0, 0.0, 0.0, 0.5]),
        logit_bias=choose.choice([None, None, None, {7: 1.0}, {i: -0.1 for i in range(300)}]),
        stop_token_ids=choose.choice([(), (), (5,), tuple(range(100, 400))]),
        min_new_tokens=choose.choice([0, 0, 1]),
        ignore_eos=choose.random() < 0.5,
        n=choose.choice([1, 1, 1, 1, 2, 7]),
    )


def random_call(seed: int) -> dict[str, Any]:
    """Rows and lengths over orders of magnitude; some share a prefix, some want every further number there is."""
    choose = random.Random(seed)
    num_prompts = int(2 ** choose.uniform(0, 7.5))
    longest = max(1, NUM_TOKENS // num_prompts)
    prompts = [random_ids(choose, choose.randint(1, longest)) for _ in range(num_prompts)]
    if choose.random() < 0.3:
        shared = random_ids(random.Random(seed % 5), 100)
        prompts = [shared + prompt for prompt in prompts[:12]]
    alike = random_params(choose)
    params = [alike if seed % 2 else random_params(choose) for _ in prompts]
    options: dict[str, Any] = {"logprob_mode": choose.choice(["raw", "temperature", "sampled"])}
    if choose.random() < 0.4:
        options["top_logprobs"] = choose.choice([1, 5, 20, 100])
    if choose.random() < 0.3:
        options["logprob_token_ids"] = [choose.randrange(VOCAB_SIZE) for _ in range(choose.choice([1, 3, 40]))]
    if choose.random() < 0.3:
        options["return_prompt_logprobs"] = True
        options["prompt_logprob_mode"] = choose.choice(["raw", "temperature", "sampled"])
        options["logprob_start"] = min(choose.choice([0, 0, 30]), min(map(len, prompts)))
    return {"input_ids": prompts, "sampling_params": params, **options}


CASES = {
    "fast": (500, {"max_running_requests": NUM_ROWS, "max_graph_tokens": 1024}),
    "invariant": (150, {"max_running_requests": NUM_ROWS, "max_graph_tokens": 1024, "numerics": "invariant"}),
    "few graphs": (60, {"max_running_requests": 16, "max_graph_tokens": 16}),
    "few graphs, invariant": (30, {"max_running_requests": 32, "max_graph_tokens": 16, "numerics": "invariant"}),
}


@pytest.mark.parametrize(("num_calls", "settings"), CASES.values(), ids=CASES)
def test_random_shapes_compile_nothing(
    checkpoints: Checkpoints, start: Starter, num_calls: int, settings: dict[str, Any]
) -> None:
    checkpoint = checkpoints.get(dtype=torch.bfloat16)
    engine = start(checkpoint, inprocess=False, max_num_batched_tokens=2048, **settings)

    def call(seed: int) -> int:
        found = engine.generate(**random_call(seed))
        for piece in found:
            check_aligned(piece)
        return len(found)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        num_samples = sum(pool.map(call, range(num_calls)))
    disturb(engine, checkpoints)
    metrics = engine.metrics()
    assert metrics["num_finished"] >= num_samples > num_calls
    assert metrics["num_failed_steps"] == 0 and metrics["num_chunked_prompts"] > 0
    assert metrics["num_compiled_after_ready"] == 0


def disturb(engine: Engine, checkpoints: Checkpoints) -> None:
    """What else may happen to an engine."""
    new = checkpoints.get(seed=1, dtype=torch.bfloat16)
    modes: tuple[UpdateMode, ...] = ("shadow", "inplace")
    for mode in modes:
        engine.update_weights_from_tensor(new.named_tensors(), version=mode, mode=mode)
        engine.generate(**random_call(1))
    engine.digest()
    engine.pause("recompute")
    engine.flush_cache()
    engine.resume()
    engine.generate(**random_call(2))
    engine.score(input_ids=[random_ids(random.Random(0), 6000)], top_logprobs=3)
