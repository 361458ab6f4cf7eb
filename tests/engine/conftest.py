"""A tiny random model with a byte-level tokenizer on disk, and engines on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Engine
from tests.engine.builders import SETTINGS, save_model


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Processes that these tests start are warm; where the start itself is tested it is cold."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint every test here serves, unless it says otherwise."""
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def shared_engine(model_folder: Path) -> Iterator[tuple[Engine, dict[str, str]]]:
    """An in-process engine, and the digest of its weights."""
    with Engine(model_folder, inprocess=True, **SETTINGS) as shared:
        yield shared, shared.digest()


@pytest.fixture
def engine(shared_engine: tuple[Engine, dict[str, str]]) -> Iterator[Engine]:
    """One shared by tests that leave it as it was."""
    shared, digest = shared_engine
    yield shared
    assert shared.digest() == digest, "other weights are left in the engine that tests share"


@pytest.fixture
def start(model_folder: Path) -> Iterator[Callable[..., Engine]]:
    """Start engines that end with the test: in process unless told otherwise."""
    started: list[Engine] = []

    def start_engine(folder: Path | None = None, *, inprocess: bool = True, **settings: Any) -> Engine:
        started.append(Engine(folder or model_folder, inprocess=inprocess, **{**SETTINGS, **settings}))
        return started[-1]

    yield start_engine
    for each in started:
        each.shutdown()
