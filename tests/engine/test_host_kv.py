"""KV pages in host memory: a prefix that the pool evicted is a hit again, and no answer moves by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import Engine, SamplingParams
from headrace.telemetry import METRICS
from headrace.types.errors import ConfigError
from tests.parity.models import make_model, save_model

PAGE, POOL = 4, 64
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "skip_tokenizer_init": True,
    "inprocess": True,
    "page_size": PAGE,
    "kv_pool_tokens": POOL,
    "max_running_requests": 3,
    "max_num_batched_tokens": 16,
    "context_length": 48,
    "seed": 0,
}
PROMPTS = [[1 + (number * 7 + at) % 90 for at in range(33)] for number in range(6)]
PARAMS = SamplingParams(max_new_tokens=6, temperature=1.0, ignore_eos=True, seed=4)
"""Six prompts of 36 KV tokens each: three times the pool."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("host_kv"))


def answers(engine: Engine) -> list[tuple[list[int], list[float], int]]:
    """Ids, log-probabilities and cached tokens of each prompt, one after the other, twice."""
    found = [engine.generate(input_ids=prompt, sampling_params=PARAMS)[0] for prompt in PROMPTS * 2]
    return [(list(each.token_ids), list(each.logprobs), each.num_cached_tokens) for each in found]


@pytest.mark.parametrize(("backend", "overlap_depth"), [("cpu", 1), ("reference", 0)])
def test_an_evicted_prefix_is_a_hit_again(folder: Path, backend: Any, overlap_depth: int) -> None:
    settings = {**CONFIG, "attention_backend": backend, "overlap_depth": overlap_depth}
    if backend == "cpu":
        settings["numerics"] = "invariant"
    with Engine(folder, **settings) as engine:
        expected = answers(engine)
    with Engine(folder, host_kv_tokens=6 * 40, **settings) as engine:
        found = answers(engine)
        metrics = engine.metrics()
    for (ids, logprobs, _), (like_ids, like_logprobs, _) in zip(found, expected, strict=True):
        assert ids == like_ids and logprobs == pytest.approx(like_logprobs, abs=0.0 if backend == "cpu" else 1e-5)
    assert all(cached == 0 for *_, cached in expected[6:]) and all(cached == 32 for *_, cached in found[6:])
    assert metrics["num_pages_loaded"] == 6 * 8 and metrics["num_host_pages"] >= 6 * 9
    assert metrics["page_save_s"] > 0 and metrics["page_load_s"] > 0
    assert metrics.keys() <= {spec.name for spec in METRICS}


@pytest.mark.parametrize("num_stages", [1, 2])
def test_many_at_once_over_a_small_host_memory(folder: Path, num_stages: int) -> None:
    """Copies each way all the time, while host pages are evicted too; on every stage."""
    settings = {**CONFIG, "numerics": "invariant", "max_running_requests": 2}
    prompts = [PROMPTS[number % 4][: 17 + number % 13] for number in range(20)]
    with Engine(folder, **settings) as engine:
        expected = engine.generate(input_ids=prompts, sampling_params=PARAMS)
    with Engine(folder, host_kv_tokens=80, pp_size=num_stages, **settings) as engine:
        for _ in range(2):
            found = engine.generate(input_ids=prompts, sampling_params=PARAMS)
            for each, like in zip(found, expected, strict=True):
                assert each.token_ids == like.token_ids and each.logprobs == like.logprobs
        metrics = engine.metrics()
    assert metrics["num_pages_saved"] > 40 and metrics["num_pages_loaded"] > 10


def test_who_was_preempted_goes_on_as_if_he_had_never_left(folder: Path) -> None:
    """Twenty sequences of 62 to 70 tokens, which end then, in a pool of eight; what follows the last whole page is
    computed again."""
    prompts = [prompt[: 8 + number % 9] for number, prompt in enumerate(PROMPTS * 4)][:20]
    params = SamplingParams(max_new_tokens=54, temperature=1.0, ignore_eos=True, seed=5)
    settings = {**CONFIG, "numerics": "invariant", "max_running_requests": 20, "context_length": 80}
    settings |= {"max_num_batched_tokens": 64}
    with Engine(folder, **{**settings, "kv_pool_tokens": 2000}) as engine:
        expected = engine.generate(input_ids=prompts, sampling_params=params)
        num_prefilled = engine.metrics()["num_prefill_tokens"]
    with Engine(folder, host_kv_tokens=1600, **{**settings, "kv_pool_tokens": 560}) as engine:
        found = engine.generate(input_ids=prompts, sampling_params=params)
        metrics = engine.metrics()
    for each, like in zip(found, expected, strict=True):
        assert each.token_ids == like.token_ids and each.logprobs == like.logprobs
    assert metrics["num_preemptions"] > 2 and metrics["num_pages_loaded"] > 20
    assert metrics["num_prefill_tokens"] - num_prefilled <= 8 * PAGE * metrics["num_preemptions"]


def test_new_weights_find_nothing_of_the_old(folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in make_model("qwen3", seed=1).state_dict().items()}
    with Engine(folder, host_kv_tokens=240, **CONFIG) as engine:
        answers(engine)
        engine.update_weights_from_tensor(tensors.items(), version="new")
        found = answers(engine)
        assert all(cached == 0 for *_, cached in found[:6]) and all(cached == 32 for *_, cached in found[6:])
        for prompt, (ids, logprobs, _) in zip(PROMPTS, found[6:], strict=True):
            scored = engine.score(
                input_ids=[*prompt, *ids], logprob_start=len(prompt), prompt_logprob_mode="temperature"
            )[0]
            assert scored.prompt_logprobs is not None
            assert scored.prompt_logprobs[len(prompt) :] == pytest.approx(logprobs, abs=1e-4)
        engine.flush_cache()
        assert engine.metrics()["num_host_pages"] == 0
        assert answers(engine)[0][2] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_kv_tokens": 3}, "less than a page"),
        ({"host_kv_tokens": -1}, "must be in"),
        ({"host_kv_tokens": 64, "prefix_cache": False}, "prefix cache"),
        ({"host_kv_tokens": 1 << 32}, "MiB of host memory, and"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Engine(folder, **{**CONFIG, **settings})
    assert caught.value.field == "host_kv_tokens"
