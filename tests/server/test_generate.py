"""`/generate` field by field, against the engine's own Python interface."""

from __future__ import annotations

import json
import time
import weakref
from typing import Any

import httpx
import pytest

from headrace import Generation
from headrace.engine import GenerateItem, Stream
from headrace.server import native
from headrace.server.native_reply import SequenceReply
from headrace.server.state import ServerState
from headrace.server.wire import event
from tests.in_pieces import in_pieces
from tests.server.conftest import Served

IDS = [10, 20, 30, 40, 50]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def direct(served: Served, **arguments: Any) -> Generation:
    return served.engine.generate(input_ids=IDS, **arguments)[0]


def events(served: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    with served.http.stream("POST", "/generate", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def test_every_field_of_a_single_reply(served: Served) -> None:
    expected = direct(served, sampling_params=GREEDY)
    before = time.time()
    reply = served.generate(input_ids=IDS, sampling_params=GREEDY, return_logprob=True, rid="mine")
    assert set(reply) == {"text", "output_ids", "meta_info"}
    assert reply["output_ids"] == expected.token_ids
    assert reply["text"] == expected.text
    meta = reply["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["reasoning_tokens"]) == (5, 6, 0)
    assert meta["cached_tokens"] in range(6)
    assert meta["weight_version"] == "default"
    assert meta["version_spans"] == [["default", 6]]
    assert (meta["num_retractions"], meta["dp_rank"]) == (0, 0)
    triples = [[logprob, token, None] for logprob, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert [triple[1:] for triple in meta["output_token_logprobs"]] == [triple[1:] for triple in triples]
    values = [triple[0] for triple in meta["output_token_logprobs"]]
    assert values == pytest.approx(expected.logprobs, abs=1e-5)
    assert meta["output_token_logprobs_length"] == 6
    assert meta["input_token_logprobs"] == []
    assert (meta["logprob_mode"], meta["prompt_logprob_mode"]) == ("temperature", "raw")
    assert 0 < meta["e2e_latency"] < 60
    assert before <= meta["response_sent_to_client_ts"] <= time.time()
    names = ("request_received_ts", "forward_entry_time", "prefill_finished_time", "request_finished_ts")
    assert before - 0.1 <= meta[names[0]] and [meta[name] for name in names] == sorted(meta[name] for name in names)
    assert meta["queue_time"] == pytest.approx(meta["forward_entry_time"] - meta["request_received_ts"])
    assert meta["decode_throughput"] > 0
    assert "warnings" not in meta


def test_logprobs_come_only_when_asked_for(served: Served) -> None:
    meta = served.generate(input_ids=IDS, sampling_params=GREEDY)["meta_info"]
    assert not [key for key in meta if "logprobs" in key]


def test_the_seed_in_a_reply_draws_the_same_sample(served: Served) -> None:
    params = {"max_new_tokens": 12, "ignore_eos": True}
    first = served.generate(input_ids=IDS, sampling_params=params)
    again = {**params, "sampling_seed": first["meta_info"]["seed"]}
    assert served.generate(input_ids=IDS, sampling_params=again)["output_ids"] == first["output_ids"]


def test_prompt_and_top_and_asked_logprobs(served: Served) -> None:
    scores = served.engine.score(input_ids=IDS)[0].prompt_logprobs
    meta = served.generate(
        input_ids=IDS,
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
        token_ids_logprob=[7, 8],
    )["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert meta["weight_version"] == "default"
    assert [triple[1:] for triple in meta["input_token_logprobs"]] == [[token, None] for token in IDS]
    assert meta["input_token_logprobs"][0][0] is None
    assert [triple[0] for triple in meta["input_token_logprobs"][1:]] == pytest.approx(scores[1:], abs=1e-5)
    assert meta["input_top_logprobs"][0] is None
    assert meta["input_token_ids_logprobs"][0] is None
    assert [len(row) for row in meta["input_top_logprobs"][1:]] == [3] * 4
    assert [[entry[1] for entry in row] for row in meta["input_token_ids_logprobs"][1:]] == [[7, 8]] * 4
    assert meta["output_token_logprobs"] == []


def test_logprobs_from_a_position_on(served: Served) -> None:
    body = {"sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": 2}
    meta = served.generate(input_ids=IDS, **body)["meta_info"]
    assert [triple[1] for triple in meta["input_token_logprobs"]] == IDS[2:]
    assert all(triple[0] is not None for triple in meta["input_token_logprobs"])


def test_output_top_and_asked_logprobs_with_text(served: Served) -> None:
    reply = served.generate(
        input_ids=IDS,
        sampling_params=GREEDY,
        return_logprob=True,
        top_logprobs_num=2,
        token_ids_logprob=[5],
        return_text_in_logprobs=True,
    )
    meta = reply["meta_info"]
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    for own, top, asked in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], meta["output_token_ids_logprobs"], strict=True
    ):
        assert own[2] == tokenizer.token_text(own[1])
        assert len(top) == 2 and top[0][0] >= top[1][0]
        assert top[0][1] == own[1], "greedy takes the most probable token"
        assert top[0][0] == pytest.approx(own[0], abs=1e-6)
        assert asked[0][1] == 5


def test_text_prompts_and_stop_strings(served: Served) -> None:
    whole = served.generate(text="The wheel", sampling_params={**GREEDY, "max_new_tokens": 24})
    text = whole["text"]
    stop = text[8:10]
    cut = served.generate(text="The wheel", sampling_params={**GREEDY, "max_new_tokens": 24, "stop": stop})
    assert cut["text"] == text[: text.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert whole["output_ids"][: len(cut["output_ids"])] == cut["output_ids"]
    kept = served.generate(
        text="The wheel", sampling_params={**GREEDY, "max_new_tokens": 24, "stop": [stop], "no_stop_trim": True}
    )
    assert kept["text"].startswith(text[: text.index(stop)] + stop)


def test_a_stop_token_is_counted_and_named(served: Served) -> None:
    whole = served.generate(input_ids=IDS, sampling_params=GREEDY)["output_ids"]
    reply = served.generate(
        input_ids=IDS, sampling_params={**GREEDY, "stop_token_ids": [whole[3]]}, return_logprob=True
    )
    end = whole.index(whole[3]) + 1
    assert reply["output_ids"] == whole[:end]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": whole[3]}
    assert reply["meta_info"]["output_token_logprobs_length"] == end


def test_put_and_null_defaults(served: Served) -> None:
    params = {"max_new_tokens": 3, "stop": None, "stop_token_ids": None, "top_k": -1, "sampling_seed": None}
    body = {"input_ids": IDS, "text": None, "sampling_params": params, "rid": None, "stream": None, "lora_path": None}
    reply = served.http.put("/generate", json=body)
    assert reply.status_code == 200
    assert reply.json()["meta_info"]["completion_tokens"] == 3


def test_a_batch_is_a_list_with_names(served: Served) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    params = [{**GREEDY, "max_new_tokens": number + 1} for number in range(3)]
    replies = served.generate(
        input_ids=prompts, sampling_params=params, rid="batch", return_logprob=[True, False, True]
    )
    assert [reply["meta_info"]["id"] for reply in replies] == ["batch_0", "batch_1", "batch_2"]
    assert [reply["meta_info"]["completion_tokens"] for reply in replies] == [1, 2, 3]
    assert ["output_token_logprobs" in reply["meta_info"] for reply in replies] == [True, False, True]
    for prompt, reply, each in zip(prompts, replies, params, strict=True):
        assert reply["output_ids"] == served.engine.generate(input_ids=prompt, sampling_params=each)[0].token_ids
    names = served.generate(input_ids=prompts, sampling_params=GREEDY, rid=["x", "y", "z"])
    assert [reply["meta_info"]["id"] for reply in names] == ["x", "y", "z"]
    assert len(served.generate(input_ids=[[1, 2]], sampling_params=GREEDY)) == 1


def test_samples_share_a_prompt_and_have_their_own_seeds(served: Served) -> None:
    params = {"n": 3, "max_new_tokens": 8, "sampling_seed": 5, "ignore_eos": True}
    replies = served.generate(input_ids=IDS, sampling_params=params, rid="n")
    expected = served.engine.generate(input_ids=IDS, sampling_params={**params})
    assert [reply["output_ids"] for reply in replies] == [each.token_ids for each in expected]
    assert [reply["meta_info"]["seed"] for reply in replies] == [each.seed for each in expected]
    assert [reply["meta_info"]["id"] for reply in replies] == ["n_0", "n_1", "n_2"]


def test_a_stream_is_cumulative_and_ends_as_the_whole(served: Served) -> None:
    body = {"text": "The headrace", "sampling_params": {**GREEDY, "max_new_tokens": 20}, "return_logprob": True}
    whole = served.generate(**body)
    pieces = in_pieces(lambda: events(served, body))
    for earlier, later in zip(pieces, pieces[1:], strict=False):
        assert later["text"].startswith(earlier["text"])
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
        assert "e2e_latency" not in earlier["meta_info"]
    for piece in pieces:
        meta = piece["meta_info"]
        assert len(piece["output_ids"]) == meta["completion_tokens"] == len(meta["output_token_logprobs"])
        assert sum(count for _, count in meta["version_spans"]) == meta["completion_tokens"]
    assert pieces[-1]["text"] == whole["text"]
    assert pieces[-1]["output_ids"] == whole["output_ids"]
    assert pieces[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]


def test_incremental_streams_are_deltas(start: Any) -> None:
    served = start(incremental_streaming_output=True)
    body = {"text": "The headrace", "sampling_params": {**GREEDY, "max_new_tokens": 20}, "return_logprob": True}
    whole = served.generate(**body)
    pieces = events(served, body)
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["output_ids"]] == whole["output_ids"]
    triples = [triple for piece in pieces for triple in piece["meta_info"]["output_token_logprobs"]]
    assert triples == whole["meta_info"]["output_token_logprobs"]
    assert pieces[-1]["meta_info"]["completion_tokens"] == 20


def test_an_event_is_one_line_for_whoever_reads_text() -> None:
    text = {"text\u2028": "a\x85b\u2028c\u2029d\u2027\xe9"}
    written = event(text).decode()
    assert len(written.splitlines()) == 2 and json.loads(written[6:]) == text


def test_streamed_batches_carry_an_index(served: Served) -> None:
    body = {"input_ids": [[1, 2], [3, 4, 5]], "sampling_params": {**GREEDY, "n": 2}}
    last = {piece["index"]: piece for piece in events(served, body)}
    whole = served.generate(**body)
    assert [last[index]["output_ids"] for index in range(4)] == [reply["output_ids"] for reply in whole]


def test_without_a_tokenizer_there_is_no_text(start: Any) -> None:
    served = start(settings={"skip_tokenizer_init": True})
    reply = served.generate(input_ids=IDS, sampling_params=GREEDY)
    assert set(reply) == {"output_ids", "meta_info"}
    refused = served.http.post("/generate", json={"text": "hi"})
    assert refused.status_code == 400
    assert refused.json()["param"] == "text"


def test_unknown_keys_are_named_in_warnings(served: Served) -> None:
    body = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": 1},
        "frobnicate": 1,
        "image_data": [],
        "no_logs": True,
    }
    meta = served.generate(**body)["meta_info"]
    assert meta["warnings"] == ["'frobnicate' is not known and was ignored"]


def test_extra_keys_separate_the_prefix_cache(served: Served) -> None:
    prompt = [3 + index % 300 for index in range(60)]
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}}
    served.generate(**body, extra_key="a")
    assert served.generate(**body, extra_key="a")["meta_info"]["cached_tokens"] >= 56
    assert served.generate(**body, extra_key="b")["meta_info"]["cached_tokens"] == 0


