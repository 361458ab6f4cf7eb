"""Ask 24: every field at its bound, one over and huge; prompt scoring stays within its workspace. Ask 8: garbage frames
never end a core."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from headrace import Engine, RequestError, SamplingParams
from headrace.ipc.codec import DECODE_ERRORS, CommandCodec
from headrace.types.messages import Abort, GetStatus, Pause, Submit
from headrace.types.request import Request, pack_ids
from headrace.types.sampling_params import MAX_N, MAX_NEW_TOKENS
from tests.acceptance.conftest import VOCAB_SIZE

AT_BOUND: list[dict[str, Any]] = [
    {"temperature": 1e4},
    {"temperature": 0.0},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"top_k": -1},
    {"top_k": (1 << 31) - 1},
    {"min_p": 1.0},
    {"repetition_penalty": 100.0},
    {"repetition_penalty": 1e-6},
    {"presence_penalty": -100.0},
    {"frequency_penalty": 100.0},
    {"seed": (1 << 64) - 1},
    {"stop_token_ids": [VOCAB_SIZE - 1]},
    {"logit_bias": {"0": 1e4}},
    {"n": 64},
    {"max_new_tokens": 508},
    {"min_new_tokens": 4, "max_new_tokens": 4},
]
OVER_BOUND: list[tuple[str, Any]] = [
    ("temperature", 1.0001e4),
    ("temperature", 1e300),
    ("top_p", 1.0000001),
    ("top_k", 1 << 31),
    ("top_k", 1 << 70),
    ("min_p", 1.1),
    ("repetition_penalty", 100.1),
    ("repetition_penalty", 9e-7),
    ("presence_penalty", -100.1),
    ("frequency_penalty", 1e30),
    ("seed", 1 << 64),
    ("seed", 1 << 200),
    ("stop_token_ids", [VOCAB_SIZE]),
    ("stop_token_ids", [1 << 80]),
    ("logit_bias", {str(VOCAB_SIZE): 1}),
    ("n", MAX_N + 1),
    ("n", 10**18),
    ("max_new_tokens", 509),
    ("max_new_tokens", MAX_NEW_TOKENS + 1),
    ("max_new_tokens", 10**30),
    ("min_new_tokens", 129),
]


def test_fields_at_their_bound_are_served(engine_on: Callable[..., Engine]) -> None:
    engine = engine_on()
    for values in AT_BOUND:
        settings = {"max_new_tokens": 4, **values}
        pieces = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=settings)
        assert len(pieces) == values.get("n", 1)
        assert all(piece.finish_reason in ("stop", "length") for piece in pieces)


@pytest.mark.parametrize(("name", "value"), OVER_BOUND)
def test_fields_over_their_bound_are_named(engine_on: Callable[..., Engine], name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        engine_on().generate(input_ids=[5, 6, 7, 8], sampling_params={name: value})
    assert caught.value.field.startswith(f"sampling_params.{name}")


def test_scoring_a_full_context_stays_within_its_workspace(engine_on: Callable[..., Engine]) -> None:
    """Eight prompts of the whole context with top log-probabilities: the peak grows by a bounded workspace only."""
    engine = engine_on(max_num_batched_tokens=4096)
    params = SamplingParams(max_new_tokens=0)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(512)] for _ in range(8)]
    engine.score(input_ids=prompts[:1], sampling_params=params)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = engine.score(input_ids=prompts, sampling_params=params, top_logprobs=8)
    assert all(len(piece.prompt_top_logprobs) == 512 for piece in pieces)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "KiB"


def test_garbage_frames_never_raise_anything_else(engine_on: Callable[..., Engine]) -> None:
    codec = CommandCodec()
    rng = random.Random(7)
    request = Request(1, "rid", pack_ids([1, 2, 3]), 4, 5)
    seeds = [msgspec.msgpack.encode(m) for m in (Submit((request,)), Abort((1, 2)), Pause(1, "keep"), GetStatus(3))]
    num_refused = 0
    for index in range(300_000):
        if index % 2:
            frame = rng.randbytes(rng.randrange(24))
        else:
            mutated = bytearray(seeds[index // 2 % len(seeds)])
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            frame = bytes(mutated)
        try:
            codec.decode(frame)
        except DECODE_ERRORS:
            num_refused += 1
    assert num_refused > 180_000
