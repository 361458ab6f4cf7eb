"""One answer whatever the engine does to get it: graphs, overlap, shared prefixes, batch mates, chunks, preemption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import Engine, Generation, SamplingParams
from headrace.types.errors import ConfigError
from tests.gpu.builders import (
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    Checkpoint,
    Checkpoints,
    Starter,
    bits,
    check_greedy,
    check_samples_agree,
    greedy,
    random_ids,
    start_engine,
)
from tests.parity.models import make_model

FLOAT32 = torch.float32
BFLOAT16 = torch.bfloat16
ROUNDING = 2e-5
"""Of log-probabilities in float32 where the number of rows of a matrix product differs, and with it the order in which
the library sums: a few units in the last place of numbers near 10. In invariant mode nothing may differ at all."""
LENGTHS = (1, 2, 17, 64, 130, 300, 700)


def prompts() -> list[list[int]]:
    """Of many lengths; the last three share 200 tokens."""
    choose = random.Random(11)
    made = [random_ids(choose, length) for length in LENGTHS]
    shared = random_ids(choose, 200)
    return made + [shared + random_ids(choose, length) for length in (3, 30, 100)]


def params_for(count: int, num_tokens: int = 40) -> list[SamplingParams]:
    """Greedy, plain and filtered sampling in turn, every one seeded."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 40, "min_p": 0.02},
    ]
    return [
        SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, seed=1000 + i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def run(engine: Engine, asked: list[list[int]], params: list[SamplingParams]) -> list[Generation]:
    return engine.generate(input_ids=asked, sampling_params=params)


def alone(engine: Engine, asked: list[list[int]], params: list[SamplingParams]) -> list[tuple[list[int], bytes]]:
    """The bits of each request with the engine to itself."""
    pairs = zip(asked, params, strict=True)
    return [bits(engine.generate(input_ids=prompt, sampling_params=each))[0] for prompt, each in pairs]


def compare(start: Starter, checkpoint: Checkpoint, one: dict[str, Any], other: dict[str, Any]) -> list[Engine]:
    """Two float32 engines that differ by a setting: the same samples up to rounding."""
    asked, params = prompts(), params_for(len(prompts()))
    engines = [start(checkpoint, dtype="float32", **settings) for settings in (one, other)]
    first, second = (run(engine, asked, params) for engine in engines)
    check_samples_agree(checkpoint, asked, params, first, second, ROUNDING)
    return engines


def test_graphs_change_nothing_but_rounding(checkpoints: Checkpoints, start: Starter) -> None:
    """A graph pads its rows to a bucket, so a product may be summed in another order than without."""
    compare(start, checkpoints.get(), {"cuda_graphs": True}, {"cuda_graphs": False})


def test_overlap_changes_no_token(checkpoints: Checkpoints, start: Starter) -> None:
    """Sequences that stop early leave overshoot behind them, which is dropped."""
    engines = compare(start, checkpoints.get(), {"overlap_depth": 0}, {"overlap_depth": 1})
    asked = prompts() * 3
    stops = [
        SamplingParams(max_new_tokens=60, seed=i, stop_token_ids=tuple(range(3 + i, 5003, 30)), ignore_eos=True)
        for i in range(len(asked))
    ]
    pieces = [run(engine, asked, stops) for engine in engines]
    check_ends_agree(pieces[0], pieces[1])
    assert {piece.finish_reason for piece in pieces[0]} >= {"stop"}
    assert engines[0].metrics()["num_overshoot_tokens"] == 0 < engines[1].metrics()["num_overshoot_tokens"]


def check_ends_agree(first: list[Generation], second: list[Generation]) -> None:
    """Nearly all end alike: two candidates within rounding of each other are rare."""
    same = [one.token_ids == other.token_ids and one.matched == other.matched for one, other in zip(first, second)]  # noqa: B905
    assert sum(same) > 0.95 * len(same)


def test_a_group_that_reads_its_prefix_once_gets_the_same(checkpoints: Checkpoints, start: Starter) -> None:
    """Without a prefix cache rows share no pages, so there are no groups."""
    checkpoint = checkpoints.get()
    prompt = random_ids(random.Random(3), 500)
    params = SamplingParams(max_new_tokens=48, ignore_eos=True, seed=5, n=16)
    grouped, apart = (start(checkpoint, dtype="float32", prefix_cache=cached) for cached in (True, False))
    found = grouped.generate(input_ids=[prompt], sampling_params=params)
    expected = apart.generate(input_ids=[prompt], sampling_params=params)
    assert [piece.seed for piece in found] == [piece.seed for piece in expected]
    check_samples_agree(checkpoint, [prompt] * 16, [params] * 16, found, expected, ROUNDING)
    assert grouped.metrics()["num_shared_prefills"] > 0 == apart.metrics()["num_cached_tokens"]


INVARIANT_SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without graphs, in small chunks": {"cuda_graphs": False, "max_num_batched_tokens": 64},
    "without overlap, in odd chunks": {"overlap_depth": 0, "max_num_batched_tokens": 201, "max_running_requests": 33},
}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_invariant_numerics_are_the_same_bits_whatever_runs_beside(
    checkpoints: Checkpoints, start: Starter, dtype: torch.dtype
) -> None:
    """Alone, among 100 random mates in two orders, chunked otherwise, with a cold and a warm cache, without graphs."""
    checkpoint = checkpoints.get(dtype=dtype)
    common = {"numerics": "invariant", "dtype": str(dtype).removeprefix("torch.")}
    asked, params = prompts(), params_for(len(prompts()))
    by_itself = start(checkpoint, prefix_cache=False, **common)
    expected = alone(by_itself, asked, params)
    by_itself.shutdown()
    for name, settings in INVARIANT_SETTINGS.items():
        engine = start(checkpoint, **common, **settings)
        for order, warmth in ((1, "cold"), (2, "warm")):
            found = among_mates(engine, asked, params, seed=order)
            wrong = [i for i, piece in enumerate(bits(found)) if piece != expected[i]]
            assert not wrong, f"{name}, {warmth}: prompts {wrong}"
        assert engine.metrics()["num_cached_tokens"] > 0, "the second round was warm"
        assert alone(engine, asked, params) == expected, f"{name}, alone with a warm cache"
        engine.shutdown()


