"""Replicas as actors of Ray's: real Ray, real engines, real kills."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch

from headrace.cli.main import parse
from headrace.rl.demo import POLICY
from headrace.rl.ray_replicas import RayReplicas
from headrace.types.errors import ConfigError, RequestError, WeightUpdateError
from tests.arch.source import ROOT, child_environment
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model

pytestmark = pytest.mark.timeout(600)
WAIT_SECONDS = 120.0
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
PROMPTS = [[10 + i, 20, 30 + i] for i in range(5)]
INVARIANT = {**SETTINGS, "numerics": "invariant"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A small Ray of this test's own; the folder of its logs."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options: Any = {"include_dashboard": False, "log_to_driver": False, "runtime_env": {"env_vars": environment}}
    context = ray.init(num_cpus=4, **options)
    yield Path(context.address_info["session_dir"], "logs")
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def router() -> Iterator[str]:
    command = [sys.executable, "-m", "headrace", "router", "--port", "0", "--replica-api-key", "replicas-key"]
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = ""
    while not url:
        found = re.search(r"http://[\d.:]+", process.stderr.readline())
        url = found.group() if found else ""
    yield url
    process.terminate()
    process.communicate(timeout=WAIT_SECONDS)


@pytest.fixture(scope="module")
def replicas(cluster: Path, folder: Path, router: str) -> Iterator[RayReplicas]:
    with RayReplicas(folder, 2, router=router, api_key="replicas-key", **INVARIANT) as made:
        yield made


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def pushed(seed: int) -> list[tuple[str, torch.Tensor]]:
    return named_tensors(model_of(seed))


def process_ids(replicas: RayReplicas) -> list[tuple[int, int]]:
    """Those of the actors and their cores."""
    found: list[tuple[int, int]] = ray.get([actor.process_ids.remote() for actor in replicas._actors])
    return found


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ids(replicas: RayReplicas, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    found = replicas.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [each.prompt_index for each in found] == list(range(len(prompts)))
    return [tuple(each.token_ids) for each in found]


def test_prompts_are_shared_out_and_come_back_in_order(replicas: RayReplicas, router: str) -> None:
    assert len(replicas.urls) == 2 and len({*replicas.urls}) == 2
    whole = ids(replicas)
    assert whole == [ids(replicas, [prompt])[0] for prompt in PROMPTS]
    until(lambda: httpx.get(f"{router}/ready").status_code == 200)
    body = {"input_ids": PROMPTS[0], "sampling_params": GREEDY}
    answer = httpx.post(f"{router}/generate", json=body, timeout=WAIT_SECONDS)
    assert tuple(answer.json()["output_ids"]) == whole[0]
    params = [{**GREEDY, "max_new_tokens": 1 + i, "n": 2} for i in range(5)]
    found = replicas.generate(input_ids=PROMPTS, sampling_params=params)
    assert [len(each.token_ids) for each in found] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_errors_are_those_of_an_engine(replicas: RayReplicas, folder: Path) -> None:
    with pytest.raises(RequestError) as refused:
        replicas.generate(input_ids=[[1], [2]], sampling_params={"top_p": 7.0})
    assert refused.value.field == "sampling_params.top_p"
    with pytest.raises(RequestError) as refused:
        replicas.generate(input_ids=[[1], [2]], sampling_params=[GREEDY])
    assert refused.value.field == "sampling_params"
    with pytest.raises(ConfigError) as unknown:
        RayReplicas(folder, 1, kv_pool_token=4)
    assert unknown.value.field == "kv_pool_token" and "kv_pool_tokens is" in unknown.value.message
    with pytest.raises(ConfigError) as failed:
        RayReplicas(folder.parent / "nowhere", 1)
    assert failed.value.field == "model"


def test_all_replicas_have_new_weights_or_none(replicas: RayReplicas) -> None:
    before, versions = ids(replicas), replicas.versions()
    with pytest.raises(WeightUpdateError):
        replicas.update_weights(pushed(2)[:-1], "half")
    assert replicas.versions() == versions and ids(replicas) == before
    reports = replicas.update_weights(iter(pushed(2)), "v2")
    assert [reports[number].version for number in (0, 1)] == ["v2", "v2"]
    assert replicas.versions() == {0: "v2", 1: "v2"} and ids(replicas) != before


def until_others(replicas: RayReplicas, urls: set[str]) -> set[str]:
    """Wait until both serve, not all of them at these addresses."""
    until(lambda: len(replicas.urls) == 2 and set(replicas.urls) != urls)
    return set(replicas.urls)


def test_a_replica_whose_core_died_comes_back_with_the_weights_of_the_others(
    replicas: RayReplicas, router: str
) -> None:
    replicas.update_weights(pushed(3), "v3")
    expected, urls = ids(replicas), set(replicas.urls)
    for of_core in (True, False):
        os.kill(process_ids(replicas)[0][of_core], signal.SIGKILL)
        assert ids(replicas) == expected  # asked of the other one
        urls = until_others(replicas, urls)
        assert replicas.versions() == {0: "v3", 1: "v3"}
        found = [each for _ in range(2) for each in ids(replicas, PROMPTS[:1])]  # one each
        assert found == expected[:1] * 2
    until(lambda: all(each["is_ready"] for each in httpx.get(f"{router}/workers").json()["workers"]))
    assert {each["url"] for each in httpx.get(f"{router}/workers").json()["workers"]} == urls
    replicas.update_weights(pushed(4), "v4")
    assert replicas.versions() == {0: "v4", 1: "v4"}


@ray.remote(num_cpus=0)
def use_elsewhere(replicas: RayReplicas, seed: int, version: str) -> list[tuple[int, ...]]:
    replicas.update_weights(pushed(seed), version)
    replicas.close()  # a copy of the handle ends nothing
    return ids(replicas)


def test_a_handle_works_in_other_processes(replicas: RayReplicas) -> None:
    there = ray.get(use_elsewhere.remote(replicas, 5, "v5"), timeout=WAIT_SECONDS)
    assert replicas.versions() == {0: "v5", 1: "v5"} and ids(replicas) == there


DOCS = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    return [block.replace("Qwen/Qwen3-0.6B", str(POLICY)).replace("trained/", f"{POLICY}/") for block in found]


def test_what_the_docs_show_works(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, own = blocks("python")
    exec(compile(first.replace("ray.init()\n", ""), "docs/ray.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines()[-1] == "{0: 'step-1', 1: 'step-1'}"
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(own, "docs/ray.md", "exec"), names)
    actor = ray.remote(max_restarts=1)(names["Rollout"]).remote(str(POLICY))
    ray.get(actor.__ray_ready__.remote(), timeout=WAIT_SECONDS)
    (line,) = "".join(blocks("sh")).splitlines()
    assert parse(shlex.split(line)[1:]).command == "router"


ENDS = {"closed": "replicas.close()", "dropped": "del replicas", "left": "", "shut down": "ray.shutdown()"}
OWNER = """
import sys, ray
from headrace.rl.ray_replicas import RayReplicas
from tests.engine.builders import SETTINGS
ray.init(address=sys.argv[2], log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
replicas = RayReplicas(sys.argv[1], 1, **SETTINGS)
replicas.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4})
print(*ray.get(replicas._actors[0].process_ids.remote()), flush=True)
"""


@pytest.mark.parametrize("end", ENDS)
def test_however_an_owner_ends_nothing_is_left_and_no_log_is_alarmed(cluster: Path, folder: Path, end: str) -> None:
    command = [sys.executable, "-c", OWNER + ENDS[end], str(folder), ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    actor, core = map(int, done.stdout.split())
    until(lambda: not (is_alive(actor) or is_alive(core)))
    logs = [path.read_text() for path in cluster.glob(f"worker-*-{actor}.err")]
    assert len(logs) == 1
    assert not re.search("dead|killed|Traceback|ERROR", logs[0]), logs[0]
