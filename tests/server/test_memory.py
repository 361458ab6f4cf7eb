"""Memory over HTTP, as SGLang's clients ask for it: what slime and verl send, and what they read."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.server.conftest import START, Served

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
SHORT = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0}
LONG = {"max_new_tokens": 900, "ignore_eos": True, "temperature": 0}


def tokens(served: Served) -> Any:
    return served.generate(input_ids=[5, 6, 7], sampling_params=SHORT, return_logprob=True)


def call(served: Served, path: str, **body: Any) -> None:
    """The whole reply is JSON's null: callers parse it."""
    reply = served.http.post(path, json=body)
    assert (reply.status_code, reply.text, reply.json()) == (200, "null", None)


def outputs(served: Served) -> Any:
    return tokens(served)["meta_info"]["output_token_logprobs"]


@pytest.mark.parametrize("nothing", [{}, {"tags": None}, {"tags": []}])
def test_the_order_of_slime(start: START, model_folder: Path, nothing: dict[str, Any]) -> None:
    served = start()
    expected = outputs(served)
    for number in range(2):
        assert served.http.get("/flush_cache").status_code == 200
        for _ in range(2):
            call(served, RELEASE, **nothing)
        assert served.http.get("/ready").status_code == 503
        assert served.http.get("/health").status_code == 200
        assert served.http.get("/model_info").json()["weights_state"] == "released"
        call(served, RESUME, tags=["weights"])
        assert served.http.post("/generate", json={"input_ids": [5]}).status_code == 503
        body = {"model_path": str(model_folder), "weight_version": str(number)}
        served.http.post("/update_weights_from_disk", json=body).raise_for_status()
        for _ in range(2):
            call(served, RESUME, tags=["kv_cache", "cuda_graph"])
        assert served.http.get("/ready").json()["weight_version"] == str(number)
        assert outputs(served) == expected


def test_what_is_released_says_so_and_comes_back(start: START) -> None:
    served = start(settings={"keep_weights_copy": True})
    expected = outputs(served)
    call(served, RELEASE)
    for path, body in (
        ("/weights_checker", {"action": "checksum"}),
        ("/get_weights_by_name", {"name": "model.norm.weight"}),
        ("/update_weight_version", {"new_version": "x"}),
    ):
        reply = served.http.post(path, json=body)
        assert (reply.status_code, reply.headers["retry-after"] != "") == (503, True)
        assert "resume_memory_occupation" in reply.json()["message"]
    call(served, RESUME, restore="copy")
    assert served.http.get("/ready").json()["weight_version"] == "default"
    assert outputs(served) == expected


def test_requests_in_flight_and_requests_that_come(start: START) -> None:
    served = start(settings={"keep_weights_copy": True, "pause_timeout": 0.4})
    replies: list[Any] = []

    def ask(params: dict[str, Any]) -> threading.Thread:
        body = {"input_ids": [5, 6], "sampling_params": params}
        thread = threading.Thread(target=lambda: replies.append(served.http.post("/generate", json=body)))
        thread.start()
        return thread

    running = ask(LONG)
    while served.engine.metrics()["num_generated_tokens"] < 8:
        pass
    call(served, RELEASE)
    running.join(60)
    assert replies[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert replies[0].json()["output_ids"]
    ask(SHORT).join(60)
    assert (replies[1].status_code, "retry-after" in replies[1].headers) == (503, True)
    waiting = ask(SHORT)
    call(served, RESUME)
    waiting.join(60)
    assert len(replies[2].json()["output_ids"]) == 6


def test_an_open_update_is_a_conflict(start: START, model_folder: Path) -> None:
    served = start()
    tensors = load_file(model_folder / "model.safetensors")
    session = served.engine.begin_update("v", [(name, tuple(t.shape), "float32") for name, t in tensors.items()])
    reply = served.http.post(RELEASE, json={})
    assert reply.status_code == 409
    assert f"session {session.session_id}" in reply.json()["message"]
    served.engine.abort_update()
    call(served, RELEASE)
    reply = served.http.post("/update_weights_from_disk", json={"model_path": str(model_folder)})
    assert (reply.status_code, reply.json()["success"]) == (409, False)
    assert "resume_memory_occupation" in reply.json()["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (RELEASE, {"tags": ["kv"]}, "tags"),
        (RELEASE, {"tags": "weights"}, "tags"),
        (RELEASE, {"tags": [["weights"]]}, "tags"),
        (RELEASE, {"tags": ["weights"] * 1000}, "tags"),
        (RELEASE, {"in_flight": "keep"}, "in_flight"),
        (RELEASE, {"timeout_s": -1}, "timeout_s"),
        (RESUME, {"tags": [None]}, "tags"),
        (RESUME, {"restore": "host"}, "restore"),
    ],
)
def test_bad_calls_are_named_and_release_nothing(served: Served, path: str, body: dict[str, Any], field: str) -> None:
    reply = served.http.post(path, json=body)
    assert reply.status_code == 400
    assert field in reply.json()["message"] and reply.json()["param"] == field
    assert served.http.get("/ready").status_code == 200


def test_what_cannot_be_restored_is_a_conflict(start: START) -> None:
    served = start()
    call(served, RELEASE)
    reply = served.http.post(RESUME, json={"restore": "copy"})
    assert (reply.status_code, reply.json()["param"]) == (409, "restore")
    call(served, RESUME, restore="disk")
    tokens(served)