def among_mates(
    engine: Engine, asked: list[list[int]], params: list[SamplingParams], seed: int, num_mates: int = 100
) -> list[Generation]:
    """The requests in random places among others of random lengths and kinds."""
    choose = random.Random(seed)
    mates = [random_ids(choose, int(2 ** choose.uniform(0, 9))) for _ in range(num_mates)]
    mate_params = params_for(num_mates, num_tokens=24)
    places = list(range(len(asked) + num_mates))
    choose.shuffle(places)
    everything, every_params = asked + mates, params + mate_params
    found = run(engine, [everything[place] for place in places], [every_params[place] for place in places])
    by_place = dict(zip(places, found, strict=True))
    return [by_place[place] for place in range(len(asked))]


def test_each_sample_of_an_invariant_group_is_that_of_its_seed(checkpoints: Checkpoints, start: Starter) -> None:
    engine = start(checkpoints.get(dtype=BFLOAT16), numerics="invariant")
    prompt = random_ids(random.Random(4), 300)
    group = engine.generate(
        input_ids=[prompt], sampling_params=SamplingParams(max_new_tokens=32, ignore_eos=True, seed=9, n=24)
    )
    assert len({tuple(piece.token_ids) for piece in group}) > 20
    for piece in group[::5]:
        params = SamplingParams(max_new_tokens=32, ignore_eos=True, seed=piece.seed)
        assert alone(engine, [prompt], [params]) == bits([piece])


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
def test_everything_ends_under_memory_pressure(checkpoints: Checkpoints, start: Starter, numerics: str) -> None:
    """A pool for a third of the rows: sequences are preempted and computed again, to the same tokens."""
    checkpoint = checkpoints.get()
    choose = random.Random(6)
    asked = [random_ids(choose, choose.randint(1, 90)) for _ in range(24)]
    common = {"numerics": numerics, "dtype": "float32"}
    if numerics == "fast":  # sampled tokens may part within rounding; greedy ones are judged by transformers' logits
        params = [SamplingParams(max_new_tokens=120, ignore_eos=True, temperature=0.0)] * len(asked)
    else:
        params = params_for(len(asked), num_tokens=120)
    small = start(checkpoint, kv_pool_tokens=1280, **common)
    found = run(small, asked, params)
    assert small.metrics()["num_preemptions"] > 0
    assert all(len(piece.token_ids) == 120 and piece.finish_reason == "length" for piece in found)
    assert small.metrics()["num_used_tokens"] == 0
    if numerics == "fast":
        for prompt, piece in zip(asked, found, strict=True):
            check_greedy(checkpoint, prompt, piece, 1e-4)
    else:
        assert bits(found) == bits(run(start(checkpoint, **common), asked, params))


def test_a_core_in_its_own_process_gives_the_same(checkpoints: Checkpoints, start: Starter) -> None:
    """The same kernels on the same batches: the same bits, also from another process."""
    checkpoint = checkpoints.get(dtype=BFLOAT16)
    asked, params = prompts(), params_for(len(prompts()))
    common = {"numerics": "invariant"}
    found = [bits(run(start(checkpoint, inprocess=inside, **common), asked, params)) for inside in (False, True)]
    assert found[0] == found[1]


def test_a_step_may_take_tens_of_thousands_of_tokens(checkpoints: Checkpoints, start: Starter) -> None:
    """All of them in one launch of more items than the defaults ever need."""
    choose = random.Random(4)
    asked = [random_ids(choose, length) for length in (6000, 5000, 7000, 1, 6500, 300)]
    params = params_for(len(asked), 6)
    settings = {"numerics": "invariant", "max_running_requests": 64}
    one, other = (start(checkpoints.get(), max_num_batched_tokens=size, **settings) for size in (1 << 16, 1024))
    assert bits(run(one, asked, params)) == bits(run(other, asked, params))
    assert one.metrics()["num_chunked_prompts"] == 0 < other.metrics()["num_chunked_prompts"]


def test_the_reference_backend_starts_with_what_settings_it_has(checkpoints: Checkpoints, start: Starter) -> None:
    checkpoint = checkpoints.get()
    engine = start(checkpoint, dtype="float32", attention_backend="reference", kv_pool_tokens=None)
    asked = prompts()[:4]
    for prompt, piece in zip(asked, run(engine, asked, [greedy(8)] * len(asked)), strict=True):
        check_greedy(checkpoint, prompt, piece, 1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_refused_but_by_the_reference(family: str, tmp_path: Path) -> None:
    """It says what a CPU says."""
    make_model(family, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT_LENGTH).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no kernels for layers of experts"):
        start_engine(tmp_path)
    found = []
    for device, backend in (("cpu", "cpu"), ("cuda", "reference")):
        settings = {"dtype": "float32", "kv_pool_tokens": 4096, "num_threads": 1}
        with start_engine(tmp_path, device=device, attention_backend=backend, **settings) as engine:
            assert engine.resolved.device == device
            found.append(run(engine, prompts()[:4], [greedy(8)] * 4))
    for expected, piece in zip(*found, strict=True):
        assert piece.token_ids == expected.token_ids
        torch.testing.assert_close(piece.logprobs, expected.logprobs, atol=1e-3, rtol=0)