def test_prompt_ids_come_back_when_asked_for(served: Served) -> None:
    reply = served.generate(text="hi", sampling_params={"max_new_tokens": 1}, return_prompt_token_ids=True)
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    assert reply["meta_info"]["prompt_token_ids"] == tokenizer.encode("hi")


def test_many_requests_at_once(served: Served) -> None:
    import asyncio

    async def all_of_them() -> list[Any]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
            bodies = [{"input_ids": [7, number], "sampling_params": GREEDY} for number in range(64)]
            return await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))

    replies = asyncio.run(all_of_them())
    assert [reply.status_code for reply in replies] == [200] * 64
    expected = served.engine.generate(input_ids=[[7, number] for number in range(64)], sampling_params=GREEDY)
    assert [reply.json()["output_ids"] for reply in replies] == [each.token_ids for each in expected]


@pytest.mark.parametrize("by_server", [False, True])
def test_a_request_says_how_it_is_streamed_and_the_headers_say_it_once(start: Any, by_server: bool) -> None:
    served = start(incremental_streaming_output=by_server)
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 5, "ignore_eos": True, "temperature": 0}}
    whole = served.generate(**body)["output_ids"]
    for asked in (None, False, True):
        is_incremental = by_server if asked is None else asked
        call = {**body, "stream": True, "incremental_streaming_output": asked}
        with served.http.stream("POST", "/generate", json=call) as reply:
            said = reply.headers["x-headrace-stream"]
            lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
        assert said.startswith("incremental" if is_incremental else "cumulative")
        pieces = [json.loads(line)["output_ids"] for line in lines]
        assert (sum(pieces, []) if is_incremental else pieces[-1]) == whole
        assert not any("warnings" in json.loads(line)["meta_info"] for line in lines)
    assert served.http.post("/generate", json={**body, "incremental_streaming_output": 3}).status_code == 400


def test_a_sequence_is_dropped_once_it_is_written(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many, those that are bytes already are no objects any more."""
    streams, alive = list[weakref.ref[Stream]](), list[int]()
    submit, write = ServerState.submit, native._write

    def noting(self: ServerState, item: GenerateItem) -> Stream:
        stream = submit(self, item)
        streams.append(weakref.ref(stream))
        return stream

    def counting(reply: SequenceReply, piece: Generation) -> bytes:
        alive.append(sum(each() is not None for each in streams))
        return write(reply, piece)

    monkeypatch.setattr(ServerState, "submit", noting)
    monkeypatch.setattr(native, "_write", counting)
    body = {"input_ids": [[5]] * 8, "sampling_params": {"max_new_tokens": 1}}
    ids = [reply["meta_info"]["id"] for reply in served.http.post("/generate", json=body).json()]
    assert len(set(ids)) == 8 and alive == list(range(8, 0, -1))
