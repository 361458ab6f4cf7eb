"""Which weights an answer over HTTP names, when they change while it is made."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.builders import save_random_model
from tests.server.conftest import START, Served

IDS = [1 + (7 * position) % 200 for position in range(700)]
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; `newer/` below it has other weights."""
    folder = save_random_model(tmp_path_factory.mktemp("model"), seed=0)
    save_random_model(folder / "newer", seed=1)
    return folder


@pytest.fixture
def changing(start: START, folder: Path) -> Served:
    """A server of small steps."""
    return start(folder, {"max_num_batched_tokens": 4, "overlap_depth": 1})


def update(served: Served, **body: Any) -> None:
    folder = Path(served.engine.config.model) / "newer"
    served.http.post("/update_weights_from_disk", json={"model_path": str(folder), **body}).raise_for_status()


def beside_prompt(served: Served, path: str, body: dict[str, Any]) -> Any:
    """The reply to a request whose prompt is half computed when generation pauses in place and weights change."""
    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.append(httpx.post(served.url + path, json=body, timeout=60)))
    served.http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    thread.start()
    wait_until(served, "num_waiting")
    served.http.post("/continue_generation", json={}).raise_for_status()
    wait_until(served, "num_prefill_tokens", 16)
    served.http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    assert served.engine.metrics()["num_prefill_tokens"] < len(IDS) - 8, "the prompt was over before the update"
    update(served, weight_version="newer")
    served.http.post("/continue_generation", json={}).raise_for_status()
    thread.join(60)
    (reply,) = replies
    assert reply.status_code == 200, reply.text
    return reply.json()


def wait_until(served: Served, metric: str, least: float = 1) -> None:
    deadline = time.monotonic() + 30
    while served.engine.metrics()[metric] < least:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("max_new_tokens", "wants_logprobs"), [(0, False), (3, True), (3, False)])
def test_a_prompt_that_meets_an_update_is_of_the_new_weights(
    changing: Served, max_new_tokens: int, wants_logprobs: bool
) -> None:
    params = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": IDS, "sampling_params": params}
    if wants_logprobs:
        body |= {"return_logprob": True, "logprob_start_len": 0}
    found = beside_prompt(changing, "/generate", body)
    meta, after = found["meta_info"], changing.generate(**body)
    assert meta["weight_version"] == "newer" and found["output_ids"] == after["output_ids"]
    assert meta["version_spans"] == ([["newer", 3]] if max_new_tokens else [])
    assert meta["version_epochs"] == ([1] if max_new_tokens else [])
    is_named = wants_logprobs or not max_new_tokens
    assert meta.get("prompt_version_spans") == ([["newer", len(IDS)]] if is_named else None)
    for key in ("input_token_logprobs", "output_token_logprobs") if wants_logprobs else ():
        ours, theirs = ([value for value, _, _ in each["meta_info"][key]] for each in (found, after))
        np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), atol=1e-4)


def test_a_completion_of_no_tokens_names_the_weights_that_read_it(changing: Served) -> None:
    body = {"prompt": IDS, "max_tokens": 0, "return_meta_info": True}
    found = beside_prompt(changing, "/v1/completions", body)
    assert found["metadata"] == {"weight_version": "newer"}
    assert found["choices"][0]["meta_info"]["prompt_version_spans"] == [["newer", len(IDS)]]


def test_an_answer_that_nothing_was_computed_for_names_the_live_weights(changing: Served) -> None:
    changing.http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    replies: list[Any] = []
    thread = threading.Thread(
        target=lambda: replies.append(httpx.post(changing.url + "/generate", json={"input_ids": [1]}))
    )
    thread.start()
    wait_until(changing, "num_waiting")
    update(changing, weight_version="newer")
    changing.http.post("/abort_request", json={"abort_all": True}).raise_for_status()
    thread.join(60)
    assert replies[0].json()["meta_info"]["weight_version"] == "newer"


def events(lines: Iterator[str]) -> Iterator[Any]:
    return (json.loads(line[6:]) for line in lines if line.startswith("data: {"))


def update_beside(served: Served) -> None:
    """Other weights under the same label, by a client of its own; running requests keep their KV. They stand still
    meanwhile, so that none is over before."""
    values = {"model_path": str(Path(served.engine.config.model) / "newer"), "in_flight": "keep"}
    with httpx.Client(base_url=served.url, timeout=60) as client:
        client.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
        client.post("/update_weights_from_disk", json=values).raise_for_status()
        client.post("/continue_generation", json={}).raise_for_status()


@pytest.mark.parametrize("is_incremental", [False, True])
def test_a_label_given_again_by_default_begins_a_span(start: START, folder: Path, is_incremental: bool) -> None:
    served = start(folder, incremental_streaming_output=is_incremental)
    params = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"input_ids": [1], "sampling_params": params, "stream": True}
    with served.http.stream("POST", "/generate", json=body) as reply:
        lines = events(reply.iter_lines())
        pieces = [next(lines)]
        update_beside(served)
        pieces += lines
    metas = [piece["meta_info"] for piece in pieces]
    assert {meta["weight_versions"] for meta in metas[:-1]} <= {None}
    first, second = metas[-1]["weight_versions"]  # of the whole, however it was streamed
    assert first == {"version": "default", "start": 0, "end": second["start"]} and second["end"] == NUM_TOKENS
    if not is_incremental:
        spans, epochs = metas[-1]["version_spans"], metas[-1]["version_epochs"]
        assert [version for version, _ in spans] == ["default", "default"]
        assert sum(count for _, count in spans) == NUM_TOKENS and epochs == [0, 1]
        return
    for piece, meta in zip(pieces, metas, strict=True):  # of what is new in this event, as its ids
        assert sum(count for _, count in meta["version_spans"]) == len(piece["output_ids"])
        assert len(meta["version_spans"]) == len(meta["version_epochs"]) and meta["weight_version"] == "default"
    epochs = [epoch for meta in metas for epoch in meta["version_epochs"]]
    assert epochs == sorted(epochs) and set(epochs) == {0, 1}
    assert metas[-1]["completion_tokens"] == NUM_TOKENS


def test_chunks_of_an_openai_stream_say_the_epoch_of_their_spans(changing: Served) -> None:
    body = {"prompt": [1], "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, "return_meta_info": True}
    epochs: list[int] = []
    with changing.http.stream("POST", "/v1/completions", json=body) as reply:
        for number, chunk in enumerate(events(reply.iter_lines())):
            meta = chunk["choices"][0]["meta_info"]
            for epoch, (_, count) in zip(meta["version_epochs"], meta["version_spans"], strict=True):
                epochs += [epoch] * count
            if number == 0:
                update_beside(changing)
    assert len(epochs) == NUM_TOKENS and sorted(set(epochs)) == [0, 1] and epochs == sorted(epochs)
