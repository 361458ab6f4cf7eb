"""Control routes: abort, pause, cache, weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from headrace import UpdateConflictError
from headrace.engine import reading as reading_module
from headrace.server import admin as admin_module
from tests.server.builders import save_random_model
from tests.server.conftest import START, Served

LONG = {"max_new_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT = {"max_new_tokens": 4, "ignore_eos": True, "temperature": 0}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition; the test's own time limit is the bound."""
    while not await condition():
        await asyncio.sleep(0.01)


async def num_running(client: httpx.AsyncClient) -> int:
    load = (await client.get("/v1/loads?include=core")).json()["loads"][0]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


async def until_generating(served: Served, num_tokens: int = 10) -> None:
    """Wait until the engine has generated some more tokens."""
    before = (await asyncio.to_thread(served.engine.metrics))["num_generated_tokens"]

    async def has_grown() -> bool:
        return (await asyncio.to_thread(served.engine.metrics))["num_generated_tokens"] >= before + num_tokens

    await until(has_grown)


def run_beside(served: Served, body: dict[str, Any], action: Callable[[httpx.AsyncClient], Awaitable[None]]) -> Any:
    """POST a long /generate, do `action` while it runs, and return the response."""

    async def both() -> Any:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            request = asyncio.create_task(client.post("/generate", json=body))

            async def runs() -> bool:
                return await num_running(client) > 0

            await until(runs)
            await action(client)
            return await request

    return asyncio.run(both())


def test_abort_matches_a_prefix_and_returns_what_there_is(served: Served) -> None:
    async def abort(client: httpx.AsyncClient) -> None:
        await until_generating(served)
        other = await client.post("/abort_request", json={"rid": "someone else"})
        assert (other.status_code, other.content) == (200, b"")
        nobody = await client.post("/abort_request", json={"rid": ""})
        assert (nobody.status_code, nobody.content) == (200, b"")
        assert await num_running(client) == 2
        reply = await client.post("/abort_request", json={"rid": "rollout", "abort_message": "enough"})
        assert (reply.status_code, reply.content) == (200, b"")

    body = {"input_ids": [1, 2, 3], "sampling_params": {**LONG, "n": 2}, "rid": "rollout-7", "return_logprob": True}
    reply = run_beside(served, body, abort)
    assert reply.status_code == 200
    for each in reply.json():
        meta = each["meta_info"]
        assert meta["finish_reason"] == {
            "type": "abort",
            "message": "enough",
            "status_code": None,
            "err_type": None,
        }
        assert 0 < meta["completion_tokens"] < 900
        assert len(each["output_ids"]) == len(meta["output_token_logprobs"]) == meta["completion_tokens"]
        assert sum(count for _, count in meta["version_spans"]) == meta["completion_tokens"]
        assert meta["prompt_tokens"] == 3


