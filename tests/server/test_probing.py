"""The routes that look into a server, in SGLang's dialect."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import START, Served

SHORT: dict[str, Any] = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}


def post(served: Served, path: str, body: Any = None) -> tuple[int, Any]:
    reply = served.http.post(path) if body is None else served.http.post(path, json=body)
    return reply.status_code, reply.json() if reply.content else None


def told(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["param"] or ""


def names_in(file: str) -> set[str]:
    with gzip.open(file) as opened:
        return {event.get("name", "") for event in json.load(opened)["traceEvents"]}


@pytest.mark.parametrize("inprocess", [True, False])
def test_a_trace_as_slime_asks_for_one(start: START, model_folder: Path, tmp_path: Path, inprocess: bool) -> None:
    served = start(save_roots=[str(tmp_path)], settings={"inprocess": inprocess})
    assert told(post(served, "/stop_profile", {})) == (409, "profile")
    body = {"output_dir": str(tmp_path), "activities": ["CPU", "GPU"], "profile_id": "step-1", "num_steps": None}
    status, reply = post(served, "/start_profile", body)
    assert status == 200 and reply["success"] and reply["file"] == str(tmp_path / "step-1-TP-0.trace.json.gz")
    assert told(post(served, "/start_profile", {})) == (409, "profile")
    served.generate(**SHORT)
    assert post(served, "/stop_profile", {})[1]["file"] == reply["file"]
    assert any("aten::" in name for name in names_in(reply["file"])), "what the core computes"
    status, reply = post(served, "/start_profile")  # without a body, where the core likes
    served.generate(**SHORT)
    assert post(served, "/stop_profile")[0] == 200 and names_in(reply["file"])
    assert Path(reply["file"]).parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"output_dir": "/etc"}, "output_dir"),
        ({"output_dir": "/nowhere/at/all"}, "output_dir"),
        ({"output_dir": ""}, "output_dir"),
        ({"profile_id": "../../x"}, "profile_id"),
        ({"profile_prefix": "a/b"}, "profile_id"),
        ({"activities": ["MEM"]}, "activities"),
        ({"activities": ["GPU"]}, "activities"),
        ({"activities": "CPU"}, "activities"),
        ({"num_steps": -1}, "num_steps"),
        ({"num_steps": "x"}, "num_steps"),
        ({"start_step": 5}, "start_step"),
        ({"profile_by_stage": True}, "profile_by_stage"),
        ({"merge_profiles": True}, "merge_profiles"),
        ({"with_stack": "perhaps"}, "with_stack"),
    ],
)
def test_what_is_wrong_with_a_profile_is_named(served: Served, body: dict[str, Any], field: str) -> None:
    assert told(post(served, "/start_profile", body)) == (400, field)
    assert told(post(served, "/stop_profile", {}))[0] == 409


def test_a_link_out_of_the_roots_is_not_followed(start: START, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    served = start(save_roots=[str(tmp_path / "root")])
    assert told(post(served, "/start_profile", {"output_dir": str(tmp_path / "root" / "link")})) == (400, "output_dir")


def test_slow_down_and_freeze_gc_have_the_dialect_s_replies(start: START) -> None:
    served = start(settings={"inprocess": False})
    assert post(served, "/slow_down", {"forward_sleep_time": 0.05}) == (200, None)
    assert served.http.post("/slow_down", json={"forward_sleep_time": "0.05"}).text == "null"
    slow = served.generate(**SHORT)
    assert slow["meta_info"]["e2e_latency"] >= 0.05 * 5
    assert post(served, "/slow_down", {"forward_sleep_time": None}) == (200, None)
    reply = served.http.post("/freeze_gc")
    assert (reply.status_code, reply.content) == (200, b"")
    assert served.generate(**SHORT)["output_ids"]
    for value in (-1, 1e9, "x"):
        assert told(post(served, "/slow_down", {"forward_sleep_time": value})) == (400, "forward_sleep_time")


def test_methods_are_called_by_name_from_a_closed_list(served: Served) -> None:
    digest = served.engine.digest()
    assert post(served, "/collective_rpc", {"method": "digest"}) == (200, {"results": [digest]})
    assert post(served, "/collective_rpc", {"method": "pause", "kwargs": {"mode": "keep"}, "timeout": 30}) == (
        200,
        {"results": [None]},
    )
    assert post(served, "/collective_rpc", {"method": "status"})[1]["results"][0]["paused"] == "keep"
    assert post(served, "/collective_rpc", {"method": "resume", "args": [], "kwargs": None})[0] == 200
    for method in ("shutdown", "update_weights_from_disk", "__init__", "asynchronous", "start_profile", None, 5):
        status, reply = post(served, "/collective_rpc", {"method": method})
        assert status == 400 and ("method" in reply["message"]), method
    wrong = ({"args": "x"}, "args"), ({"args": [1]}, "args"), ({"kwargs": [1]}, "kwargs"), ({"timeout": -1}, "timeout")
    for more, field in wrong:
        assert told(post(served, "/collective_rpc", {"method": "flush_cache", **more})) == (400, field)
    assert told(post(served, "/collective_rpc", {"method": "weights_checker", "args": ["dance"]})) == (400, "action")
    assert served.engine.status().paused == ""


def test_the_other_calls_of_an_update_are_taken(served: Served) -> None:
    body = {"restore_weights_before_load": True, "post_process_quantization": True}
    assert post(served, "/post_process_weights", body)[1]["success"] is True
    checker: dict[str, Any] = {"action": "checksum", "allow_quant_error": True, "selector": "target"}
    _, reply = post(served, "/weights_checker", checker)
    names = list(reply["ranks"][0]["checksums"])
    _, fewer = post(served, "/weights_checker", {**checker, "skip_tensor_list": names[:2]})
    assert list(fewer["ranks"][0]["checksums"]) == names[2:]
    assert told(post(served, "/weights_checker", {**checker, "selector": "draft"})) == (400, "selector")
    resetting = {"action": "reset_tensors", "skip_tensor_list": names[:1]}
    assert told(post(served, "/weights_checker", resetting)) == (400, "skip_tensor_list")
    assert served.engine.status().state == "ready"
