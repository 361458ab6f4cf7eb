"""What slime, verl and SkyRL ask of a server of experts, and how they read which ones tokens were given to."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from headrace import Engine, Generation
from headrace.engine import bounds
from headrace.server import native, native_reply
from headrace.text import encoding
from tests.parity.models import make_model
from tests.server.conftest import Served
from tests.server.test_generate import events

IDS = [3, 41, 59, 26, 5, 35, 8, 97, 93]
PARAMS = {"max_new_tokens": 6, "sampling_seed": 7, "ignore_eos": True}
SETTINGS: dict[str, Any] = {"inprocess": True, "skip_tokenizer_init": True, "num_threads": 1, "kv_pool_tokens": 1024}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("experts")
    make_model("mixtral", seed=3).save_pretrained(folder)
    with Engine(folder, page_size=4, keep_routed_experts=True, **SETTINGS) as engine:
        served = Served(engine)
        yield served
        served.close()


def routed_in(served: Served, reply: dict[str, Any], start: int = 0, ids: list[int] = IDS) -> np.ndarray[Any, Any]:
    """As slime's `Sample` takes them, of all tokens but the last: int32 by its count, layers and experts per token."""
    num_layers, num_per_token = served.engine.resolved.model.experts_shape
    numbers = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), "<i4")
    return numbers.reshape(len(ids) + len(reply["output_ids"]) - 1 - start, num_layers, num_per_token)


def test_a_whole_answer_a_part_and_a_stream(experts: Served) -> None:
    [expected] = experts.engine.generate(
        input_ids=IDS,
        sampling_params={"max_new_tokens": 6, "seed": 7, "ignore_eos": True},
        return_routed_experts=True,
    )
    assert expected.routed_experts is not None
    array = expected.routed_experts.array()
    body: dict[str, Any] = {"input_ids": IDS, "sampling_params": PARAMS, "return_routed_experts": True}
    whole = experts.generate(**body, return_logprob=True)
    np.testing.assert_array_equal(routed_in(experts, whole), array)
    part = experts.generate(**body, routed_experts_start_len=4)
    np.testing.assert_array_equal(routed_in(experts, part, start=4), array[4:])
    for is_incremental in (True, False):
        found = events(experts, {**body, "incremental_streaming_output": is_incremental})
        assert ["routed_experts" in each["meta_info"] for each in found] == [False] * (len(found) - 1) + [True]
        found[-1]["output_ids"] = whole["output_ids"]
        np.testing.assert_array_equal(routed_in(experts, found[-1]), array)


def test_a_server_that_keeps_them_answers_as_vllm_does(experts: Served, served: Served) -> None:
    """Unasked, each as base64 of a NumPy file."""
    body = {"token_ids": IDS, "sampling_params": {"max_tokens": 6, "seed": 7, "ignore_eos": True}}
    reply = experts.http.post("/inference/v1/generate", json=body)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    found = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)
    whole = experts.generate(input_ids=IDS, sampling_params=PARAMS, return_routed_experts=True)
    assert choice["token_ids"] == whole["output_ids"]
    np.testing.assert_array_equal(found, routed_in(experts, whole))
    (other,) = served.http.post("/inference/v1/generate", json=body).json()["choices"]
    assert other["routed_experts"] is None


def test_of_nothing_that_was_computed_there_are_none(experts: Served) -> None:
    """A client that goes on where it was may get one token more, and has all experts by then."""
    body = {"input_ids": IDS, "return_routed_experts": True, "routed_experts_start_len": len(IDS)}
    reply = experts.generate(**body, sampling_params={**PARAMS, "max_new_tokens": 1})
    assert len(routed_in(experts, reply, start=len(IDS))) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_many_are_written_beside_the_loop(experts: Served, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    body: dict[str, Any] = {"input_ids": IDS, "sampling_params": PARAMS, "return_routed_experts": True}
    expected = experts.generate(**body)["meta_info"]["routed_experts"]
    threads: list[str] = []
    write = native_reply.SequenceReply.body

    def noted(reply: Any, piece: Generation) -> dict[str, Any]:
        if piece.routed_experts is not None:
            threads.append(threading.current_thread().name)
        return write(reply, piece)

    monkeypatch.setattr(native_reply.SequenceReply, "body", noted)
    for at, (limit, is_beside) in enumerate(((1 << 15, False), (8, True))):
        for module in (native, encoding):
            monkeypatch.setattr(module, "INLINE_CHARACTERS", limit)
        reply = events(experts, body)[-1] if stream else experts.generate(**body)
        assert reply["meta_info"]["routed_experts"] == expected
        assert (threads[at] != "headrace-engine") is is_beside


def test_each_prompt_of_a_batch_asks_for_itself(experts: Served) -> None:
    prompts, asked, starts = [IDS, IDS[:5], IDS[2:]], [True, False, True], [0, 0, 7]
    found = experts.generate(
        input_ids=prompts, sampling_params=PARAMS, return_routed_experts=asked, routed_experts_start_len=starts
    )
    assert ["routed_experts" in each["meta_info"] for each in found] == asked
    for number in (0, 2):
        routed_in(experts, found[number], starts[number], prompts[number])


def test_the_server_says_that_it_keeps_them_and_what_is_asked_wrong(
    experts: Served, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each, expected in ((experts, True), (served, False)):
        assert each.http.get("/server_info").json()["enable_return_routed_experts"] is expected
    asked = {"input_ids": IDS, "return_routed_experts": True}

    def refused(served: Served, body: dict[str, Any]) -> str:
        reply: httpx.Response = served.http.post("/generate", json=body)
        assert reply.status_code == 400, reply.text
        param: str = reply.json()["param"]
        return param

    assert refused(served, asked) == "return_routed_experts"
    assert refused(experts, {**asked, "routed_experts_start_len": 10}) == "routed_experts_start_len"
    assert refused(experts, {**asked, "routed_experts_start_len": [0, 1]}) == "routed_experts_start_len"
    num_layers, num_per_token = experts.engine.resolved.model.experts_shape
    monkeypatch.setattr(bounds, "MAX_ROUTED_EXPERTS", 2 * (len(IDS) + 5) * num_layers * num_per_token - 1)
    both = {**asked, "input_ids": [IDS, IDS], "sampling_params": {"max_new_tokens": 6}}
    assert refused(experts, both) == "return_routed_experts"
    assert len(experts.generate(**{**both, "return_routed_experts": [True, False]})) == 2
    unasked = {"token_ids": IDS, "sampling_params": {"max_tokens": 6, "n": 2}}
    reply = experts.http.post("/inference/v1/generate", json=unasked)
    assert (reply.status_code, reply.json()["param"]) == (400, "max_tokens"), reply.text
