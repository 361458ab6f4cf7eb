"""`headrace router` as a process in front of a real server: what clients of all dialects get, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from headrace import Client, ConfigError, Engine, HeadraceError, serve
from headrace.cli.main import main, parse
from headrace.cluster.options import RouterOptions
from tests.arch.source import ROOT, child_environment
from tests.server.builders import SETTINGS, save_random_model

KEYS = {"HEADRACE_API_KEY": "front", "HEADRACE_REPLICA_API_KEY": "back"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router with a key of its own; it has to end well."""
    folder = save_random_model(tmp_path_factory.mktemp("model"))
    with Engine(folder, inprocess=True, served_model_name="tiny", **SETTINGS) as engine:
        handle = serve(engine, api_key="back")
        command = [sys.executable, "-m", "headrace", "router", handle.url, "--port", "0", "--log-json"]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=child_environment(**KEYS)
        ) as process:
            assert process.stderr is not None
            told = [json.loads(process.stderr.readline()) for _ in range(2)]
            assert {each["message"].partition(" ")[0] for each in told} == {"routing", "replica-0"}
            assert next(each["loop"] for each in told if "loop" in each).startswith("uvloop")
            yield next(each["url"] for each in told if "url" in each)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        handle.stop()


def test_openais_client(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="front") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        whole = client.completions.create(model="tiny", prompt="a", max_tokens=4, temperature=0)
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=4, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == whole.choices[0].text
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="a", max_tokens=-1)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="back") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_our_own_client_and_the_native_dialect(url: str) -> None:
    client = Client(url, api_key="front")
    params = {"max_new_tokens": 4, "temperature": 0}
    (sample,) = client.generate(input_ids=[[1, 2, 3]], sampling_params=params)
    with pytest.raises(HeadraceError, match="headrace.Client of each replica"):
        client.save_model("/tmp/anywhere")
    with httpx.Client(base_url=url, headers={"authorization": "Bearer front"}, timeout=60) as http:
        reply = http.post("/generate", json={"input_ids": [1, 2, 3], "sampling_params": params})
        assert reply.json()["output_ids"] == list(sample.token_ids)
        assert http.get("/model_info").json()["weight_version"] == "default"
        assert http.get("/weight_version").json()["weight_version"] == "default"
        assert http.get("/server_info").json()["served_model_name"] == "tiny"
        for path in ("/pause_generation", "/continue_generation", "/flush_cache"):
            assert http.post(path, json={}).json()["success"] is True
        assert http.post("/update_weights_from_disk", json={"model_path": "/nowhere"}).status_code == 400
        assert 'headrace_router_replica_is_healthy{replica="replica-0"' in http.get("/metrics").text
        deadline = time.monotonic() + 30
        while (told := http.get("/ready")).status_code != 200:  # as on a machine that is too busy to answer in time
            assert time.monotonic() < deadline
        assert told.json()["weight_version"] == "default"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["ftp://x"], "is no address"),
        (["http://127.0.0.1:1", "http://127.0.0.1:1"], "is a replica already"),
        (["--host", "0.0.0.0"], "reachable from outside"),
        (["--max-attempts", "0"], "max_attempts must be at least 1"),
        (["--connect-timeout", "0"], "connect_timeout"),
        (["--api-key", "a b "], "api_key must be printable"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", "--port", "0", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_without_a_replica_it_says_what_it_waits_for() -> None:
    command = [sys.executable, "-m", "headrace", "router", "--port", "0", "--log-level", "warning"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=child_environment()) as process:
        assert process.stderr is not None
        assert "no replica is given: requests wait, then get 503, until POST /workers" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_flags_are_the_options_and_keys_come_from_files(tmp_path: Path) -> None:
    arguments = parse(["router", "http://a:1", "--policy", "round_robin", "--allowed-host", "x"])
    assert arguments.urls == ["http://a:1"] and arguments.policy == "round_robin"
    (tmp_path / "key").write_text("secret\n")
    os.chmod(tmp_path / "key", 0o600)
    options = RouterOptions.from_dict({"replica_api_key_file": str(tmp_path / "key"), "api_key": "own"})
    assert (options.data_key, options.admin_key) == ("secret", "secret")
    assert RouterOptions(api_key="own").data_key == "own" and RouterOptions().admin_key is None
    with pytest.raises(ConfigError, match="polcy is not a router setting; policy is"):
        RouterOptions.from_dict({"polcy": "round_robin"})
