"""Samples and scores of a real model that met updates anywhere, scored again by transformers with the weights that
their versions name. Prompts are longer than a step, so most updates land in the middle of one.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from headrace import Engine, Generation
from tests.engine.builders import SETTINGS, model_of, named_tensors

model = cache(model_of)
PROMPTS = [
    [(31 * row + 7 * column) % 250 + 1 for column in range(length)] for row, length in enumerate((3, 45, 100, 45))
]
STEM = PROMPTS[2][:60]
PROMPTS += [STEM + [5, 6, 7], STEM + [8] * 20, PROMPTS[1]]
VERSIONS = 4


def rescored(tokens: list[int], serials: list[int]) -> np.ndarray[Any, Any]:
    """The log-probability of each token after the first; KV and logits of position i are of model `serials[i]`."""
    past, values, start = DynamicCache(), [], 0
    while start < len(tokens) - 1:
        end = next((i for i in range(start, len(serials)) if serials[i] != serials[start]), len(serials))
        with torch.inference_mode():
            ids = torch.tensor([tokens[start:end]])
            logits = model(serials[start])(ids, past_key_values=past, use_cache=True).logits[0].double()
        values.append(
            torch.log_softmax(logits, -1)[torch.arange(end - start), torch.tensor(tokens[start + 1 : end + 1])]
        )
        start = end
    return torch.cat(values).numpy() if values else np.empty(0)


def check(found: Generation, prompt: list[int], *, is_kept: bool) -> int:
    """Every value against the weights it names; returns how many weights the sample is of."""
    serials = [int(version) for version, count in found.version_spans for _ in range(count)]
    scored_by = [int(version) for version, count in found.prompt_version_spans for _ in range(count)]
    assert len(serials) == len(found.logprobs)
    if found.prompt_logprobs:
        assert len(scored_by) == len(found.prompt_logprobs) == len(prompt) and len(set(scored_by)) == 1
        assert found.prompt_logprobs[0] is None and scored_by[0] == (serials or scored_by)[0]
        expected = rescored(prompt, scored_by[:-1])
        np.testing.assert_allclose(np.array(found.prompt_logprobs[1:], float), expected, atol=2e-4)
    tokens = prompt + found.token_ids
    for serial in set() if is_kept else set(serials):
        expected = rescored(tokens, [serial] * (len(tokens) - 1))[len(prompt) - 1 :]
        ours = np.array(serials) == serial
        np.testing.assert_allclose(np.array(found.logprobs)[ours], expected[ours], atol=2e-4)
    if is_kept and serials:
        expected = rescored(tokens, [serials[0]] * (len(prompt) - 1) + serials)[len(prompt) - 1 :]
        np.testing.assert_allclose(found.logprobs, expected, atol=2e-4)
    return len(set(serials))


def start_requests(engine: Engine, found: dict[str, list[Generation]]) -> list[threading.Thread]:
    """Samples, two of each prompt and with scores, and scores alone, as threads that fill `found`."""
    params = {"max_new_tokens": 16, "ignore_eos": True, "n": 2, "seed": 3}
    calls: dict[str, Callable[[], list[Generation]]] = {
        "samples": lambda: engine.generate(input_ids=PROMPTS, sampling_params=params),
        "both": lambda: engine.generate(input_ids=PROMPTS, sampling_params=params, return_prompt_logprobs=True),
        "scores": lambda: engine.score(input_ids=PROMPTS),
    }
    threads = [threading.Thread(target=lambda n=name, c=call: found.update({n: c()})) for name, call in calls.items()]
    for thread in threads:
        thread.start()
    return threads


@pytest.fixture(scope="module")
def small_steps(model_folder: Any) -> Iterator[Engine]:
    settings = SETTINGS | {"max_num_batched_tokens": 8, "overlap_depth": 1, "initial_version": "0"}
    with Engine(model_folder, inprocess=True, **settings) as shared:
        yield shared


@pytest.mark.parametrize("length", [1, 40])
def test_scores_name_their_weights_streamed_or_whole(small_steps: Engine, length: int) -> None:
    engine, prompt = small_steps, PROMPTS[1][:length]
    engine.set_weight_version("now")
    (whole,) = engine.score(input_ids=prompt)
    (start_later,) = engine.score(input_ids=prompt, logprob_start=length - 1)
    (piece,) = engine.stream(input_ids=prompt, sampling_params={"max_new_tokens": 0})
    for each in (whole, start_later, piece):
        assert each.prompt_version_spans == [("now", length)]
        assert not each.version_spans and not each.version_epochs
    params = {"max_new_tokens": 2, "ignore_eos": True}
    first, *rest = engine.stream(input_ids=prompt, sampling_params=params, return_prompt_logprobs=True)
    assert first.prompt_version_spans == [("now", length)] and not any(each.prompt_version_spans for each in rest)
    (plain,) = engine.generate(input_ids=prompt, sampling_params=params)
    assert plain.prompt_version_spans == [] and plain.version_spans == [("now", 2)]


def update(engine: Engine, serial: int, door: str) -> None:
    """New weights, while requests run, through one of the doors by which these may go on."""
    if door.startswith("pause"):
        engine.pause("keep" if door == "pause keep" else "recompute")
        engine.update_weights_from_tensor(named_tensors(model(serial)), version=serial)
        engine.resume()
    else:
        engine.update_weights_from_tensor(named_tensors(model(serial)), version=serial, in_flight=door)  # type: ignore[arg-type]


def meet_updates(engine: Engine, door: str, chance: random.Random) -> int:
    """Check all of many requests that met updates; returns how many samples are of several weights."""
    found: dict[str, list[Generation]] = {}
    engine.update_weights_from_tensor(named_tensors(model(0)), version=0)
    threads = start_requests(engine, found)
    for serial in range(1, VERSIONS):
        enough = engine.metrics()["num_steps"] + chance.randint(10, 60)
        while engine.metrics()["num_steps"] < enough and any(thread.is_alive() for thread in threads):
            pass
        update(engine, serial, door)
    for thread in threads:
        thread.join(120)
    assert set(found) == {"samples", "both", "scores"}
    num_mixed = 0
    for name, samples in found.items():
        for each in samples:
            assert bool(each.prompt_logprobs) == (name != "samples")
            num_mixed += check(each, PROMPTS[each.prompt_index], is_kept=door.endswith("keep")) > 1
    return num_mixed


@pytest.mark.parametrize("door", ["keep", "pause keep", "recompute", "pause recompute"])
def test_every_value_is_that_of_the_weights_its_version_names(small_steps: Engine, door: str) -> None:
    chance = random.Random(door)
    assert any(meet_updates(small_steps, door, chance) for _ in range(3)), "no update met a sample"
