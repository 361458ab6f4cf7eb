"""Servers on real sockets over real engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace import Engine, serve
from tests.server.builders import SETTINGS, save_random_model, save_scripted_model

START = Callable[..., "Served"]


class Served:
    """An engine, its server's address, and a client for it."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.engine = engine
        self.handle = serve(engine, **options)
        self.url = self.handle.url
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def generate(self, **body: Any) -> Any:
        """POST /generate; the reply's JSON."""
        reply = self.http.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def close(self) -> None:
        self.http.close()
        self.handle.stop()


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Processes that these tests start are warm."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint every test here serves, unless it says otherwise."""
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def served(model_folder: Path) -> Iterator[Served]:
    """A server shared by tests that leave it as it was."""
    with Engine(model_folder, inprocess=True, **SETTINGS) as engine:
        shared = Served(engine)
        yield shared
        shared.close()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose model calls a tool."""
    folder = save_scripted_model(tmp_path_factory.mktemp("scripted"))
    with Engine(folder, inprocess=True, **SETTINGS) as engine:
        shared = Served(engine)
        yield shared
        shared.close()


@pytest.fixture
def start(model_folder: Path) -> Iterator[START]:
    """Start servers that end with the test; keywords of the engine go under `settings`."""
    started: list[Served] = []

    def start_server(folder: Path | None = None, settings: dict[str, Any] | None = None, **options: Any) -> Served:
        engine = Engine(folder or model_folder, **{"inprocess": True, **SETTINGS, **(settings or {})})
        started.append(Served(engine, **options))
        return started[-1]

    yield start_server
    for each in started:
        each.close()
        each.engine.shutdown()
