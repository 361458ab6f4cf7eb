"""Weights through a router into two real engines, by every road that it has: both hold exactly what was sent."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from headrace import Client, Engine, UpdateConflictError, WeightUpdateError, serve
from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.cluster.sessions import SharedSession
from headrace.server.listening import listen
from tests.server.bucket_client import bodies
from tests.server.builders import SETTINGS, save_random_model

SHARED = Path("/dev/shm")
Tensors = dict[str, torch.Tensor]


class RouterThread:
    """A router on a loop of its own, for tests that block."""

    def __init__(self, urls: list[str], weights_folder: Path | None = None, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.url = self._run(self._start(urls, weights_folder, options))

    async def _start(self, urls: list[str], weights_folder: Path | None, options: dict[str, Any]) -> str:
        self.router = ReplicaRouter(urls, RouterOptions.from_dict(options), weights_folder=weights_folder)
        listener = listen("127.0.0.1", 0)
        await self.router.start(listener)
        async with asyncio.timeout(60):
            while not all(each.is_healthy for each in self.router.replicas):
                await asyncio.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def close(self) -> None:
        self._run(self.router.stop(0.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_random_model(tmp_path_factory.mktemp("cold"), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def engines(folders: list[Path]) -> Iterator[list[Engine]]:
    with (
        Engine(folders[0], inprocess=True, **SETTINGS) as first,
        Engine(folders[0], inprocess=True, **SETTINGS) as second,
    ):
        yield [first, second]


@pytest.fixture(scope="module")
def url(engines: list[Engine], folders: list[Path]) -> Iterator[str]:
    handles = [serve(engine, weight_roots=tuple(map(str, folders))) for engine in engines]
    routed = RouterThread([handle.url for handle in handles])
    yield routed.url
    routed.close()
    for handle in handles:
        handle.stop()


@pytest.fixture(scope="module")
def digests(folders: list[Path]) -> list[dict[str, str]]:
    found = []
    for folder in folders:
        with Engine(folder, inprocess=True, **SETTINGS) as engine:
            found.append(engine.digest())
    return found


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def halves_of(folder: Path) -> list[Tensors]:
    items = list(tensors_of(folder).items())
    return [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]


def are_live(engines: list[Engine], digest: dict[str, str], version: str) -> bool:
    return all((each.digest(), each.version) == (digest, version) for each in engines)


@pytest.mark.parametrize("shares_memory", [True, False])
def test_our_client_pushes_as_to_one_engine(
    shares_memory: bool,
    url: str,
    engines: list[Engine],
    folders: list[Path],
    digests: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions: list[SharedSession] = []
    told = SharedSession.told
    monkeypatch.setattr(SharedSession, "told", lambda self, limit: sessions.append(self) or told(self, limit))  # type: ignore[func-returns-value]
    with Client(url, shares_memory=shares_memory) as client:
        first, second = halves_of(folders[1])
        session = client.begin_update("step-1", None)
        for part in (first, second):
            client.stage(session, part)
        report = client.commit(session)
        assert report.version == "step-1" and are_live(engines, digests[1], "step-1")
        assert client.digest() == digests[1]
        report = client.update_weights_from_tensor(tensors_of(folders[2]), "step-2", mode="inplace")
        assert are_live(engines, digests[2], "step-2")
        first, second = halves_of(folders[0])
        assert client.update_weights_from_bucket(first, "step-3") is None
        last = client.update_weights_from_bucket(second, "step-3")
        assert last is not None and last.version == "step-3" and are_live(engines, digests[0], "step-3")
        client.update_weights_from_disk(folders[1], 4)
        assert are_live(engines, digests[1], "4")
        client.set_weight_version("five")
        assert are_live(engines, digests[1], "five")
        (sample,) = client.generate(input_ids=[[1, 2, 3]], sampling_params={"max_new_tokens": 2})
        assert {version for version, _ in sample.version_spans} == {"five"}
        client.pause("keep")
        assert client.flush_cache() >= 0 and client.abort("nobody") == 0
        client.resume()
    assert {len(each.lent) == len(each.begun) - 1 == 1 for each in sessions} == {shares_memory}


def test_what_is_wrong_with_an_update_is_said_and_changes_nothing(
    url: str, engines: list[Engine], folders: list[Path]
) -> None:
    before = [(each.version, each.digest()) for each in engines]
    with Client(url) as client:
        with pytest.raises(WeightUpdateError, match=r"2 of 2 replicas failed.*missing"):
            client.update_weights_from_tensor(halves_of(folders[1])[0], "bad")
        session = client.begin_update("bad", None)
        with pytest.raises(UpdateConflictError):
            client.begin_update("worse", None)
        client.abort_update(session)
        with pytest.raises(UpdateConflictError, match="not open on this router"):
            client.commit(session)
        client.update_weights_from_bucket(halves_of(folders[1])[0], "bad")
        client.abort_update()
    assert [(each.version, each.digest()) for each in engines] == before
    assert all(each["is_current"] for each in httpx.get(f"{url}/workers").json()["workers"])


def test_memory_that_a_trainer_shares_is_read_by_all_and_given_back(
    url: str, engines: list[Engine], folders: list[Path], digests: list[dict[str, str]]
) -> None:
    """It sends each file once."""
    before = set(SHARED.glob(f"torch_{os.getpid()}_*"))  # other tests of this process may have left some
    with httpx.Client(base_url=url, timeout=60) as http:
        for at in (1, 2):
            for body in bodies("slime", tensors_of(folders[at]), f"s{at}"):
                told = http.post("/update_weights_from_tensor", json=body).json()
                assert told["success"] is True and told["failed_replicas"] == [], told
            assert are_live(engines, digests[at], f"s{at}")
    assert set(SHARED.glob(f"torch_{os.getpid()}_*")) <= before
