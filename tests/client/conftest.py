"""Engines and servers that the clients' tests talk to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Client, Engine, serve
from tests.server.builders import SETTINGS, save_random_model

CONFIG: dict[str, Any] = {**SETTINGS, "numerics": "invariant"}
SHARED_MEMORY = Path("/dev/shm")
CONNECT = Callable[..., Client]


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Processes that these tests start are warm."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; `newer/` below it has other weights."""
    folder = save_random_model(tmp_path_factory.mktemp("model"), seed=0)
    save_random_model(folder / "newer", seed=1)
    return folder


@pytest.fixture
def engine(model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, inprocess=True, **CONFIG) as started:
        yield started


@pytest.fixture
def connect(engine: Engine) -> Iterator[CONNECT]:
    """Serve the engine with these options, and connect: keywords of the client go under `client`."""
    opened: list[Client] = []

    def connect_to(client: dict[str, Any] | None = None, **options: Any) -> Client:
        opened.append(Client(serve(engine, **options).url, **(client or {})))
        return opened[-1]

    yield connect_to
    for each in opened:
        each.close()


def left_in_shared_memory(*pids: int) -> list[str]:
    """Names there that are ours, or of one of these processes; other processes of this machine have theirs."""
    marks = ["headrace", *(f"_{pid}_" for pid in pids)]
    found = [name for name in os.listdir(SHARED_MEMORY) if any(mark in name for mark in marks)]
    return [name for name in found if not name.startswith("headrace-weights-")]  # a router's, of which there is none
