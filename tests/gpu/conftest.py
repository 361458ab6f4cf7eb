"""Everything below this folder needs a CUDA device; without one it is not collected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import Engine
from tests.gpu.builders import Checkpoint, Checkpoints, Starter, start_engine


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the test files out where there is no device."""
    is_test = collection_path.name.startswith("test_")
    return True if is_test and not torch.cuda.is_available() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is below this folder; the soak begins first, since among workers the longest ends last."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: item.path.name != "test_soak.py")


@pytest.fixture(autouse=True)
def full_float32_products() -> Iterator[None]:
    """What is compared in float32 is computed in float32, before the test and after it: nobody turned TF32 on."""
    assert torch.get_float32_matmul_precision() == "highest"
    yield
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Random models, each made when it is first asked for."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start engines that end with the test."""
    started: list[Engine] = []

    def begin(checkpoint: Checkpoint, **settings: Any) -> Engine:
        started.append(start_engine(checkpoint.folder, **settings))
        return started[-1]

    yield begin
    for engine in started:
        engine.shutdown()
