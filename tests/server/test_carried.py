"""Calls that are cut anywhere and go on by what a router would have of them: in every dialect the answer is that of a
call which was never cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from headrace import Engine
from headrace.engine import GenerateItem
from headrace.server.carrying import CarriedCall
from headrace.types.carried import MAX_PIECES, CarriedBefore, CarriedPart, PackedGeneration
from headrace.types.errors import (
    DeadlineError,
    EngineDeadError,
    HeadraceError,
    PauseTimeoutError,
    ShutdownError,
    UpdateConflictError,
)
from headrace.types.generation import ChatReply, Generation, RoutedExperts
from headrace.types.http import StreamPart
from tests.in_pieces import in_pieces
from tests.server.builders import SETTINGS
from tests.server.conftest import Served

MESSAGES = [{"role": "user", "content": "Say it."}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
SAMPLED = {"temperature": 1.0, "seed": 11}
OPENAI = {**SAMPLED, "max_tokens": 8, "n": 2, "return_token_ids": True, "return_meta_info": True}
UNLIKE = {
    *("e2e_latency", "response_sent_to_client_ts", "request_received_ts", "request_finished_ts", "queue_time"),
    *("forward_entry_time", "prefill_finished_time", "decode_throughput"),
    *("num_resumed", "num_retractions", "cached_tokens", "prompt_tokens_details"),
}
"""What may differ: times, and what was found in the cache."""


@pytest.fixture(scope="module")
def exact(model_folder: Path) -> Iterator[Served]:
    with Engine(model_folder, inprocess=True, numerics="invariant", **SETTINGS) as engine:
        server = Served(engine)
        yield server
        server.close()


def frames_of(raw: bytes) -> list[bytes]:
    """What stands behind each length."""
    found = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return found


def parts_of(reply: httpx.Response, kind: str) -> list[CarriedPart]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-headrace-carried"] == kind
    parts = [msgspec.msgpack.decode(each, type=CarriedPart) for each in frames_of(reply.content)]
    assert [each.is_last for each in parts] == [False] * (len(parts) - 1) + [True]
    return parts


def before_of(parts: list[CarriedPart], num_moves: int = 1) -> bytes:
    """What a router has of parts that came."""
    pieces = b"".join(each.pieces for each in parts)
    num = sum(each.num_pieces for each in parts)
    raw = msgspec.Raw(b"\xdd" + num.to_bytes(4, "big") + pieces)
    behind = [bool(each.told) if not each.num_pieces else None for each in parts]
    num_told = sum(filter(None, behind[len(behind) - behind[::-1].index(None) :]))
    last = parts[-1]
    return msgspec.msgpack.encode((raw, last.begun_at, last.name, num_moves, num_told))


class Carried:
    """One call, as a router has it."""

    def __init__(self, server: Served, path: str, body: dict[str, Any], kind: str) -> None:
        self.server, self.path, self.kind = server, path, kind
        self.body = json.dumps(body).encode()

    def ask(self, came: list[CarriedPart] | None = None, num_moves: int = 1) -> list[CarriedPart]:
        """All parts, or those behind what came."""
        before = b"" if came is None else before_of(came, num_moves)
        headers = {"x-headrace-carry": "all"} | ({} if came is None else {"x-headrace-continues": str(len(before))})
        return parts_of(self.server.http.post(self.path, content=before + self.body, headers=headers), self.kind)

    def told(self, parts: list[CarriedPart]) -> bytes:
        return b"".join(each.told for each in parts)


def cuts_of(parts: list[CarriedPart]) -> list[int]:
    """Where a call can be cut that has told something by then."""
    return [k for k in range(1, len(parts)) if any(each.num_pieces for each in parts[:k])]


def check_cuts(call: Carried, fold: Callable[[bytes], Any], least: int = 5) -> Any:
    """However it is cut, also twice, it is told as if it never was. Returns that."""
    parts = in_pieces(call.ask, least, cuts_of)
    whole = fold(call.told(parts))
    for cut in cuts_of(parts):
        came = parts[:cut]
        rest = call.ask(came)
        assert fold(call.told(came + rest)) == whole, cut
        if len(rest) > 3 and cut % 3 == 0:
            came = [*came, *rest[: len(rest) // 2]]
            assert fold(call.told(came + call.ask(came, 2))) == whole, cut
    return whole


def events_of(raw: bytes) -> list[Any]:
    *pieces, last, rest = raw.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in pieces]


def alike(value: Any) -> Any:
    """Without what may differ."""
    if isinstance(value, dict):
        return {key: alike(each) for key, each in value.items() if key not in UNLIKE}
    return [alike(each) for each in value] if isinstance(value, list) else value


def grown(old: Any, new: Any) -> Any:
    """Two values of one field of a choice, of which the second follows the first."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **new, **{key: grown(old[key], new[key]) for key in old.keys() & new.keys()}}
    if new is None:
        return old
    return old + new if isinstance(old, list) else new


