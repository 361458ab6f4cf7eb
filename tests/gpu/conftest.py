"""Everything below this folder needs a CUDA device; without one it is not collected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the test files out where there is no device."""
    is_test = collection_path.name.startswith("test_")
    return True if is_test and not torch.cuda.is_available() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is below this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
