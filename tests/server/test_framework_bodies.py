"""What SkyRL, NeMo-RL and prime-rl send, call by call in their order, and what they read of the replies.

Bodies are written down from their sources (SkyRL 0.4.0, NeMo-RL 7ea279a, prime-rl 559b447). What the calls do is tested
where their routes are: broadcasts in test_vllm, buckets in test_buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Engine
from tests.server.builders import SETTINGS, save_random_model
from tests.server.conftest import Served

IDS = [3, 141, 59, 26, 5]


class Call(msgspec.Struct):
    """`keys` are those that the client reads of a reply in JSON; None: it looks at the status only."""

    method: str
    path: str
    body: Any = None
    keys: tuple[str, ...] | None = None
    headers: dict[str, str] = {}
    status: int = 200


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server that these tests change, and the folder of other weights."""
    folder = save_random_model(tmp_path_factory.mktemp("stable"), seed=5)
    with Engine(model_folder, inprocess=True, **SETTINGS) as engine:
        served = Served(engine, weight_roots=[str(folder)])
        yield served, folder
        served.close()


def made(served: Served, calls: list[Call]) -> list[Any]:
    """The replies to all calls, each as its client wants it."""
    found = []
    for call in calls:
        more: dict[str, Any] = {} if call.body is None else {"json": call.body}
        reply = served.http.request(call.method, call.path, headers=call.headers, **more)
        assert reply.status_code == call.status, (call, reply.text)
        assert "x-headrace-warnings" not in reply.headers, (call, reply.headers["x-headrace-warnings"])
        found.append(reply.json() if call.keys is not None else reply.text)
        assert all(key in found[-1] for key in call.keys or ()), (call, found[-1])
    return found


def test_prime_rl(trained: tuple[Served, Path]) -> None:
    """Its file system mode: pause, a folder, resume; requests say which policy they are of by the salt."""
    served, folder = trained
    model = served.http.get("/v1/models").json()["data"][0]["id"]
    salted = {"model": model, "cache_salt": "7"}
    params: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 4,
        "logprobs": 1,
        "prompt_logprobs": 1,
        "min_tokens": 0,
    }
    params |= {"top_k": -1, "min_p": 0.0, "seed": 3, "n": 1, "skip_special_tokens": False, "stop_token_ids": []}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "max_tokens": 4}
    chat |= {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "n": 1, "temperature": 1.0, "top_p": 1.0}
    chat |= {"spaces_between_special_tokens": False, "skip_special_tokens": False, "tools": None}
    rank = {"X-data-parallel-rank": "0"}
    replies = made(
        served,
        [
            Call("GET", "/health"),
            Call("GET", "/liveness"),
            Call("GET", "/v1/models", keys=("data",)),
            Call("POST", "/init_broadcaster", {"host": "x", "port": 29501, "rank_offset": 0}, status=404),
            Call("POST", "/pause?mode=keep&clear_cache=false", keys=("status",)),
            Call("POST", "/update_weights", {"weight_dir": str(folder)}, ()),
            Call("POST", "/resume", keys=("status",)),
            Call("POST", "/v1/chat/completions", {**chat, **salted}, ("choices", "prompt_token_ids"), rank),
            Call("POST", "/inference/v1/generate", {"token_ids": IDS, "sampling_params": params, **salted}, (), rank),
        ],
    )
    said, drawn = replies[-2]["choices"][0], replies[-1]
    assert len(said["token_ids"]) == len(said["logprobs"]["content"])
    assert [each["logprob"] <= 0 for each in said["logprobs"]["content"]] == [True] * len(said["token_ids"])
    assert drawn["prompt_logprobs"][0] is None and str(IDS[1]) in drawn["prompt_logprobs"][1]
    assert len(drawn["choices"][0]["logprobs"]["content"]) == len(drawn["choices"][0]["token_ids"])


def test_skyrl(trained: tuple[Served, Path]) -> None:
    """Its client's data and control calls, with the session in a header, and replies of one connection each."""
    served, folder = trained
    session = {"X-Session-ID": "trajectory-7", "Connection": "close"}
    params: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    params |= {"max_tokens": 4, "logprobs": 0}
    params |= {"include_stop_str_in_output": True, "stop": None, "skip_special_tokens": True, "repetition_penalty": 1.0}
    body = {"sampling_params": params, "model": "default", "token_ids": IDS, "cache_salt": "0"}
    replies = made(
        served,
        [
            Call("GET", "/get_world_size", {}, ("world_size",)),
            Call("POST", "/inference/v1/generate", body, ("choices",), session),
            Call(
                "POST", "/tokenize", {"prompt": "hello", "add_special_tokens": False, "model": "default"}, ("tokens",)
            ),
            Call("POST", "/detokenize", {"tokens": IDS, "model": "default"}, ()),
            Call("POST", "/pause?mode=keep&clear_cache=false", {}, ("status",)),
            Call("POST", "/start_weight_update", headers=session, keys=("message",)),
            Call("POST", "/update_weights", {"weight_dir": str(folder)}, (), session),
            Call("POST", "/reset_prefix_cache", {"reset_running_requests": False}, ()),
            Call("POST", "/resume", {}, ("status",)),
            Call("POST", "/sleep?level=2"),
            Call("GET", "/is_sleeping", keys=("is_sleeping",)),
            Call("POST", "/wake_up?tags=weights"),
            Call("POST", "/update_weights", {"weight_dir": str(folder)}, ()),
            Call("POST", "/wake_up?tags=kv_cache"),
            Call("POST", "/reset_prefix_cache", {"reset_running_requests": True}, ()),
            Call("POST", "/inference/v1/generate", body, ("choices",), session),
        ],
    )
    (first,) = replies[1]["choices"]
    assert first["finish_reason"] in ("stop", "length") and len(first["token_ids"]) == 4
    assert len([each["logprob"] for each in first["logprobs"]["content"]]) == 4
    assert replies[10] == {"is_sleeping": True}


def test_nemo_rl(trained: tuple[Served, Path]) -> None:
    """Its SGLang path: health by generation, flushes that must be 200, memory by tag, and text of SGLang's fields."""
    served, folder = trained
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 4, "stop_token_ids": None, "stop": None}
    generate = {"input_ids": IDS, "sampling_params": params, "return_logprob": True}
    path = {"model_path": str(folder), "flush_cache": False, "weight_version": "4"}
    replies = made(
        served,
        [
            Call("GET", "/health_generate"),
            Call("GET", "/flush_cache"),
            Call("POST", "/release_memory_occupation", {"tags": ["kv_cache"]}),
            Call("POST", "/release_memory_occupation", {"tags": ["weights"]}),
            Call("POST", "/resume_memory_occupation", {"tags": ["weights"]}),
            Call("POST", "/update_weights_from_disk", path, ("success",)),
            Call("POST", "/resume_memory_occupation", {"tags": ["kv_cache"]}),
            Call("POST", "/weights_checker", {"action": "checksum"}, ()),
            Call("GET", "/flush_cache"),
            Call("POST", "/generate", generate, ("output_ids", "meta_info")),
        ],
    )
    meta = replies[-1]["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == replies[-1]["output_ids"]
    assert meta["weight_version"] == "4" and meta["finish_reason"]["type"] in ("stop", "length")
