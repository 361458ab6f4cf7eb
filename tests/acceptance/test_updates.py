"""Asks 6, 7 and 20: an update is all or nothing, old KV never serves new weights, every token names its version."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from headrace import Engine, HeadraceError, PoisonedError, SamplingParams
from headrace.types.weights import InFlight, UpdateMode
from tests.acceptance.conftest import VOCAB_SIZE, named_tensors, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_new_tokens=3, ignore_eos=True)
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31, 32, 33, 34, 35, 36, 37]]


class BrokenSource(Exception):
    pass


def outputs(engine: Engine, params: SamplingParams = GREEDY) -> list[tuple[list[int], list[float]]]:
    """Bit for bit: each prompt alone and all of it computed, since the steps that prompts share depend on time."""
    engine.flush_cache()
    found = [engine.generate(input_ids=prompt, sampling_params=params)[0] for prompt in PROMPTS]
    return [(piece.token_ids, piece.logprobs) for piece in found]


def manifest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]


def cut_after(tensors: list[tuple[str, torch.Tensor]], count: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors[:count]
    raise BrokenSource


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_a_failure_at_any_tensor_serves_old_bits_or_nothing(engine_on: Callable[..., Engine], mode: UpdateMode) -> None:
    engine = engine_on()
    new = named_tensors(tiny_model(1))
    before, digest = outputs(engine, SHORT), engine.digest()
    num_poisoned = 0
    counts = [0, 1, *range(2, len(new), 2), len(new)]
    for count in counts:
        session = engine.begin_update("broken", manifest_of(new), mode=mode)
        # Each tensor is staged on its own, so that it has reached the engine before the source breaks.
        for pair in new[:count]:
            engine.stage(session, [pair])
        with pytest.raises(BrokenSource):
            engine.stage(session, cut_after([], 0))
        engine.abort_update(session)
        if mode == "shadow" or count == 0:
            assert outputs(engine, SHORT) == before and engine.digest() == digest
            continue
        with pytest.raises(PoisonedError):
            outputs(engine)
        num_poisoned += 1
        engine.update_weights_from_tensor(named_tensors(tiny_model(0)), version="healed")
        assert outputs(engine, SHORT) == before and engine.digest() == digest
    assert num_poisoned == (len(counts) - 1 if mode == "inplace" else 0)


def test_a_new_request_never_reads_old_kv(engine_on: Callable[..., Engine], folders: list[Path]) -> None:
    engine = engine_on()
    cold = outputs(engine_on(1))
    assert outputs(engine) != cold
    assert engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)[0].num_cached_tokens > 0
    for flush in (False, True):
        engine.update_weights_from_tensor(named_tensors(tiny_model(0)), version="old")
        outputs(engine)
        with background_load(engine):
            engine.update_weights_from_tensor(named_tensors(tiny_model(1)), version="new", in_flight="keep")
            if flush:
                engine.flush_cache()
            first = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
        assert [piece.num_cached_tokens for piece in first] == [0, 0]
        assert [piece.token_ids for piece in first] == [ids for ids, _ in cold]


class background_load:
    """Long requests that run across whatever happens inside the block."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = threading.Thread(target=self._run)
        self.results: list[object] = []

    def _run(self) -> None:
        params = SamplingParams(max_new_tokens=150, ignore_eos=True)
        self.results = list(self._engine.generate(input_ids=[[i + 3] * 20 for i in range(8)], sampling_params=params))

    def __enter__(self) -> background_load:
        self._thread.start()
        deadline = time.monotonic() + 30
        while self._engine.metrics()["num_running"] < 8 and time.monotonic() < deadline:
            time.sleep(0.002)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive() and len(self.results) == 8


@pytest.mark.parametrize(
    ("num_ranks", "length", "policies"), [(1, 180, get_args(InFlight)), (2, 110, ("keep", "recompute"))]
)
def test_spans_of_requests_that_cross_three_updates_each(
    engine_on: Callable[..., Engine], num_ranks: int, length: int, policies: tuple[InFlight, ...]
) -> None:
    """They add up to its length, and name each version in order, once, and only after its commit. One that ends before
    an update is of the weights before it."""
    engine = engine_on(tp_size=num_ranks, device="cpu")
    for in_flight in policies:
        engine.update_weights_from_tensor(named_tensors(tiny_model(0)), version=f"{in_flight} 0")
        cross_three_updates(engine, in_flight, length)


def cross_three_updates(engine: Engine, in_flight: InFlight, length: int) -> None:
    params = SamplingParams(max_new_tokens=length, ignore_eos=True)
    versions = [f"{in_flight} {number}" for number in range(4)]
    num_tokens, num_updates, seen, finish = 0, 0, [], None
    for piece in engine.stream(input_ids=[5] * 8, sampling_params=params):
        num_tokens += len(piece.token_ids)
        seen += piece.version_spans
        finish = piece.finish_reason
        if num_updates < 3 and num_tokens >= 15 * (num_updates + 1):
            num_updates += 1
            tensors = named_tensors(tiny_model(num_updates % 3))
            report = engine.update_weights_from_tensor(tensors, version=versions[num_updates], in_flight=in_flight)
            assert report.version == versions[num_updates]
    assert sum(count for _, count in seen) == num_tokens
    assert (num_tokens == length, finish) == ((False, "abort") if in_flight == "abort" else (True, "length"))
    order = [version for i, (version, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != version]
    assert order == (versions if in_flight in ("keep", "recompute") else versions[:1])


def test_a_failed_update_never_lends_its_name_to_a_token(engine_on: Callable[..., Engine]) -> None:
    engine = engine_on()
    broken = named_tensors(tiny_model(1))
    broken[6] = (broken[6][0], torch.zeros(3, 3))
    with pytest.raises(HeadraceError, match=broken[6][0].replace(".", r"\.")):
        engine.update_weights_from_tensor(broken, version="never")
    [piece] = engine.generate(input_ids=[3] * VOCAB_SIZE, sampling_params=GREEDY)
    assert piece.version_spans == [("default", 12)]
