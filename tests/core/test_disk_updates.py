"""Updates that cannot be taken as they are: folders that change while they are read, tensors that hold no numbers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headrace.core.fake_executor import FreeExecutor
from headrace.types.messages import AbortUpdate, CommitUpdate, Digest, UpdateFromDisk
from headrace.types.weights import UpdateReport
from headrace.weights.checkpoint import Checkpoint
from tests.core.harness import VOCAB_SIZE, Core, new_tensors, request, tiny_store

MODES = ["shadow", "inplace"]
NEW = new_tensors(3.0)


class DiskExecutor(FreeExecutor):
    """The free executor with a checkpoint reader."""

    def checkpoint(self, folder: Path, root: Path | None) -> Any:
        checkpoint = Checkpoint(folder, root=root)
        return checkpoint.manifest(), checkpoint.tensors()


class ChangingExecutor(DiskExecutor):
    """The folder's file is cut short once `num_read` tensors of it have been asked for."""

    def __init__(self, num_read: int) -> None:
        super().__init__(VOCAB_SIZE, weights=tiny_store())
        self._num_read = num_read

    def checkpoint(self, folder: Path, root: Path | None) -> Any:
        manifest, tensors = super().checkpoint(folder, root)

        def changing() -> Iterator[tuple[str, Any]]:
            for number in range(len(manifest) + 1):
                if number == self._num_read:
                    os.truncate(folder / "model.safetensors", 400)
                yield from itertools.islice(tensors, 1)

        return manifest, changing()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_read", [0, 1, 3, 5])
def test_a_folder_that_changes_meanwhile_is_refused(tmp_path: Path, mode: str, num_read: int) -> None:
    """The old weights are whole, but where an update in place had begun to write."""
    save_file(NEW, tmp_path / "model.safetensors")
    core = Core(ChangingExecutor(num_read))
    before = core.call(Digest, kind=dict[str, str])
    core.submit(request(1, max_new_tokens=30))
    core.turn(2)
    error = core.refused(UpdateFromDisk, str(tmp_path), "disk", mode, "keep")
    assert (error.code, error.field) == ("CheckpointError", "model.safetensors")
    assert "changed while it was read" in error.message
    if mode == "inplace" and num_read > 0:
        assert core.status().state == "poisoned"
        session = core.begin(NEW)
        core.stage(session, NEW)
        core.call(CommitUpdate, session, kind=UpdateReport)
        assert core.status().state == "ready"
        return
    assert core.call(Digest, kind=dict[str, str]) == before
    core.settle()
    assert core.spans(1) == [("default", 30)]


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_tensor_without_plain_values_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    norm = NEW["norm.weight"].to_sparse() if kind == "sparse" else NEW["norm.weight"].to("meta")
    torch.save(NEW | {"norm.weight": norm}, tmp_path / "pytorch_model.bin")
    core = Core(DiskExecutor(VOCAB_SIZE, weights=tiny_store()))
    before = core.call(Digest, kind=dict[str, str])
    error = core.refused(UpdateFromDisk, str(tmp_path), "disk", "inplace")
    assert (error.code, error.field) == ("CheckpointError", "norm.weight")
    assert core.call(Digest, kind=dict[str, str]) == before
    assert core.status().state == "ready"


def test_an_update_that_is_not_finite_is_refused_by_name() -> None:
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    bad = NEW | {"k.weight": torch.full_like(NEW["k.weight"], torch.nan)}
    session = core.begin(bad)
    stage = core.start_stage(session, bad)
    core.until(lambda: stage in core.link.replies)
    error = core.error(stage)
    assert (error.code, error.field) == ("WeightUpdateError", "k.weight")
    core.call(AbortUpdate, session)
    assert core.call(Digest, kind=dict[str, str]) == before


def test_a_folder_below_the_root_that_leads_out_of_it_is_refused(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    for folder in (root, secret):
        folder.mkdir()
    save_file(NEW, secret / "model.safetensors")
    (root / "model.safetensors").symlink_to(secret / "model.safetensors")
    core = Core(DiskExecutor(VOCAB_SIZE, weights=tiny_store()))
    error = core.refused(UpdateFromDisk, str(root), "disk", "auto", "drain", str(root))
    assert error.code == "CheckpointError" and "leads out of" in error.message
    assert core.call(UpdateFromDisk, str(root), "disk", kind=UpdateReport).num_tensors == 5
