"""AReaL's own builder of requests and parser of answers, against a server; and the bodies that tests/server has of it,
against the builder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from areal.api import ModelRequest
from areal.api.cli_args import GenerationHyperparameters
from areal.engine.sglang_remote import SGLangBackend

from headrace import Runtime
from tests.server.builders import SETTINGS, save_random_model

pytestmark = pytest.mark.timeout(600)
RECORDED = json.loads((Path(__file__).parents[2] / "server" / "framework_bodies.json").read_text())["areal"]
BACKEND = SGLangBackend()
IDS = [1, 2, 3]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with Runtime(save_random_model(tmp_path_factory.mktemp("model")), api_key=None, **SETTINGS) as served:
        yield served


def built(**settings: Any) -> Any:
    request = ModelRequest(input_ids=IDS, gconfig=GenerationHyperparameters(max_new_tokens=8, **settings))
    return BACKEND.build_generation_request(request, with_lora=False, version=0)


def answer(runtime: Runtime, request: Any) -> Any:
    reply = httpx.post(runtime.url + request.endpoint, json=request.payload, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_what_was_recorded_is_what_it_builds() -> None:
    requests = {
        "generate": built(ignore_eos=True),
        "greedy": built(greedy=True, stop_token_ids=[7], stop=["x"]),
        "score": BACKEND.build_score_request([1, 2, 3, 4, 5], 2, with_lora=False, version=0),
        "pause": BACKEND.get_pause_request(),
        "resume": BACKEND.get_resume_request(),
    }
    assert {name: {"endpoint": each.endpoint, "payload": each.payload} for name, each in requests.items()} == RECORDED


def test_it_parses_what_is_answered(runtime: Runtime) -> None:
    parsed = BACKEND.parse_generation_response(answer(runtime, built(ignore_eos=True)))
    assert len(parsed.output_tokens) == len(parsed.output_logprobs) == 8 and parsed.stop_reason == "length"
    greedy = [BACKEND.parse_generation_response(answer(runtime, built(greedy=True))) for _ in range(2)]
    assert greedy[0].output_tokens == greedy[1].output_tokens
    stop = built(greedy=True, stop_token_ids=greedy[0].output_tokens[:1])
    stopped = BACKEND.parse_generation_response(answer(runtime, stop))
    assert (len(stopped.output_tokens), stopped.stop_reason) == (1, "stop")


def test_it_scores(runtime: Runtime) -> None:
    drawn = BACKEND.parse_generation_response(answer(runtime, built(greedy=True, ignore_eos=True)))
    whole = IDS + drawn.output_tokens
    request = BACKEND.build_score_request(whole, len(drawn.output_tokens), with_lora=False, version=0)
    scored = BACKEND.parse_score_response(answer(runtime, request), len(drawn.output_tokens))
    assert scored == pytest.approx(drawn.output_logprobs, abs=1e-4)


def test_it_pauses_and_goes_on(runtime: Runtime) -> None:
    answer(runtime, BACKEND.get_pause_request())
    assert httpx.get(f"{runtime.url}/is_paused").json() == {"is_paused": True}
    answer(runtime, BACKEND.get_resume_request())
    assert len(BACKEND.parse_generation_response(answer(runtime, built(ignore_eos=True))).output_tokens) == 8
