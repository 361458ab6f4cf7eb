"""What small bodies multiply: names by samples, messages by requests, prompts by the work on each."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from typing import Any

import pytest

from headrace import Engine
from headrace.engine import GenerateItem, pacing
from headrace.engine.client import CoreClient
from headrace.server import native_types, openai_chat, openai_models
from headrace.server.coerce import MAX_READING_BYTES
from headrace.server.openai_models import MAX_DETOKENIZE_IDS
from headrace.types.errors import RequestError
from headrace.types.messages import Abort
from tests.server.conftest import Served

ONE = {"max_new_tokens": 1}


@pytest.mark.parametrize("rid", ["r" * 100_000, ["a", "r" * 100_000]])
def test_a_name_is_bounded_before_it_is_repeated(served: Served, rid: str | list[str]) -> None:
    ids = [5] if isinstance(rid, str) else [[5], [5]]
    reply = served.http.post("/generate", json={"input_ids": ids, "rid": rid, "sampling_params": {"n": 4096, **ONE}})
    assert (reply.status_code, reply.json()["param"]) == (400, "rid")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="at most"):
            native_types._names(rid, [4096] * len(ids), True, None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("field", ["rid", "extra_key"])
def test_names_are_bounded_at_every_door(served: Served, path: str, field: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/generate": {"input_ids": [5], "sampling_params": {"n": 64, **ONE}},
        "/v1/completions": {"prompt": [5], "n": 64, "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "n": 64, "max_tokens": 1},
    }
    reply = served.http.post(path, json={**bodies[path], field: "x" * 2000})
    assert (reply.status_code, reply.json()["param"]) == (400, field)


def test_an_abort_message_is_short_and_sent_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = served.http.post("/abort_request", json={"abort_all": True, "abort_message": "m" * 2000})
    assert (reply.status_code, reply.json()["param"]) == (400, "abort_message")
    with pytest.raises(RequestError) as caught:
        served.engine.abort(all=True, message="m" * 2000)
    assert caught.value.field == "message"
    sent: list[Any] = []
    send = CoreClient._send

    def noted(client: CoreClient, command: Any) -> None:
        sent.append(command)
        send(client, command)

    monkeypatch.setattr(CoreClient, "_send", noted)
    replies: list[Any] = []
    body = {"input_ids": [5], "sampling_params": {"n": 4, "max_new_tokens": 900, "ignore_eos": True}}
    caller = threading.Thread(target=lambda: replies.append(served.http.post("/generate", json=body).json()))
    caller.start()
    while not served.engine.abort(all=True, message="enough of it"):
        pass
    served.engine.abort(all=True, message="enough of it")
    caller.join(60)
    reasons = [each["meta_info"]["finish_reason"] for each in replies[0]]
    assert all(reason["type"] == "abort" and reason["message"] == "enough of it" for reason in reasons)
    aborts = [command for command in sent if isinstance(command, Abort)]
    assert aborts and not any(command.message for command in aborts)


def test_a_pause_that_aborts_has_its_own_message(served: Served) -> None:
    replies: list[Any] = []
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
    caller = threading.Thread(target=lambda: replies.append(served.http.post("/generate", json=body).json()))
    caller.start()
    while served.http.get("/get_load").json()[0]["num_reqs"] == 0:
        pass
    served.engine.pause("abort")
    served.engine.resume()
    caller.join(60)
    assert replies[0]["meta_info"]["finish_reason"]["message"]


@pytest.mark.parametrize("path", ["/get_weights_by_name", "/weights_checker"])
def test_a_get_has_a_small_body(served: Served, path: str) -> None:
    body = json.dumps({"name": "model.norm.weight", "action": "checksum"}).encode()
    for content in (body + b" " * MAX_READING_BYTES, iter([b" " * 1000] * 20)):
        reply = served.http.request("GET", path, content=content)
        assert (reply.status_code, reply.json()["param"]) == (413, "body")
    assert served.http.request("GET", path, content=body).status_code == 200


def test_a_tensor_has_a_short_name(served: Served) -> None:
    assert served.http.post("/get_weights_by_name", json={"name": "x" * 100_000}).status_code == 400


@pytest.mark.parametrize("rows", [[5] * (MAX_DETOKENIZE_IDS + 1), [[5] * 20] * (1 << 16)])
def test_the_ids_of_detokenize_are_bounded(served: Served, rows: list[Any]) -> None:
    reply = served.http.post("/detokenize", json={"tokens": rows})
    assert (reply.status_code, reply.json()["param"]) == (400, "tokens")


def test_the_text_of_detokenize_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the tokens are, before any is decoded."""
    monkeypatch.setattr(openai_models, "MAX_DETOKENIZE_CHARACTERS", 20)
    ids = served.http.post("/tokenize", json={"prompt": "twenty letters or so"}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": ids}).status_code == 200
    reply = served.http.post("/detokenize", json={"tokens": [ids, ids]})
    assert (reply.status_code, reply.json()["param"]) == (400, "tokens")


@pytest.mark.parametrize(("module", "path"), [(openai_chat, "/v1/chat/completions"), (openai_models, "/tokenize")])
def test_arguments_of_calls_are_read_off_the_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch, module: Any, path: str
) -> None:
    seen: list[int] = []
    original = module.normalize_messages

    def noted(messages: Any) -> Any:
        seen.append(threading.get_ident())
        return original(messages)

    monkeypatch.setattr(module, "normalize_messages", noted)
    function = {"name": "f", "arguments": '{"a": [' + "[]," * 20_000 + "1]}"}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": function}]}]
    served.http.post(path, json={"messages": messages, "max_tokens": 1})

    async def identify() -> int:
        return threading.get_ident()

    loop = asyncio.run_coroutine_threadsafe(identify(), served.engine.asynchronous.loop).result()
    assert seen and loop not in seen
    function["arguments"] = '{"a": [' + "[]," * 300_000 + "1]}"
    assert served.http.post(path, json={"messages": messages, "max_tokens": 1}).status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [[5]] * 100, "sampling_params": ONE}),
        ("/generate", {"input_ids": [5], "sampling_params": {"n": 100, **ONE}}),
        ("/generate", {"text": ["a"] * 100, "return_errors": True, "sampling_params": [{"n": -1}] * 100}),
        ("/v1/completions", {"prompt": [[5]] * 100, "max_tokens": 1}),
        ("/v1/completions", {"prompt": [5], "n": 100, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 100, "max_tokens": 1}),
    ],
)
def test_many_sequences_leave_the_loop_to_others(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(pacing, "TURN_SECONDS", -1.0)
    engine, turn, num_by_turn = served.engine.asynchronous, 0, dict[tuple[int, str], int]()

    def noting(what: str, call: Any) -> Any:
        def noted(item: GenerateItem) -> Any:
            num_by_turn[turn, what] = num_by_turn.get((turn, what), 0) + 1
            return call(item)

        return noted

    async def tick() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    for what in ("prepare", "submit"):
        monkeypatch.setattr(engine, what, noting(what, getattr(engine, what)))
    ticking = asyncio.run_coroutine_threadsafe(tick(), engine.loop)
    try:
        assert served.http.post(path, json=body).status_code == 200
    finally:
        ticking.cancel()
    assert sum(count for (_, what), count in num_by_turn.items() if what == "submit") == 100
    assert max(num_by_turn.values()) <= 16


def test_few_of_many_unknown_keys_are_named(served: Served) -> None:
    body = {"input_ids": [5], "sampling_params": ONE, **{f"k{i:04}": 1 for i in range(1000)}}
    warnings = served.generate(**body)["meta_info"]["warnings"]
    assert len(warnings) == 33 and "'k0000'" in warnings[0] and "968 more" in warnings[-1]


def test_an_engine_in_python_bounds_them_too(served: Served) -> None:
    engine: Engine = served.engine
    with pytest.raises(RequestError) as caught:
        engine.generate(input_ids=[5], sampling_params={"n": 64, **ONE}, request_id="r" * 2000)
    assert caught.value.field == "request_id"
