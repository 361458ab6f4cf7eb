"""Ask 3: tokens in, tokens out. Ids, log-probabilities and versions stay aligned over 10,000 random runs."""

from __future__ import annotations

import random
from collections.abc import Callable

from headrace import Engine, Generation, SamplingParams
from tests.acceptance.conftest import EOS_ID, VOCAB_SIZE

NUM_RUNS = 10_000
BATCH = 500


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=rng.randint(0, 5),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([-1, 5]),
        top_p=rng.choice([1.0, 0.8]),
        stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.choice([0, 4]))),
        ignore_eos=rng.random() < 0.3,
    )


def check(piece: Generation, params: SamplingParams) -> None:
    assert len(piece.token_ids) == len(piece.logprobs) == sum(count for _, count in piece.version_spans)
    assert len(piece.token_ids) <= params.max_new_tokens
    assert all(value <= 0 for value in piece.logprobs)
    if piece.finish_reason == "stop":
        assert piece.token_ids[-1] == piece.matched
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS_ID})
        assert piece.matched in stops
        assert not stops & set(piece.token_ids[:-1])
    else:
        assert piece.finish_reason == "length"
        assert len(piece.token_ids) == params.max_new_tokens


def test_ids_logprobs_and_versions_are_aligned_over_turns(engine_on: Callable[..., Engine]) -> None:
    engine = engine_on(max_running_requests=BATCH)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 12))] for _ in range(BATCH)]
    reasons: dict[str, int] = {}
    num_cached = 0
    for _ in range(NUM_RUNS // BATCH):
        params = [random_params(rng) for _ in prompts]
        results = engine.generate(input_ids=prompts, sampling_params=params)
        for prompt, piece, wanted in zip(prompts, results, params, strict=True):
            check(piece, wanted)
            assert piece.num_prompt_tokens == len(prompt)
            reasons[str(piece.finish_reason)] = reasons.get(str(piece.finish_reason), 0) + 1
            num_cached += piece.num_cached_tokens
        # The next turn continues exactly the ids of this one, with new input behind them.
        prompts = [
            (prompt + piece.token_ids + [rng.randrange(3, VOCAB_SIZE)])[-60:]
            if rng.random() < 0.2
            else prompt + piece.token_ids + [rng.randrange(3, VOCAB_SIZE)]
            for prompt, piece in zip(prompts, results, strict=True)
        ]
    assert reasons["stop"] > 500 and reasons["length"] > 500
    assert num_cached > NUM_RUNS, "later turns hit the cache of earlier ones"


def test_a_turn_over_the_context_is_refused_not_truncated(engine_on: Callable[..., Engine]) -> None:
    engine = engine_on()
    try:
        engine.generate(input_ids=[5] * 510, sampling_params=SamplingParams(max_new_tokens=10))
    except ValueError as error:
        assert "max_new_tokens" in str(error)
    else:
        raise AssertionError("a request over the context was accepted")
