"""`/dashboard`: what the page reads over HTTP, and what a browser lets the page do. The page itself is tried in a
browser by `tests/frameworks/browser`."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from typing import Any
from unittest.mock import patch

import httpx
import msgspec
import numpy as np
import pytest

from headrace import Client, RequestError
from headrace.engine.client import CoreClient
from headrace.server.dashboard_state import DashboardState
from headrace.telemetry import POINT_FIELDS
from headrace.telemetry.history import MAX_SAMPLES
from tests.server.conftest import START, Served

SECONDS = 30.0


def look(served: Served, since: int = 0) -> DashboardState:
    reply = served.http.get("/dashboard/state", params={"since": since})
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=DashboardState)


def test_samples_are_shown_once_as_text_and_with_their_rewards(served: Served) -> None:
    since = look(served).history.last
    asked = {
        "text": "hello there",
        "rid": "shown",
        "sampling_params": {"n": 2, "max_new_tokens": 5, "ignore_eos": True},
    }
    first, second = served.generate(**asked)
    state = look(served, since)
    assert (state.kind, state.is_ready, state.replicas) == ("server", True, None)
    shown = {each.request_id: each for each in state.history.samples}
    assert shown.keys() == {"shown_0", "shown_1"}
    found = shown["shown_1"]
    assert (found.prompt, found.output) == ("hello there", second["text"])
    assert (found.num_tokens, found.finish, found.versions) == (5, "length", (("default", 5),))
    assert found.num_prompt_tokens == second["meta_info"]["prompt_tokens"]
    assert found.mean_logprob is not None and found.mean_logprob < 0 < found.first_token_s <= found.seconds
    reply = served.http.post("/rewards", json={"rewards": {"shown_1": 0.25, "nobody": [1, None]}})
    assert (reply.status_code, reply.json()) == (200, {"num_known": 1})
    news = look(served, state.history.last).history
    assert [(each.request_id, each.reward) for each in news.samples] == [("shown_1", 0.25)]
    assert look(served, news.last).history.samples == []
    assert first["meta_info"]["id"] == "shown_0"


def test_a_long_sample_is_shown_by_its_ends(served: Served) -> None:
    ids = [20 + position % 90 for position in range(300)]
    params = {"max_new_tokens": 200, "ignore_eos": True}
    reply = served.generate(input_ids=ids, rid="long", return_logprob=False, sampling_params=params)
    (found,) = [each for each in look(served).history.samples if each.request_id == "long"]
    assert found.prompt.startswith(" \u2026 ") and " \u2026 " in found.output
    head, _, tail = found.output.partition(" \u2026 ")
    assert served.engine.tokenizer is not None
    assert head == served.engine.tokenizer.decode(reply["output_ids"][:96], skip_special_tokens=False)
    assert tail == served.engine.tokenizer.decode(reply["output_ids"][-96:], skip_special_tokens=False)


def test_many_samples_keep_little(served: Served) -> None:
    served.generate(input_ids=[[5, 6, 7]] * (MAX_SAMPLES + 20), sampling_params={"max_new_tokens": 1})
    assert len(look(served).history.samples) == MAX_SAMPLES


def test_points_say_what_the_metrics_say(served: Served) -> None:
    served.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 3, "ignore_eos": True})
    expected = served.engine.metrics()["num_generated_tokens"]
    end = time.monotonic() + SECONDS
    while (points := look(served).history.points)["num_generated_tokens"][-1:] != [expected]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert points.keys() == set(POINT_FIELDS)
    assert len({len(values) for values in points.values()}) == 1
    free, kept, used = (points[name][-1] for name in ("num_free_tokens", "num_evictable_tokens", "num_used_tokens"))
    assert free + kept + used == points["max_total_num_tokens"][-1] == 1 << 14


def test_a_look_asks_the_core_nothing(served: Served) -> None:
    served.generate(text="no question", sampling_params={"max_new_tokens": 2})
    with patch.object(CoreClient, "_send_call", side_effect=AssertionError("the core was asked")) as sending:
        assert look(served).history.last
        watched = sending.call_count  # the front's own look, each second, whoever looks at the front
        for _ in range(20):
            look(served)
        assert sending.call_count <= watched + 2


def test_updates_are_shown_with_their_pauses(start: START) -> None:
    served = start()
    served.engine.update_weights_from_disk(served.engine.resolved.folder, "second")
    served.engine.set_weight_version("third")
    history = look(served).history
    (update,) = history.updates
    assert (update.version, update.epoch, update.road, update.mode) == ("second", 1, "a folder", "shadow")
    assert 0 <= update.pause_ms <= 1e3 * update.seconds and update.num_tensors > 0
    versions = history.points["version"]
    assert [version for number, version in enumerate(versions) if versions[number - 1 : number] != [version]] == [
        "default",
        "second",
        "third",
    ]


@pytest.mark.parametrize(
    "rewards",
    [None, [1.0], 3, {"x": "good"}, {"x": [1, "2"]}, {"x": True}, {"x": {"y": 1}}, {"x": [[1]]}],
    ids=str,
)
def test_what_is_no_reward_is_refused(served: Served, rewards: Any) -> None:
    reply = served.http.post("/rewards", json={"rewards": rewards})
    assert reply.status_code == 400 and reply.json()["param"].startswith("rewards"), reply.text
    with pytest.raises(RequestError) as caught:
        served.engine.give_rewards(rewards)
    assert caught.value.field.startswith("rewards")


def test_rewards_are_given_in_python_too(served: Served) -> None:
    with Client(served.url) as client:
        client.generate(input_ids=[5, 6], sampling_params={"n": 3, "max_new_tokens": 1}, request_id="group")
        rewards: Any = np.array([0.5, 1.0, -1.0])
        assert client.give_rewards({"group": rewards}) == 3
        assert served.engine.give_rewards({"group": (None, 2)}) == 1
        for wrong in ({"group": float("nan")}, {"x" * 5000: 1.0}, {"group": np.zeros((2, 2))}, {7: 1.0}):
            with pytest.raises(RequestError):
                client.give_rewards(wrong)  # type: ignore[arg-type]
    found = [each.reward for each in look(served).history.samples if each.request_id == "group"]
    assert found == [0.5, 2.0, -1.0]


@pytest.mark.parametrize("since", ["x", "-1", "1.5", "", "\u0661", "9" * 30])
def test_a_number_that_is_none_is_refused(served: Served, since: str) -> None:
    reply = served.http.get("/dashboard/state", params={"since": since})
    assert (reply.status_code, reply.json()["param"]) == (400, "since")


def check_page(reply: httpx.Response) -> None:
    """It is whole in itself, and its policy allows its own script and style and nothing else."""
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(each.strip().split(" ", 1) for each in reply.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    without_namespace = reply.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(
        r"https?:|<script |<link [^>]*href=\"(?!data:)|innerHTML|\son\w+=|style=|localStorage", without_namespace
    )
    assert (reply.headers["x-content-type-options"], reply.headers["referrer-policy"]) == ("nosniff", "no-referrer")


@pytest.mark.parametrize("path", ["/dashboard", "/docs"])
def test_pages_are_strict_and_hold_no_data(start: START, path: str) -> None:
    served = start(api_key="secret", settings={"served_model_name": "told-to-nobody"})
    page = served.http.get(path)
    check_page(page)
    assert "told-to-nobody" not in page.text
    for behind in ("/dashboard/state", "/openapi.json"):
        assert served.http.get(behind).status_code == 401
        assert served.http.get(behind, params={"key": "secret", "api_key": "secret"}).status_code == 401, (
            "no key in URLs"
        )
        assert served.http.get(behind, headers={"authorization": "Bearer secret"}).status_code == 200
