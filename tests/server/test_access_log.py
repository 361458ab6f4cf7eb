"""The access log of a server on a real socket."""

from __future__ import annotations

import logging
import socket
import time

import pytest

from tests.server.conftest import START, Served

GENERATE = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}


def lines(caplog: pytest.LogCaptureFixture, number: int) -> list[str]:
    """What was written, once so many answers are over: the last is when its client has it already."""
    for _ in range(3000):
        found = [each.getMessage() for each in caplog.records if each.name == "headrace.server.access_log"]
        if len(found) >= number:
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def test_every_answer_is_a_line_and_a_refusal_says_why(start: START, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")
    served = start(access_log=True, api_key="secret")
    key = {"authorization": "Bearer secret"}
    assert served.http.post("/generate?token=hidden", json=GENERATE, headers=key).status_code == 200
    bad = {"input_ids": [1], "sampling_params": {"top_p": 7}}
    assert served.http.post("/generate", json=bad, headers=key).status_code == 400
    assert served.http.post("/generate", json=GENERATE).status_code == 401
    assert served.http.get("/nowhere%0Aelse", headers=key).status_code == 404
    done, refused, stranger, lost = lines(caplog, 4)
    assert " POST /generate 200, " in done and done.endswith(" ms") and "hidden" not in done
    assert " POST /generate 400, " in refused and " ms: " in refused and "top_p" in refused
    assert " POST /generate 401, " in stranger and "secret" not in stranger
    assert " GET /nowhere\\nelse 404, " in lost and "\n" not in lost


def test_a_stream_is_a_line_when_it_is_over_also_where_its_client_has_gone(
    start: START, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headrace")
    served = start(access_log=True)
    params = {"max_new_tokens": 500, "ignore_eos": True}
    with served.http.stream("POST", "/generate", json={**GENERATE, "sampling_params": params, "stream": True}) as reply:
        next(reply.iter_raw())
    (line,) = lines(caplog, 1)
    assert " POST /generate 200, " in line and " 0 bytes" not in line
    with socket.create_connection(("127.0.0.1", served.handle.port)) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    assert " POST /generate " in lines(caplog, 2)[1]


def test_a_stream_counts_all_its_bytes(start: START, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")
    served = start(access_log=True)
    body = {**GENERATE, "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}, "stream": True}
    for number in (1, 2):  # on one connection
        reply = served.http.post("/generate", json=body)
        assert reply.content.count(b"\n\n") > 2
        assert f" {len(reply.content)} bytes in " in lines(caplog, number)[-1]


def test_nothing_is_written_unless_asked_for(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")
    assert served.http.get("/nowhere").status_code == 404
    assert served.generate(**GENERATE)
    assert [each for each in caplog.records if each.name == "headrace.server.access_log"] == []
