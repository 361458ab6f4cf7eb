"""`--dp-size`: replicas that are processes of this host, behind one address. These are real processes that die, with
servers that cost little in them; `check_fleet.py` is the same with engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from headrace import ConfigError, EngineDeadError
from headrace.cli.main import main
from headrace.cluster import catch_up
from headrace.cluster import fleet as fleet_module
from headrace.cluster.fleet import Fleet
from headrace.cluster.fleet_options import FleetOptions
from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.config import EngineConfig
from headrace.config.devices import CudaDevice
from headrace.server.listening import listen
from tests.cluster.builders import Routed
from tests.cluster.test_resumption import over
from tests.cluster.weighted import WeightedReplica, WeightedServer


@contextlib.asynccontextmanager
async def running(folder: Path, num: int, **options: Any) -> AsyncIterator[tuple[Fleet, Routed]]:
    """A fleet of cheap servers behind a router."""
    fleet = Fleet(EngineConfig(model="x"), {}, FleetOptions(dp_size=num, **options), WeightedServer)
    router = ReplicaRouter([], RouterOptions(policy="round_robin"), weights_folder=folder)
    listener = listen("127.0.0.1", 0)
    await router.start(listener)
    try:
        await router.start_fleet(fleet)
        found = Routed(router, [], listener.getsockname()[1])
        await found.until_healthy(num)
        yield fleet, found
        await found.http.aclose()
    finally:
        await router.stop(0.0)
        await fleet.close()


async def versions_of(found: Routed, num: int = 6) -> Counter[str]:
    """Which weights answer."""
    params = {"max_new_tokens": 1}
    replies = [await found.generate(input_ids=[n], sampling_params=params) for n in range(num)]
    return Counter(reply.json()["meta_info"]["weight_version"] for reply in replies)


def test_one_that_is_killed_is_replaced_and_takes_the_weights_of_a_peer(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path, 2) as (fleet, found):
            first, second = found.router.replicas
            body: dict[str, Any] = {"model_path": "/x", "weight_version": "v1"}
            assert (await found.http.post("/update_weights_from_disk", json=body)).json()["success"] is True
            process = fleet._members[1].process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            await found.until(lambda: not second.is_healthy)
            seen: Counter[str] = Counter()
            while not second.is_ready:
                seen += await versions_of(found)
            seen += await versions_of(found)
            assert set(seen) == {"v1"} and second.num_sent > 0  # a new process has "v0"
            assert [each.url for each in found.router.replicas] == [first.url, second.url]
            assert not list(tmp_path.iterdir())
            body["fails_at"] = int(second.url.rpartition(":")[2])
            told = (await found.http.post("/update_weights_from_disk", json={**body, "weight_version": "v2"})).json()
            assert told["failed_replicas"] == [second.id]
            await found.until(lambda: second.is_ready)  # one that has only missed an update is brought to it, too
            assert second.weight_version == "v2" and set(await versions_of(found)) == {"v2"}

    asyncio.run(story())


def test_a_folder_of_weights_that_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory is not held for ever; that of one who lives is left alone."""
    monkeypatch.setattr(catch_up, "_SHARED_MEMORY", tmp_path)
    (tmp_path / "headrace-weights-file").write_text("no folder")
    living, killed = catch_up.WeightsFolder(), catch_up.WeightsFolder()
    (killed.path / "current").mkdir()
    (killed.path / "current" / "model.safetensors").write_text("weights")
    assert killed._lock is not None
    os.close(killed._lock)  # as the system does
    third = catch_up.WeightsFolder()
    assert {each.name for each in tmp_path.iterdir() if each.is_dir()} == {living.path.name, third.path.name}
    for each in (living, third, third):
        each.close()
    assert [each.name for each in tmp_path.iterdir()] == ["headrace-weights-file"]


