"""A server in front of an engine of two ranks."""

from __future__ import annotations

import os
import signal
import time

from headrace.weights.position_sum import add_digests
from tests.engine.test_ranks import rank_pids
from tests.server.conftest import START, Served

BODY = {"input_ids": [3, 1, 4, 1, 5], "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}}


def check_checksums(ranks: Served, served: Served) -> None:
    """Each rank says what it holds of the model, in the words of SGLang's clients."""
    reply = ranks.http.post("/weights_checker", json={"action": "checksum"}).json()
    layouts = [each["parallelism_info"] for each in reply["ranks"]]
    assert [(each["rank"], each["size"], each["tp_rank"], each["tp_size"]) for each in layouts] == [
        (0, 2, 0, 2),
        (1, 2, 1, 2),
    ]
    first, second = (each["checksums"] for each in reply["ranks"])
    whole = ranks.engine.digest()
    assert served.http.get("/weights_checker").json()["ranks"][0]["checksums"] == whole == served.engine.digest()
    assert first.keys() == second.keys() == whole.keys()
    assert {name for name in whole if first[name] == second[name] == whole[name]} == {
        name for name in whole if "norm" in name
    }
    assert all("norm" in name or add_digests(first[name], second[name]) == whole[name] for name in whole)
    assert reply["ranks"][0]["per_gpu_checksum"] != reply["ranks"][1]["per_gpu_checksum"]
    assert ranks.http.get("/weights_checker").json() == reply


def test_a_server_of_two_ranks_answers_as_one_and_tells_their_number(start: START, served: Served) -> None:
    ranks = start(settings={"tp_size": 2, "device": "cpu", "inprocess": False})
    found, expected = (each.generate(**BODY, return_logprob=True) for each in (ranks, served))
    assert found["output_ids"] == expected["output_ids"]
    pairs = (each["meta_info"]["output_token_logprobs"] for each in (found, expected))
    assert all(abs(one[0] - other[0]) < 1e-4 for one, other in zip(*pairs, strict=True))
    info = ranks.http.get("/server_info").json()
    assert (info["tp_size"], info["num_gpus"], info["internal_states"][0]["tp_size"]) == (2, 2, 2)
    check_checksums(ranks, served)
    (pid,) = rank_pids(ranks.engine)
    os.kill(pid, signal.SIGKILL)
    while ranks.engine.is_alive:
        time.sleep(0.01)
    reply = ranks.http.post("/generate", json=BODY)
    assert reply.status_code == 503 and reply.json()["err_type"] == "DeviceLostError"
    assert f"rank 1 (process {pid}) was killed" in reply.text
