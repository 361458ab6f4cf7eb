"""A server in front of an engine of two ranks."""

from __future__ import annotations

import os
import signal
import time

from tests.engine.test_ranks import rank_pids
from tests.server.conftest import START, Served

BODY = {"input_ids": [3, 1, 4, 1, 5], "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}}


def test_a_server_of_two_ranks_answers_as_one_and_tells_their_number(start: START, served: Served) -> None:
    ranks = start(settings={"tp_size": 2, "device": "cpu", "inprocess": False})
    found, expected = (each.generate(**BODY, return_logprob=True) for each in (ranks, served))
    assert found["output_ids"] == expected["output_ids"]
    pairs = (each["meta_info"]["output_token_logprobs"] for each in (found, expected))
    assert all(abs(one[0] - other[0]) < 1e-4 for one, other in zip(*pairs, strict=True))
    info = ranks.http.get("/server_info").json()
    assert (info["tp_size"], info["num_gpus"], info["internal_states"][0]["tp_size"]) == (2, 2, 2)
    (pid,) = rank_pids(ranks.engine)
    os.kill(pid, signal.SIGKILL)
    while ranks.engine.is_alive:
        time.sleep(0.01)
    reply = ranks.http.post("/generate", json=BODY)
    assert reply.status_code == 503 and reply.json()["err_type"] == "DeviceLostError"
    assert f"rank 1 (process {pid}) was killed" in reply.text