def test_catching_up_goes_on_whatever_a_peer_says_and_asks_the_next(tmp_path: Path) -> None:
    async def story(found: Routed) -> None:
        body = {"model_path": "/x", "weight_version": "v1", "fails_at": found.replicas[2].port}
        found.replicas[0].raw["/headrace/save_model"] = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n\xc1"
        assert (await found.http.post("/update_weights_from_disk", json=body)).json()["success"] is True
        await found.until(lambda: all(each.is_current for each in found.router.replicas))
        assert found.replicas[2].weight_version == "v1"

    async def run() -> None:
        async with over([await WeightedReplica().start() for _ in range(3)], weights_folder=tmp_path) as found:
            await story(found)

    catch_up_rest, catch_up.REST_SECONDS = catch_up.REST_SECONDS, 0.1
    try:
        asyncio.run(run())
    finally:
        catch_up.REST_SECONDS = catch_up_rest


def test_a_budget_that_is_spent_leaves_the_others_and_without_any_it_is_over(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path, 2, max_replica_restarts=0) as (fleet, found):
            for member, num_left in zip(fleet._members, (1, 0), strict=True):
                assert member.process is not None
                os.kill(member.process.pid, signal.SIGKILL)
                await found.until_healthy(num_left)
                if num_left:
                    assert (await versions_of(found)).total() == 6 and not fleet.ended.done()
            error = await asyncio.wait_for(fleet.ended, 30)
            assert isinstance(error, EngineDeadError) and "max_replica_restarts 0" in error.message

    asyncio.run(story())


def test_one_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path, 2, hang_timeout=3.0) as (fleet, found):
            process = fleet._members[0].process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            await found.until(lambda: fleet._members[0].process is not process)
            await found.until_healthy(2)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dp-size", "0"], "dp_size must be in"),
        (["--max-replica-restarts", "1"], "max_replica_restarts is for several replicas"),
        (["--policy", "round_robin"], "policy is for several replicas"),
        (["--dp-size", "2", "--max-attempts", "0"], "max_attempts must be at least 1"),
        (["--dp-size", "2", "--nnodes", "2", "--dist-init-addr", "x:1"], "dp_size: a replica over several hosts"),
        (["--dp-size", "2", "--host", "0.0.0.0"], "reachable from outside"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), "--port", "0", *words]) == 2
    assert complaint in capsys.readouterr().err


def made(monkeypatch: pytest.MonkeyPatch, num_devices: int, num_replicas: int, **settings: Any) -> list[Any]:
    device = CudaDevice("any", 1 << 30, (9, 0), 132)
    monkeypatch.setattr(fleet_module, "cuda_devices", lambda: (device,) * num_devices)
    config = EngineConfig(model="x", **settings)
    return Fleet(config, settings, FleetOptions(dp_size=num_replicas))._members


def test_each_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = made(monkeypatch, 4, 2, tp_size=2)
    assert [each.environment for each in found] == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert made(monkeypatch, 2, 2)[1].environment == {"CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(ConfigError, match="3 replicas of 2 ranks need 6 devices, and this process sees 4"):
        made(monkeypatch, 4, 3, tp_size=2)


def test_each_has_a_share_of_the_cores_and_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = [each.config for each in made(monkeypatch, 0, 3, tp_size=2)]
    assert [each["num_threads"] for each in found] == [1, 1, 1] and "seed" not in found[0]
    assert made(monkeypatch, 0, 2)[0].config["num_threads"] == 4
    assert made(monkeypatch, 0, 2, num_threads=3)[0].config["num_threads"] == 3
    seeds = [each.config["seed"] for each in made(monkeypatch, 0, 3, seed=5)]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    dummies = [each.config["seed"] for each in made(monkeypatch, 0, 3, load_format="dummy")]
    assert len(set(dummies)) == 1  # they seed the weights
    keys = {each.config["api_key"] for each in made(monkeypatch, 0, 2)}
    assert len(keys) == 1 and len(keys.pop()) > 30