@pytest.mark.parametrize("rid", ["", "mine"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_the_id_of_an_openai_reply_aborts_all_its_choices(
    served: Served, path: str, body: dict[str, Any], n: int, rid: str
) -> None:
    asked = {**body, "n": n, "rid": rid, "max_tokens": 900, "ignore_eos": True, "stream": True}
    reasons: dict[int, str] = {}
    with served.http.stream("POST", path, json=asked) as reply:
        events = (json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))
        name = next(events)["id"]
        assert served.http.post("/abort_request", json={"rid": name}).status_code == 200
        for choice in (choice for event in events for choice in event["choices"] if choice["finish_reason"]):
            reasons[choice["index"]] = choice["finish_reason"]
    assert name == rid or not rid
    assert reasons == dict.fromkeys(range(n), "abort")


def test_abort_all_of_a_stream(served: Served) -> None:
    body = {"input_ids": [1], "sampling_params": LONG, "stream": True}
    reply = run_beside(served, body, lambda client: client.post("/abort_request", json={"abort_all": True}))  # type: ignore[arg-type,return-value]
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_request_aborted_in_the_queue_is_complete(start: START) -> None:
    served = start()
    served.http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()

    async def abort(client: httpx.AsyncClient) -> None:
        await client.post("/abort_request", json={"abort_all": True})

    body = {"input_ids": [5, 6], "sampling_params": LONG, "return_logprob": True}
    meta = run_beside(served, body, abort).json()["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 0, 0)
    assert meta["output_token_logprobs"] == [] and meta["version_spans"] == []
    assert meta["weight_version"] == "default"


@pytest.mark.parametrize("mode", ["in_place", "recompute"])
def test_pausing_holds_requests_and_continuing_finishes_them(start: START, mode: str) -> None:
    served = start()
    expected = served.generate(input_ids=[9, 8], sampling_params={**LONG, "max_new_tokens": 150})["output_ids"]

    async def pause(client: httpx.AsyncClient) -> None:
        reply = await client.post("/pause_generation", json={"mode": mode})
        assert reply.json() == {"message": "Generation paused successfully.", "status": "ok"}
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/health_generate")).status_code == 200
        assert await num_running(client) == 1
        reply = await client.post("/continue_generation", json={"torch_empty_cache": True})
        assert reply.json() == {"message": "Generation continued successfully.", "status": "ok"}
        assert (await client.get("/ready")).status_code == 200

    body = {"input_ids": [9, 8], "sampling_params": {**LONG, "max_new_tokens": 150}}
    assert run_beside(served, body, pause).json()["output_ids"] == expected


def test_pause_aborts_by_default(start: START) -> None:
    served = start()

    async def pause(client: httpx.AsyncClient) -> None:
        assert (await client.post("/pause_generation", json={})).status_code == 200
        assert await num_running(client) == 0

    reply = run_beside(served, {"input_ids": [1], "sampling_params": LONG}, pause)
    assert reply.json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_flush_is_never_refused(served: Served) -> None:
    prompt = [2 + index % 300 for index in range(80)]
    body = {"input_ids": prompt, "sampling_params": SHORT}
    served.generate(**body)
    assert served.generate(**body)["meta_info"]["cached_tokens"] > 0

    async def flush(client: httpx.AsyncClient) -> None:
        assert (await client.get("/flush_cache")).status_code == 200
        assert (await client.post("/flush_cache")).status_code == 200
        await client.post("/abort_request", json={"abort_all": True})

    run_beside(served, {"input_ids": [1], "sampling_params": LONG}, flush)
    assert served.generate(**body)["meta_info"]["cached_tokens"] == 0


def test_weights_from_disk(start: START, tmp_path: Path) -> None:
    """The new weights answer, say their version, and hash like those of an engine started on them."""
    served = start(save_random_model(tmp_path / "model", seed=0), weight_roots=(str(tmp_path / "allowed"),))
    newer = save_random_model(tmp_path / "allowed" / "newer", seed=1)
    cold = start(newer)
    before = served.generate(input_ids=[1, 2], sampling_params=SHORT)
    reply = served.http.post(
        "/update_weights_from_disk", json={"model_path": str(newer), "weight_version": 7, "flush_cache": True}
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["success"] is True and reply.json()["num_paused_requests"] == 0
    after = served.generate(input_ids=[1, 2], sampling_params=SHORT)
    assert after["output_ids"] == cold.generate(input_ids=[1, 2], sampling_params=SHORT)["output_ids"]
    assert after["output_ids"] != before["output_ids"]
    assert after["meta_info"]["weight_version"] == "7"
    for path in ("/get_weight_version", "/weight_version", "/model_info", "/ready"):
        assert served.http.get(path).json()["weight_version"] == "7"
    sums = [each.http.post("/weights_checker", json={"action": "checksum"}).json() for each in (served, cold)]
    assert sums[0]["ranks"][0]["checksums"] == sums[1]["ranks"][0]["checksums"]
    assert sums[0]["per_engine_checksum"] == sums[1]["per_engine_checksum"]


def given_up(served: Served, path: str, body: dict[str, Any]) -> Callable[[httpx.AsyncClient], Awaitable[None]]:
    """A control call whose client goes away while it waits for requests in flight, and what is left of it: nothing."""

    async def call(client: httpx.AsyncClient) -> None:
        await until_generating(served)
        with pytest.raises(httpx.ReadTimeout):
            await client.post(path, json=body, timeout=0.2)

        async def is_over() -> bool:
            status = await asyncio.to_thread(served.engine.status)
            return not status.paused and not status.updating

        await until(is_over)  # the server learns of it a moment later
        assert (await client.get("/ready")).status_code == 200
        reply = await client.post("/generate", json={"input_ids": [3], "sampling_params": SHORT})
        assert reply.json()["meta_info"]["completion_tokens"] == 4
        await client.post("/abort_request", json={"abort_all": True})

    return call


@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_a_pause_whose_client_goes_away_pauses_nobody(start: START, mode: str) -> None:
    served = start(settings={"inprocess": False})
    body = {"input_ids": [1], "sampling_params": LONG}
    run_beside(served, body, given_up(served, "/pause_generation", {"mode": mode}))
    assert served.http.get("/ready").status_code == 200


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_update_whose_client_goes_away_does_not_land(start: START, tmp_path: Path, mode: str) -> None:
    served = start(save_random_model(tmp_path / "model", seed=0), weight_roots=(str(tmp_path),))
    newer = save_random_model(tmp_path / "newer", seed=1)
    digest = served.engine.digest()
    call = {"model_path": str(newer), "weight_version": "never", "in_flight": "drain", "mode": mode}
    run_beside(served, {"input_ids": [1], "sampling_params": LONG}, given_up(served, "/update_weights_from_disk", call))
    assert served.engine.version == "default" and served.engine.digest() == digest


@pytest.mark.parametrize(
    ("path", "more"),
    [("/pause_generation", {"mode": "wait"}), ("/update_weights_from_disk", {"in_flight": "drain"})],
)
def test_control_calls_have_time_limits_of_their_own(
    start: START, model_folder: Path, path: str, more: dict[str, Any]
) -> None:
    served = start()
    call = {"model_path": str(model_folder), **more}

    async def limited(client: httpx.AsyncClient) -> None:
        await until_generating(served)
        reply = await client.post(path, json={**call, "timeout_s": 0.15})
        assert (reply.status_code, reply.json()["retryable"]) == (504, True)
        status = await asyncio.to_thread(served.engine.status)
        assert (status.paused, status.updating) == ("", False)
        for bad in (0, -1, "soon"):
            refused = await client.post(path, json={**call, "timeout_s": bad})
            assert refused.status_code == 400 and "timeout_s" in refused.json()["message"]
        await client.post("/abort_request", json={"abort_all": True})

    run_beside(served, {"input_ids": [1], "sampling_params": LONG}, limited)


def test_an_open_update_is_a_conflict_that_can_be_ended(start: START, model_folder: Path) -> None:
    """One that somebody left open is in the way of every other; whoever may change weights may end it."""
    served = start(admin_api_key="admin", api_key="data")
    manifest = [
        ("model.norm.weight", load_file(model_folder / "model.safetensors")["model.norm.weight"].shape, "float32")
    ]
    session = served.engine.begin_update("left open", manifest, partial=True)
    call, admin = {"model_path": str(model_folder)}, {"authorization": "Bearer admin"}
    refused = served.http.post("/update_weights_from_disk", json=call, headers=admin)
    assert (refused.status_code, refused.json()["retryable"]) == (409, True)
    assert refused.headers["retry-after"] == "1"
    stranger = served.http.post("/abort_weight_update", json={}, headers={"authorization": "Bearer data"})
    assert stranger.status_code in (401, 403)
    for _ in range(2):  # none open is no error
        ended = served.http.post("/abort_weight_update", json={}, headers=admin)
        assert ended.json() == {"success": True, "message": "No weight update is open."}
    with pytest.raises(UpdateConflictError):
        served.engine.commit(session)
    assert served.http.post("/update_weights_from_disk", json=call, headers=admin).status_code == 200


def test_too_many_numbers_are_refused_before_they_are_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "MAX_READ_ELEMENTS", 100)
    monkeypatch.setattr(reading_module, "PART_BYTES", 64)
    name = "model.layers.1.self_attn.k_proj.weight"
    refused = served.http.post("/get_weights_by_name", json={"name": name, "truncate_size": 10**9})
    assert refused.status_code == 400 and "truncate_size" in refused.json()["message"]
    assert len(served.http.post("/get_weights_by_name", json={"name": name, "truncate_size": 1}).json()) == 1
    assert served.http.post("/get_weights_by_name", json={"name": name, "truncate_size": 0}).json() == []


def test_paths_outside_are_refused(start: START, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model")
    outside = save_random_model(tmp_path / "outside", seed=1)
    (model / "link").symlink_to(outside)
    shutil.copytree(outside, model / "inside")
    served = start(model)
    digest = served.engine.digest()
    paths = [outside, model / "link", model / ".." / "outside", Path("/etc"), Path("a\0b"), model / "nothing"]
    for path in (*paths, Path("~nosuchuser/x"), model / ("a" * 300)):
        reply = served.http.post("/update_weights_from_disk", json={"model_path": str(path)})
        assert reply.status_code == 400
        assert reply.json()["success"] is False
        assert reply.json()["param"] == "model_path"
    assert served.engine.digest() == digest
    reply = served.http.post("/update_weights_from_disk", json={"model_path": str(model / "inside")})
    assert reply.status_code == 200
    assert served.engine.digest() != digest


def test_a_bad_checkpoint_changes_nothing(start: START, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model")
    shutil.copytree(model, model / "broken")
    (model / "broken" / "model.safetensors").write_bytes(b"not a checkpoint")
    served = start(model)
    digest = served.engine.digest()
    reply = served.http.post("/update_weights_from_disk", json={"model_path": str(model / "broken")})
    assert 400 <= reply.status_code < 500
    assert reply.json()["success"] is False and reply.json()["message"]
    assert served.engine.digest() == digest
    assert served.http.get("/ready").status_code == 200


def test_relabelling(start: START) -> None:
    served = start()
    reply = served.http.post("/update_weight_version", json={"new_version": "v2"})
    assert reply.json()["new_version"] == "v2" and reply.json()["success"] is True
    meta = served.generate(input_ids=[1], sampling_params=SHORT)["meta_info"]
    assert meta["version_spans"] == [["v2", 4]]


def test_relabelling_aborts_only_if_asked_not_to(start: START) -> None:
    served = start()

    async def relabel(client: httpx.AsyncClient) -> None:
        await until_generating(served)
        await client.post("/update_weight_version", json={"new_version": "b", "abort_all_requests": False})
        await client.post("/update_weight_version", json={"new_version": "c"})

    meta = run_beside(served, {"input_ids": [1], "sampling_params": LONG}, relabel).json()["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert meta["version_spans"][0][0] == "default"


def test_weights_read_back(served: Served, model_folder: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    got = served.http.post("/get_weights_by_name", json={"name": name, "truncate_size": 3})
    assert got.json() == tensors[name][:3].tolist()
    query = served.http.get("/get_weights_by_name", params={"name": "model.norm.weight", "truncate_size": "5"})
    assert query.json() == tensors["model.norm.weight"][:5].tolist()
    assert served.http.post("/get_weights_by_name", json={"name": name}).json() == tensors[name][:100].tolist()
    missing = served.http.post("/get_weights_by_name", json={"name": "no.such.weight"})
    assert missing.status_code == 404
    assert "no.such.weight" in missing.json()["message"]


def test_bfloat16_weights_read_back(start: START, model_folder: Path) -> None:
    served = start(settings={"dtype": "bfloat16"})
    name = "model.layers.0.mlp.up_proj.weight"
    expected = load_file(model_folder / "model.safetensors")[name].to(torch.bfloat16).float()[:2]
    reply = served.http.post("/get_weights_by_name", json={"name": name, "truncate_size": 2})
    assert reply.json() == expected.tolist()


@pytest.mark.parametrize(
    ("path", "body", "choices"),
    [
        ("/weights_checker", {"action": "zz"}, "action: must be one of checksum, snapshot, reset_tensors, compare"),
        ("/update_weights_from_disk", {"model_path": "/x", "mode": "zz"}, "mode: must be one of auto, shadow, inplace"),
        (
            "/update_weights_from_disk",
            {"model_path": "/x", "in_flight": "zz"},
            "in_flight: must be one of keep, recompute, abort, drain",
        ),
    ],
)
def test_what_is_none_of_a_few_words_is_told_which(
    served: Served, path: str, body: dict[str, str], choices: str
) -> None:
    reply = served.http.post(path, json=body)
    assert reply.status_code == 400 and f"{choices}, not 'zz'" in reply.text


def test_weights_checker_notices_reset_tensors(start: START, model_folder: Path) -> None:
    """The way slime checks that an update wrote every tensor."""
    served = start()

    def check(action: str) -> httpx.Response:
        return served.http.post("/weights_checker", json={"action": action, "allow_quant_error": False})

    assert check("snapshot").json()["success"] is True
    assert check("compare").json()["success"] is True
    assert check("reset_tensors").status_code == 200
    assert served.http.get("/ready").status_code == 503
    for path in ("/model_info", "/get_weight_version", "/server_info"):
        info = served.http.get(path).json()
        assert (info["weight_version"], info["weights_state"]) == ("", "needs_weights")
    assert served.http.post("/update_weight_version", json={"new_version": "v9"}).status_code == 503
    name = {"name": "model.norm.weight", "truncate_size": 1}
    assert served.http.post("/get_weights_by_name", json=name).status_code == 503
    assert check("snapshot").status_code == check("checksum").status_code == 503
    compared = check("compare")
    assert compared.status_code == 400
    assert compared.json()["success"] is False
    assert "model.norm.weight" in compared.json()["differing"]
    assert served.http.post("/generate", json={"input_ids": [1]}).status_code == 503
    served.http.post("/update_weights_from_disk", json={"model_path": str(model_folder)}).raise_for_status()
    assert check("compare").json()["success"] is True
    assert served.http.get("/ready").json()["weight_version"] == "default", "the label that an update without one keeps"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/abort_request", {"rid": {}}, "rid"),
        ("/abort_request", {"abort_all": "perhaps"}, "abort_all"),
        ("/pause_generation", {"mode": "sleep"}, "mode"),
        ("/pause_generation", {"mode": []}, "mode"),
        ("/update_weights_from_disk", {}, "model_path"),
        ("/update_weights_from_disk", {"model_path": 3}, "model_path"),
        ("/update_weights_from_disk", {"model_path": ".", "mode": "magic"}, "mode"),
        ("/update_weight_version", {}, "new_version"),
        ("/update_weight_version", {"new_version": ["a"]}, "new_version"),
        ("/get_weights_by_name", {}, "name"),
        ("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": -1}, "truncate_size"),
        ("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": "many"}, "truncate_size"),
        ("/weights_checker", {"action": "destroy"}, "action"),
        ("/pause_generation", {"timeout_s": -1}, "timeout_s"),
        ("/pause_generation", {"timeout_s": 0}, "timeout_s"),
        ("/pause_generation", {"timeout_s": "soon"}, "timeout_s"),
        ("/pause_generation", {"timeout_s": "nan"}, "timeout_s"),
        ("/pause_generation", {"timeout_s": True}, "timeout_s"),
        ("/update_weights_from_disk", {"model_path": ".", "in_flight": "kep"}, "in_flight"),
        ("/update_weights_from_disk", {"model_path": ".", "timeout_s": [5]}, "timeout_s"),
        ("/update_weight_version", {"new_version": ""}, "new_version"),
        ("/update_weight_version", {"new_version": "v" * 2000}, "new_version"),
        ("/update_weight_version", {"new_version": "v", "abort_all_requests": "yes"}, "abort_all_requests"),
    ],
)
def test_bad_control_calls_are_named(served: Served, path: str, body: dict[str, Any], field: str) -> None:
    reply = served.http.post(path, json=body)
    assert reply.status_code == 400
    assert field in reply.json()["message"]


def test_control_calls_coerce_but_need_a_body(served: Served) -> None:
    memory = ("/release_memory_occupation", "/resume_memory_occupation")
    for path in ("/abort_request", "/pause_generation", "/continue_generation", "/update_weight_version", *memory):
        empty = served.http.post(path)
        assert empty.status_code == 400
        assert empty.json()["param"] == "body"
    assert served.http.post("/continue_generation", json={"pp_rank": "3"}).status_code == 200
    reply = served.http.post("/get_weights_by_name", json={"name": "model.norm.weight", "truncate_size": "2", "x": 1})
    assert len(reply.json()) == 2
