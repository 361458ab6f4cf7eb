"""Updates that cannot be taken as they are: folders that change while they are read, tensors that hold no numbers."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headrace.core.executor import LocalExecutor
from headrace.core.fake_executor import FreeExecutor
from headrace.core.update_phase import UpdatePhase
from headrace.types.messages import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    Digest,
    GiveUp,
    Shutdown,
    UpdateFromDisk,
    WeightsChecker,
)
from headrace.types.weights import TensorInfo, UpdateReport
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.files import OpenFile
from headrace.weights.position_sum import PositionSum
from headrace.weights.safetensors_file import ENTRIES_PER_SLICE
from headrace.weights.staging import BLOCK_BYTES
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, WeightMap, whole_rows
from tests.core.harness import VOCAB_SIZE, Core, manifest_of, new_tensors, request, tiny_store

MODES = ["shadow", "inplace"]
NEW = new_tensors(3.0)


class DiskExecutor(FreeExecutor):
    """The free executor with a checkpoint reader."""

    def checkpoint(self, folder: Path, root: Path | None) -> Any:
        return LocalExecutor.checkpoint(self, folder, root)  # type: ignore[arg-type]


class ChangingExecutor(DiskExecutor):
    """The folder's file is cut short once `num_read` tensors of it have been asked for."""

    def __init__(self, num_read: int) -> None:
        super().__init__(VOCAB_SIZE, weights=tiny_store())
        self._num_read = num_read

    def checkpoint(self, folder: Path, root: Path | None) -> Any:
        manifest, tensors = yield from super().checkpoint(folder, root)

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


def write_shards(folder: Path, num_shards: int) -> None:
    places: dict[str, str] = {}
    for number in range(num_shards):
        names = list(NEW)[number::num_shards]
        save_file({name: NEW[name] for name in names}, folder / f"model-{number}.safetensors")
        places |= dict.fromkeys(names, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def finished(core: Core, call_id: int) -> Any:
    core.until(lambda: call_id in core.link.replies)
    return core.answer(call_id, UpdateReport)


def looking_core(folder: Path) -> tuple[Core, int]:
    """A core that steps a request, a slice between two steps, and looks through a folder of five files."""
    write_shards(folder, 5)
    core = Core(DiskExecutor(VOCAB_SIZE, weights=tiny_store()))
    advance = core.loop.replica.update.advance
    core.loop.replica.update.advance = lambda budget_s, now: advance(0.0, now)  # type: ignore[method-assign]
    core.submit(request(1, max_new_tokens=200, deliver_every=1))
    core.turn(2)
    command = partial(UpdateFromDisk, path=str(folder), version="disk", mode="shadow", in_flight="keep")
    return core, core.start(partial(command, deadline=core.clock.now + 100.0))


def is_looking(core: Core) -> bool:
    return core.loop.replica.update.phase is UpdatePhase.LOOKING


def test_steps_go_on_while_a_folder_is_looked_through(tmp_path: Path) -> None:
    core, disk = looking_core(tmp_path)
    core.turn()
    assert is_looking(core) and core.status().updating
    num_turns, before = 0, len(core.tokens(1))
    while is_looking(core):
        core.turn()
        num_turns += 1
    assert num_turns >= 4, "a slice for each file, the first in the turn before"
    assert len(core.tokens(1)) - before >= num_turns - 1
    assert finished(core, disk).num_tensors == 5


def test_nobody_else_updates_while_a_folder_is_looked_through(tmp_path: Path) -> None:
    core, disk = looking_core(tmp_path)
    core.turn()
    calls: tuple[Any, ...] = (
        partial(BeginUpdate, version="other", manifest=manifest_of(NEW)),
        partial(UpdateFromDisk, path=str(tmp_path), version="other"),
        partial(WeightsChecker, action="reset_tensors"),
    )
    refused = [core.start(call) for call in calls]
    core.turn()
    assert [core.error(call).code for call in refused] == ["UpdateConflictError"] * 3
    assert is_looking(core)
    assert finished(core, disk).version == "disk"


@pytest.mark.parametrize("how", ["abort", "late", "given up", "shutdown"])
def test_a_folder_is_looked_through_no_more(tmp_path: Path, how: str) -> None:
    core, disk = looking_core(tmp_path)
    core.turn()
    codes = {"abort": "UpdateConflictError", "shutdown": "ShutdownError"}
    if how == "late":
        core.clock.now += 100.0
    elif how == "abort":
        core.start(AbortUpdate, None)
    elif how == "given up":
        core.start(GiveUp, disk)
    else:
        core.start(Shutdown)
    core.turn()
    assert core.error(disk).code == codes.get(how, "DeadlineError")
    assert core.loop.replica.update.phase is UpdatePhase.IDLE


def test_a_header_of_many_tensors_is_looked_through_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.zeros(1) for number in range(4 * ENTRIES_PER_SLICE)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.manifest()
    assert len(list(Checkpoint(tmp_path).manifest_in_slices())) >= 4
    monkeypatch.setattr(OpenFile, "read", None)  # a header is read once
    assert sum(1 for _ in checkpoint.tensors()) == len(tensors)


@pytest.mark.parametrize("mode", MODES)
def test_a_tied_head_alone_is_compared_in_slices(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 8 * BLOCK_BYTES // 4096
    weight_map = WeightMap(
        [ParamSpec("embed", (rows, 1024))],
        [whole_rows("embed.weight", "embed", 0, (rows, 1024))],
        {"lm_head.weight": "embed.weight"},
    )
    store = WeightStore(weight_map, torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)
    store.load([("embed.weight", torch.ones(rows, 1024))])
    sums: list[int] = []
    add = PositionSum.add

    def counted(total: PositionSum, block: torch.Tensor, start: int, times: int = 1) -> None:
        sums.append(start)
        add(total, block, start, times)

    monkeypatch.setattr(PositionSum, "add", counted)
    store.begin([TensorInfo("lm_head.weight", (rows, 1024), "float32")], mode, True)  # type: ignore[arg-type]
    work, per_slice, is_done = store.stage(0, torch.ones(rows, 1024)), list[int](), False
    while not is_done:
        sums.clear()
        is_done = work.advance(0.0)
        per_slice.append(len(sums))
    assert len(per_slice) >= 8 and max(per_slice) == 2
