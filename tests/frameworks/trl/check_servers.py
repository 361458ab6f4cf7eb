"""TRL's clients against a `headrace serve` process: server mode as it is, and AsyncGRPO's worker with our transfer.

TRL imports names of vLLM for both, and refuses to sync to a CPU: `server_runs` says what stands in for what.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace import Client
from tests.arch.source import ROOT
from tests.frameworks.trl.training import CLOSE, CLOSE_LOGPROB, POLICY
from tests.free_ports import free_port

pytestmark = pytest.mark.timeout(900)
STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server that nobody trained with."""
    port = free_port()
    flags = ["--dtype", "float32", "--num-threads", "1", "--context-length", "256", "--port", str(port)]
    command = [sys.executable, "-m", "headrace", "serve", str(POLICY), *flags]
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 200
    try:
        while not is_up(address):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def run(kind: str, url: str, folder: Path) -> dict[str, Any]:
    """What the process says at its end."""
    path = os.pathsep.join([str(STAND_IN), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.frameworks.trl.server_runs", kind, url, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(
        next(line for line in ended.stdout.splitlines() if line.startswith("RESULT"))[6:]
    )
    return found


def test_server_mode(url: str, tmp_path: Path) -> None:
    """TRL's client, unpatched but for one check of a device: weights, samples, chat and the scores of a teacher."""
    with Client(url) as client:
        epoch = client.status().epoch
        found = run("server", url, tmp_path)
        status = client.status()
        assert len(found["differences"]) == 4 and max(found["differences"]) <= CLOSE_LOGPROB
        assert status.epoch == epoch + 4, "one update a step"
        check_teacher(found["teacher"], client)
    chat, silent, top = found["chat"], found["silent"], found["top"]
    assert len(chat["prompt_ids"]) == 1 and len(chat["completion_ids"]) == 2
    assert all(len(token) in (2, 3) for row in chat["logprobs"] for token in row)
    assert silent["logprobs"] is None and [len(ids) for ids in silent["completion_ids"]] == [3] * 4
    for ids, tokens, values in zip(top["completion_ids"], top["logprob_token_ids"], top["logprobs"], strict=True):
        assert all(token in each and len(each) in (4, 5) for token, each in zip(ids, tokens, strict=True))
        assert all(each == sorted(each, reverse=True) for each in values)


def check_teacher(found: dict[str, Any], client: Client) -> None:
    """What TRL read is what the engine says: once more, so by products of other rows where prefixes are cached now."""
    near = functools.partial(pytest.approx, abs=CLOSE)
    for row, prompt in enumerate(([1, 2, 3], [60, 61])):
        (scored,) = client.score(input_ids=[[*prompt, 62, 63]], top_logprobs=5)
        assert [values[0] for values in found["actual_logprobs"][row]] == near(scored.prompt_logprobs[-2:])
        for ids, values, top in zip(
            found["logprob_token_ids"][row], found["logprobs"][row], scored.prompt_top_logprobs[-2:], strict=True
        ):
            assert top is not None and ids == list(top) and values == near(list(top.values()))


def test_async_grpo(url: str, tmp_path: Path) -> None:
    """Four steps while TRL's worker samples: one update at the start and one after each step, each verified."""
    found = run("async", url, tmp_path)
    assert found["versions"] == ["1", "2", "3", "4", "5"]
    with Client(url) as client:
        status = client.status()
        assert status.version == "5" and not status.paused
    steps = [each for each in found["log"] if "ratio" in each]
    assert len(steps) == 4 and all(math.isfinite(each["loss"]) for each in steps)
    fresh = [each for each in steps if each["sample/staleness_max"] == 0]
    assert fresh and all(each["ratio"] == pytest.approx(1.0, abs=CLOSE) for each in fresh)
    print([(each["reward"], each["ratio"], each["sample/staleness_mean"]) for each in steps])
