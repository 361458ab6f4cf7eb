"""Megatron-Core itself, over gloo: filled by our map it computes what transformers does, and its weights, pushed in a
turn of the sharding manager, are those of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.rl.rank_processes import run_ranks
from tests.rl.test_sharded_push import Folders, file_digests

CORE: dict[str, tuple[int, str, dict[str, int]]] = {
    "llama": (2, "llama", {"tensor": 1, "stages": 1, "chunks": 1, "experts": 1}),
    "qwen2, tensor parallel": (2, "qwen2", {"tensor": 2, "stages": 1, "chunks": 1, "experts": 1}),
    "qwen3-moe, expert parallel": (2, "qwen3_moe", {"tensor": 1, "stages": 1, "chunks": 1, "experts": 2}),
    "qwen3, two stages": (2, "qwen3", {"tensor": 1, "stages": 2, "chunks": 1, "experts": 1}),
    "qwen3-moe, two stages of experts": (4, "qwen3_moe", {"tensor": 1, "stages": 2, "chunks": 1, "experts": 2}),
    "qwen3, more ranks than groups": (4, "qwen3", {"tensor": 4, "stages": 1, "chunks": 1, "experts": 1}),
    "qwen3, virtual stages": (4, "qwen3", {"tensor": 2, "stages": 2, "chunks": 2, "experts": 1}),
}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


class Answers:
    """What ranks answer; all cases of as many ranks run one after the other in the same processes."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self.of = cache(self._run)

    def _run(self, num_ranks: int) -> dict[str, list[Any]]:
        scenarios: dict[str, tuple[str, dict[str, Any]]] = {}
        for case, (number, family, sizes) in CORE.items():
            if number == num_ranks:
                old, new = self._folders.of(family)
                scenarios[case] = "push_megatron_core", {"old": old, "new": new, "sizes": sizes}
        return run_ranks(num_ranks, scenarios)


@pytest.fixture(scope="module")
def answers(folders: Folders) -> Answers:
    return Answers(folders)


@pytest.mark.parametrize("case", CORE)
def test_megatron_core_computes_with_our_map_and_is_pushed(folders: Folders, answers: Answers, case: str) -> None:
    num_ranks, family, _ = CORE[case]
    found = answers.of(num_ranks)[case]
    errors = [each["error"] for each in found if each["error"] is not None]
    assert errors and max(errors) < 1e-4
    assert found[0]["digest"] == file_digests(folders.of(family)[1], None)[0]