def spans_joined(spans: list[list[Any]]) -> int:
    return sum(num for _, num in spans)


def folded(raw: bytes) -> Any:
    """A stream of an OpenAI route as one answer: each choice's fields joined, and what its last events say."""
    choices: dict[int, dict[str, Any]] = {}
    usages: dict[Any, Any] = {}
    heads, last_usage = set(), None
    for event in events_of(raw):
        heads.add((event["id"], event["created"], event["object"], event["model"]))
        if not event["choices"]:
            assert last_usage is None
            last_usage = event["usage"]
        for choice in event["choices"]:
            found = choices.setdefault(choice["index"], {"roles": 0, "content": "", "text": "", "calls": []})
            assert found.get("finish_reason") is None
            delta = choice.get("delta") or {}
            found["roles"] += "role" in delta
            found["content"] += delta.get("content") or ""
            found["calls"] += [{**each, "id": ""} for each in delta.get("tool_calls") or []]
            found["text"] += choice.get("text") or ""
            for key in ("token_ids", "logprobs"):
                found[key] = grown(found.get(key), choice.get(key))
            meta = choice.get("meta_info") or {}
            found["num_in_spans"] = found.get("num_in_spans", 0) + spans_joined(meta.get("version_spans", []))
            found["seed"] = meta.get("seed", found.get("seed"))
            found |= {key: choice[key] for key in ("finish_reason", "matched_stop") if key in choice}
            usages[choice["index"]] = event.get("usage")
    assert len(heads) == 1
    return alike({"head": next(iter(heads)), "choices": choices, "usages": usages, "usage": last_usage})


COMPLETION = {**OPENAI, "prompt": ["Once", "Twice upon"], "logprobs": 2}


def stop_of(server: Served, body: dict[str, Any]) -> str:
    """A text of two characters that ends one of its samples in the middle."""
    reply = server.http.post("/v1/completions", json=body).json()
    text = max((each["text"] for each in reply["choices"]), key=len)
    middle = len(text) // 2
    return str(text[middle : middle + 3])


