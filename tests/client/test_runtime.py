"""A server process of one's own: how it starts, what it is told, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headrace import CheckpointError, Client, ConfigError, HeadraceError, RequestError, Runtime, UnreachableError
from headrace.client.runtime import _end
from tests.arch.source import ROOT, child_environment
from tests.client.conftest import CONFIG, left_in_shared_memory
from tests.processes import children_of, runs


def wait_gone(pids: list[int]) -> None:
    """Until none of them runs; a zombie does not."""
    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {[pid for pid in pids if runs(pid)]}"
        time.sleep(0.02)


def test_a_runtime_ends_with_all_that_it_started(model_folder: Path) -> None:
    runtime = Runtime(model_folder, **CONFIG)
    pids = [runtime.pid, *children_of(runtime.pid, everything_below=True)]
    assert len(pids) > 1, "the server and its core"
    for pid in pids:
        words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert runtime.api_key.encode() not in words
    assert runtime.url.startswith("http://127.0.0.1:")
    with Client(runtime.url) as stranger, pytest.raises(ConfigError):
        stranger.status()
    with Client(runtime.url, runtime.api_key) as other:
        assert other.generate("Up", sampling_params={"max_new_tokens": 2})
    runtime.close()
    runtime.close()
    wait_gone(pids)
    assert not left_in_shared_memory(*pids)
    with Client(runtime.url, runtime.api_key) as other, pytest.raises(UnreachableError):
        other.status()


def broken(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path


def test_what_keeps_it_from_starting_is_raised_here(model_folder: Path, tmp_path: Path) -> None:
    before = children_of(os.getpid(), everything_below=True)
    cases: list[tuple[Any, dict[str, Any], type[HeadraceError], str]] = [
        (model_folder, {"page_size": -1}, ConfigError, "page_size"),
        (model_folder, {"nonsense": 1}, ConfigError, "nonsense"),
        (model_folder, {"dtype": "float3"}, ConfigError, "dtype"),
        (model_folder, {"body_timeout": 0}, ConfigError, "body_timeout"),
        (model_folder, {"api_key": " "}, ConfigError, "api_key"),
        (model_folder, {"api_key_file": "x"}, ConfigError, "api_key_file"),
        (model_folder, {"start_timeout": -1}, ConfigError, "start_timeout"),
        (model_folder, {"log_level": "loud"}, ConfigError, "log_level"),
        (model_folder, {"seed": object()}, ConfigError, "config"),
        (broken(model_folder, tmp_path / "broken"), {}, CheckpointError, ""),
        (tmp_path / "-nothing", {}, ConfigError, "model"),
        (None, {}, ConfigError, "model"),
        ("a\0b", {}, ConfigError, "model"),
        (tmp_path / "-nothing", {"timeout": 0}, RequestError, "timeout"),
    ]
    for model, config, kind, field in cases:
        with pytest.raises(kind) as caught:
            Runtime(model, **{**CONFIG, **config})
        assert caught.value.field == field or not field, config
        assert children_of(os.getpid(), everything_below=True) == before, config


def test_a_name_that_is_meant_is_said_whosever_setting_it_is(model_folder: Path) -> None:
    for name, meant in (("weight_root", "weight_roots"), ("page_sise", "page_size")):
        with pytest.raises(ConfigError, match=f"{name} is no setting .*; {meant} is"):
            Runtime(model_folder, **{**CONFIG, name: "x"})


def test_own_keys_and_server_settings_are_taken(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", "of a server that this process is")
    monkeypatch.setenv("HEADRACE_ADMIN_API_KEY", "the same")
    with Runtime(model_folder, **CONFIG) as runtime:
        assert runtime.generate(input_ids=[1], sampling_params={"max_new_tokens": 1}) and runtime.digest()
    options: dict[str, Any] = {"api_key": "data", "admin_api_key": "admin", "max_body_bytes": 4096}
    with Runtime(model_folder, **CONFIG, **options) as runtime:
        assert runtime.api_key == "data" and runtime.digest()
        with Client(runtime.url, "data") as other, pytest.raises(ConfigError):
            other.digest()
        with pytest.raises(HeadraceError) as caught:
            runtime.generate(input_ids=[1] * 4096)
        assert type(caught.value).__name__ == "RequestTooLargeError"


OWNER = """
import json, os, sys, time
from headrace import Runtime
runtime = Runtime(sys.argv[1], **json.loads(sys.argv[2]))
if sys.argv[3] == "fork" and os.fork() == 0:
    time.sleep(60)
print(runtime.pid, flush=True)
if sys.argv[3] == "drop":
    sys.exit()
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "drop", "fork"])
def test_it_ends_with_its_owner(model_folder: Path, end: str) -> None:
    words = [sys.executable, "-c", OWNER, str(model_folder), json.dumps(CONFIG), end]
    env = child_environment()
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        pids = [pid, *children_of(pid, everything_below=True)]
        if end != "drop":
            owner.send_signal(signal.SIGKILL)
        try:
            wait_gone(pids)
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


def test_a_fork_that_has_closed_what_it_had_ends_without_a_word() -> None:
    """As one that becomes another program: the server is not its own, and neither is the number that the link had."""
    ours, theirs = socket.socketpair()
    with theirs, subprocess.Popen(["sleep", "60"]) as process:
        os.close(ours.fileno())
        _end(ours, process, os.getpid() + 1)
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.5])
def test_an_owner_killed_while_it_starts_leaves_nothing(model_folder: Path, seconds: float) -> None:
    words = [sys.executable, "-c", OWNER, str(model_folder), json.dumps(CONFIG), "kill"]
    env = child_environment()
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as owner:
        time.sleep(seconds)
        pids = children_of(owner.pid, everything_below=True)
        owner.send_signal(signal.SIGKILL)
    wait_gone(pids)
