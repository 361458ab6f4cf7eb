"""What slime and AReaL post, as recorded, and what they read of the answers. `tests/frameworks/areal` holds AReaL's
against its own builder; how their weights come is in `test_buckets.py` and `test_weight_groups.py`."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.server.conftest import START, Served

BODIES = json.loads(Path(__file__).with_name("framework_bodies.json").read_text())
ROUTING = {"X-SMG-Routing-Key": "sample-7"}


def read_by_slime(output: dict[str, Any]) -> tuple[list[int], list[float], str, str]:
    """As `slime.rollout.sglang_rollout.generate`: (ids, logprobs, status, weight version)."""
    meta = output["meta_info"]
    pairs = meta["output_token_logprobs"]
    status = {"length": "TRUNCATED", "abort": "ABORTED", "stop": "COMPLETED"}[meta["finish_reason"]["type"]]
    assert meta["prompt_tokens"] + meta["completion_tokens"] == 3 + len(pairs) and meta["cached_tokens"] >= 0
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs], status, meta["weight_version"]


def test_slime_reads_ids_logprobs_and_versions(served: Served) -> None:
    output = served.http.post("/generate", json=BODIES["slime"]["generate"], headers=ROUTING).json()
    ids, logprobs, status, version = read_by_slime(output)
    assert ids == output["output_ids"] and len(logprobs) == len(ids) and all(value <= 0 for value in logprobs)
    assert status in ("TRUNCATED", "COMPLETED") and version == "default"
    assert output["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": len(ids)}]
    first, second = (read_by_slime(served.generate(**BODIES["slime"]["generate_deterministic"])) for _ in range(2))
    assert first == second
    scored = served.generate(**BODIES["slime"]["teacher"])["meta_info"]["input_token_logprobs"]
    assert [pair[1] for pair in scored[1:]] == [2, 3] and all(pair[0] <= 0 for pair in scored[1:])


def test_slime_aborts_waits_until_idle_and_resumes_the_partial_sample(start: START) -> None:
    served = start()
    body = BODIES["slime"]["generate_deterministic"]
    long = {**body, "sampling_params": {**body["sampling_params"], "max_new_tokens": 100, "ignore_eos": True}}
    whole = read_by_slime(served.generate(**long))[0]
    served.http.post("/slow_down", json={"forward_sleep_time": 0.05}).raise_for_status()
    outputs: list[Any] = []
    thread = threading.Thread(target=lambda: outputs.append(httpx.post(f"{served.url}/generate", json=long).json()))
    thread.start()
    while not num_active(served):
        time.sleep(0.01)
    served.http.post("/abort_request", json={"abort_all": True}).raise_for_status()
    thread.join(60)
    while num_active(served):
        time.sleep(0.01)
    served.http.post("/slow_down", json={"forward_sleep_time": None}).raise_for_status()
    partial, _, status, _ = read_by_slime(outputs[0])
    assert status == "ABORTED" and partial == whole[: len(partial)] and len(partial) < 100
    rest = {**long["sampling_params"], "max_new_tokens": 100 - len(partial)}
    again = served.generate(**{**long, "input_ids": [1, 2, 3, *partial], "sampling_params": rest})
    assert len(again["output_ids"]) == 100 - len(partial)


def num_active(served: Served) -> int:
    """As slime's `_get_num_reqs`: what waits and runs of all ranks."""
    loads = served.http.get("/v1/loads", params={"include": "core"}).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def read_by_areal(output: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """As `SGLangBackend.parse_generation_response`."""
    pairs = output["meta_info"]["output_token_logprobs"]
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs], output["meta_info"]["finish_reason"]["type"]


def test_areal_reads_ids_logprobs_and_scores(served: Served) -> None:
    asks = BODIES["areal"]
    answers = {name: served.http.post(asks[name]["endpoint"], json=asks[name]["payload"]).json() for name in asks}
    ids, logprobs, reason = read_by_areal(answers["generate"])
    assert len(ids) == len(logprobs) == 8 and reason == "length"
    assert read_by_areal(answers["greedy"])[2] in ("stop", "length")
    scored = [float(pair[0]) for pair in answers["score"]["meta_info"]["input_token_logprobs"] if pair[0] is not None]
    assert len(scored[-2:]) == 2 and all(value <= 0 for value in scored)
    assert served.engine.is_ready


def test_areal_updates_from_a_folder_and_ends_what_runs(start: START, model_folder: Path) -> None:
    served = start()
    served.http.post("/slow_down", json={"forward_sleep_time": 0.05}).raise_for_status()
    body = BODIES["areal"]["generate"]["payload"]
    long = {**body, "sampling_params": {**body["sampling_params"], "max_new_tokens": 1000}}
    outputs: list[Any] = []
    thread = threading.Thread(target=lambda: outputs.append(httpx.post(f"{served.url}/generate", json=long).json()))
    thread.start()
    while not num_active(served):
        time.sleep(0.01)
    served.http.post("/pause_generation", json={}).raise_for_status()
    thread.join(60)
    ask = {"model_path": str(model_folder), "abort_all_requests": True}
    answer = served.http.post("/update_weights_from_disk", json=ask)
    assert answer.json()["success"], answer.text
    served.http.post("/continue_generation", json={}).raise_for_status()
    assert read_by_areal(outputs[0])[2] == "abort", "which AReaL sends again with what it has"
    assert len(read_by_areal(served.generate(**body))[0]) == 8