@pytest.mark.parametrize("more", [{}, {"logprobs": None}], ids=["logprobs", "without"])
def test_a_stream_of_completions(exact: Served, more: dict[str, Any]) -> None:
    body = {**COMPLETION, **more, "stop": [stop_of(exact, COMPLETION)], "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    whole = check_cuts(Carried(exact, "/v1/completions", body, "stream"), folded)
    reasons = {each["finish_reason"] for each in whole["choices"].values()}
    assert len(whole["choices"]) == 4 and "stop" in reasons and whole["usage"]["completion_tokens"] > 14
    for choice in whole["choices"].values():
        num = len(choice["token_ids"])
        assert choice["num_in_spans"] == num and choice["seed"] is not None
        if "logprobs" not in more:
            assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == num


@pytest.mark.parametrize("has_logprobs", [True, False])
def test_a_stream_of_chat(exact: Served, has_logprobs: bool) -> None:
    asked = {"logprobs": True, "top_logprobs": 2} if has_logprobs else {}
    body = {**OPENAI, **asked, "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    whole = check_cuts(Carried(exact, "/v1/chat/completions", body, "stream"), folded)
    assert whole["usage"]["completion_tokens"] == 16
    for choice in whole["choices"].values():
        assert choice["roles"] == 1 and choice["finish_reason"] == "length" and len(choice["token_ids"]) == 8
        assert not has_logprobs or len(choice["logprobs"]["content"]) == 8


def test_a_call_of_a_tool(scripted: Served) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "temperature": 0, "stream": True, "max_tokens": 30}
    whole = check_cuts(Carried(scripted, "/v1/chat/completions", body, "stream"), folded, least=4)
    (choice,) = whole["choices"].values()
    (told,) = choice["calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["content"].strip() == "I will add."
    assert json.loads(told["function"]["arguments"]) == {"a": 1, "b": 2} and told["index"] == 0


NATIVE: dict[str, Any] = {
    "text": ["Once", "Twice upon"],
    "sampling_params": {"temperature": 1.0, "sampling_seed": 11, "max_new_tokens": 6, "n": 2},
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 2,
    "return_text_in_logprobs": True,
}


def test_a_cumulative_native_stream(exact: Served) -> None:
    def last(raw: bytes) -> Any:
        """The last event of each sample; none has less than the one before."""
        found: dict[int, Any] = {}
        for event in events_of(raw):
            num = len(found.get(event["index"], {"output_ids": ()})["output_ids"])
            assert len(event["output_ids"]) > num
            found[event["index"]] = event
        return alike(found)

    whole = check_cuts(Carried(exact, "/generate", {**NATIVE, "stream": True}, "stream"), last)
    for each in whole.values():
        meta = each["meta_info"]
        assert len(each["output_ids"]) == len(meta["output_top_logprobs"]) == meta["completion_tokens"] == 6
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]


def test_a_native_stream_of_what_is_new(exact: Served) -> None:
    def joined(raw: bytes) -> Any:
        found: dict[int, Any] = {}
        for event in events_of(raw):
            old = found.setdefault(event["index"], {"text": "", "output_ids": [], "logprobs": [], "input": []})
            meta = event["meta_info"]
            old["text"] += event["text"]
            old["output_ids"] += event["output_ids"]
            old["logprobs"] += meta["output_token_logprobs"]
            old["input"] += meta["input_token_logprobs"]
            assert meta["completion_tokens"] == len(old["output_ids"])
            old["end"] = {key: meta[key] for key in ("finish_reason", "weight_versions", "id", "seed", "prompt_tokens")}
        return found

    body = {**NATIVE, "stream": True, "incremental_streaming_output": True, "rid": ["a", "b"]}
    whole = check_cuts(Carried(exact, "/generate", body, "stream"), joined)
    assert {each["end"]["id"] for each in whole.values()} == {"a_0", "a_1", "b_0", "b_1"}


CLIENT_CALL: dict[str, Any] = {
    "prompts": ["Once", "Twice upon"],
    "sampling_params": {"temperature": 1.0, "seed": 11, "max_new_tokens": 6, "n": 2},
    "options": {"top_logprobs": 2, "request_id": "own"},
}


def test_a_stream_of_our_client(exact: Served) -> None:
    def joined(raw: bytes) -> Any:
        parts = [msgspec.msgpack.decode(each, type=StreamPart) for each in frames_of(raw)]
        assert parts.pop().is_last
        found: dict[Any, dict[str, Any]] = {}
        for piece in (each for part in parts for each in part.pieces):
            old = found.setdefault((piece.request_id, piece.index), {"text": "", "ids": [], "logprobs": [], "top": []})
            old["text"] += piece.text
            old["ids"] += piece.token_ids
            old["logprobs"] += piece.logprobs
            old["top"] += piece.top_logprobs
            old["end"] = piece.finish_reason, piece.num_prompt_tokens, piece.seed
        return found

    whole = check_cuts(Carried(exact, "/headrace/generate", {**CLIENT_CALL, "stream": True}, "stream"), joined)
    assert len(whole) == 4 and all(len(each["top"]) == 6 for each in whole.values())


def test_what_is_refused_alone_stays_so_without_a_seed(exact: Served) -> None:
    def last(raw: bytes) -> Any:
        return alike({event["index"]: event for event in events_of(raw)})

    params = {"max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 11}
    body = {"input_ids": [[1 << 20], [3, 1, 4]], "sampling_params": params, "stream": True, "return_errors": True}
    whole = check_cuts(Carried(exact, "/generate", {**body, "rid": ["a", "b"]}, "stream"), last)
    assert whole[0]["meta_info"]["finish_reason"]["param"] == "input_ids[0]" and whole[0]["meta_info"]["seed"] is None
    assert len(whole[1]["output_ids"]) == 5 and whole[1]["meta_info"]["seed"] is not None


def test_a_stream_without_a_seed_goes_on_with_the_one_it_had(exact: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 14, "temperature": 1.0, "stream": True, "return_token_ids": True}
    check_cuts(Carried(exact, "/v1/completions", body, "stream"), folded)


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {**COMPLETION, "prompt_logprobs": 1}),
    "chat": ("/v1/chat/completions", {**OPENAI, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    "native": ("/generate", NATIVE),
    "client": ("/headrace/generate", {**CLIENT_CALL, "scores": False}),
    "client chat": ("/headrace/chat", {"messages": MESSAGES, "sampling_params": CLIENT_CALL["sampling_params"]}),
    "vllm": (
        "/inference/v1/generate",
        {"token_ids": [3, 1, 4], "sampling_params": {**SAMPLED, "max_tokens": 8, "logprobs": 1}},
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_answers(exact: Served, name: str) -> None:
    path, body = WHOLE[name]

    def read(raw: bytes) -> Any:
        if path.startswith("/headrace"):
            kind: Any = list[ChatReply] if path.endswith("chat") else list[Generation]
            found = [getattr(each, "sample", each) for each in msgspec.msgpack.decode(raw, type=kind)]
            return [msgspec.structs.replace(each, num_cached_tokens=0, request_id="") for each in found]
        return without_names(alike(json.loads(raw)))

    def without_names(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: without_names(each) for key, each in value.items() if key not in ("id", "created", "request_id")
            }
        return [without_names(each) for each in value] if isinstance(value, list) else value

    call = Carried(exact, path, body, "whole")
    whole = check_cuts(call, read)
    assert whole == read(exact.http.post(path, json=body).content)
    (head,) = [each for each in call.ask() if each.status]
    assert head.status == 200 and "content-type" in head.headers


def test_a_call_that_is_not_to_be_carried_is_answered_as_ever(exact: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 4}
    reply = exact.http.post("/v1/completions", json=body, headers={"x-headrace-carry": "streams"})
    assert "x-headrace-carried" not in reply.headers and len(reply.json()["choices"]) == 1
    reply = exact.http.post("/v1/completions", json={**body, "n": 0}, headers={"x-headrace-carry": "all"})
    assert reply.status_code == 400 and "x-headrace-carried" not in reply.headers


def before(num: int = 1, call: dict[str, Any] | None = None, **changed: Any) -> bytes:
    made: dict[str, Any] = {
        "request_id": "r",
        "token_ids": [5, 6],
        "logprobs": [0.0, 0.0],
        "version_spans": [("default", 2)],
    }
    made |= {"version_epochs": [0], "num_prompt_tokens": 3, "seed": 1}
    piece = PackedGeneration(**{**made, **changed})
    raw = msgspec.Raw(msgspec.msgpack.encode((0, piece)))
    return msgspec.msgpack.encode(
        CarriedBefore([raw] * num, **{"begun_at": 1.0, "name": "r", "num_moves": 1, "num_told": 0, **(call or {})})
    )


NOT_MADE = {
    "no before": b"x",
    "ids": before(token_ids=[5, 1 << 20]),
    "negative": before(token_ids=[5, -1]),
    "few logprobs": before(logprobs=[0.0]),
    "spans": before(version_spans=[("default", 1)]),
    "a span of none": before(version_spans=[("default", 2), ("x", 0)], version_epochs=[0, 0]),
    "epochs": before(version_epochs=[]),
    "tops": before(top_logprobs=[{1: 0.0}]),
    "prompt": before(num_prompt_tokens=4),
    "too many": before(token_ids=[5] * 9, logprobs=[0.0] * 9, version_spans=[("default", 9)]),
    "seed": before(seed=-1),
    "tops of no token": before(top_logprobs=[{1 << 40: 0.0}] * 2),
    "kept ids": before(kept_token_ids=[[1]] * 2),
    "ids of a prompt": before(prompt_top_logprobs=[None, {1 << 40: 0.0}, None]),
    "experts": before(finish_reason="length", routed_experts=RoutedExperts(0, 3, 7, b"abc")),
    "no name": before(request_id=""),
    "a long name": before(finish_reason="length", request_id="x" * (1 << 20)),
    "another index": before(index=1),
    "another prompt": before(finish_reason="length", prompt_index=1),
    "never begun": before(call={"begun_at": float("nan")}),
    "told less than nothing": before(call={"num_told": -1}),
    "endless": before(num=MAX_PIECES + 1, text=""),
    "scores": before(prompt_logprobs=[0.0]),
}


@pytest.mark.parametrize("name", NOT_MADE)
def test_what_no_engine_has_made_is_refused(exact: Served, name: str) -> None:
    raw = NOT_MADE[name]
    body = json.dumps({"input_ids": [3, 1, 4], "sampling_params": {"max_new_tokens": 8}, "stream": True}).encode()
    headers = {"x-headrace-carry": "streams", "x-headrace-continues": str(len(raw))}
    reply = exact.http.post("/generate", content=raw + body, headers=headers)
    assert reply.status_code == 400 and reply.json()["param"] == "before", reply.text


def test_what_is_asked_for_beside_the_tokens_is_not_left_out(exact: Served) -> None:
    raw = before()
    headers = {"x-headrace-carry": "all", "x-headrace-continues": str(len(raw))}
    for stream in (False, True):
        body = json.dumps({"prompt": [3, 1, 4], "max_tokens": 8, "logprobs": 1, "stream": stream}).encode()
        reply = exact.http.post("/v1/completions", content=raw + body, headers=headers)
        assert reply.status_code == 400 and reply.json()["param"] == "before", reply.text


def test_a_deadline_that_passes_is_no_death_of_an_engine() -> None:
    """Its replica is not to leave the rotation, nor is the call to begin another time elsewhere."""

    async def send(message: Any) -> None:
        sent.append(message)

    async def story(error: HeadraceError) -> bool:
        call = CarriedCall(send, carries_all=False, before=None)
        call.item(0, GenerateItem(stream=True))
        await call.send({"type": "http.response.start", "status": 200, "headers": []})
        call.note_failure(error)
        await call.send({"type": "http.response.body", "body": b"x", "more_body": True})
        (frame,) = frames_of(sent[-1]["body"])
        return msgspec.msgpack.decode(frame, type=CarriedPart).is_lost

    sent: list[Any] = []
    errors = (EngineDeadError, ShutdownError, DeadlineError, PauseTimeoutError, UpdateConflictError)
    assert [asyncio.run(story(each("x"))) for each in errors] == [True, True, False, False, False]


def test_a_piece_is_packed_whole() -> None:
    values: dict[str, Any] = {"request_id": "r", "token_ids": [1], "logprobs": [-1.0], "top_logprobs": [{3: -2.0}]}
    piece = Generation(**values, routed_experts=RoutedExperts(0, 1, 1, b"ab"), prompt_logprobs=[None, -1.0], text="é")
    raw = msgspec.msgpack.encode(msgspec.structs.astuple(piece))
    found = msgspec.msgpack.decode(raw, type=PackedGeneration)
    assert msgspec.structs.asdict(found) == msgspec.structs.asdict(piece)
