"""Weights over a group of NCCL, the trainer on another device in a process of its own, made as slime makes his."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from headrace import DeadlineError, Engine, UpdateConflictError, WeightUpdateError
from tests.engine.group_trainer import TrainerProcess
from tests.free_ports import free_port
from tests.gpu.builders import Checkpoint, Checkpoints, Starter
from tests.gpu.test_engine_features import outputs

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")


@pytest.fixture
def trainer() -> Iterator[TrainerProcess]:
    started = TrainerProcess()
    yield started
    started.close()


def join(engine: Engine, trainer: TrainerProcess, num_ranks: int = 1) -> None:
    port = free_port()
    trainer.tell(do="init", port=port, name="g", world_size=1 + num_ranks, backend="nccl")
    engine.init_weights_update_group("127.0.0.1", port, 1, 1 + num_ranks, "g", "nccl", timeout=60)
    trainer.hear()


def push(engine: Engine, trainer: TrainerProcess, target: Checkpoint, version: str, **order: Any) -> None:
    tensors = target.named_tensors()
    names = [name for name, _ in tensors]
    manifest = [(name, tuple(tensor.shape), "float32") for name, tensor in tensors]
    session = engine.begin_update(version, manifest, in_flight="keep")
    trainer.tell(do="send", name="g", folder=str(target.folder), names=names, **order)
    engine.stage_from_group(session, names, "g", "flattened_bucket" if order.get("bucket") else None)
    trainer.hear()
    engine.commit(session)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_whole_updates_and_a_group_made_again(
    checkpoints: Checkpoints, start: Starter, trainer: TrainerProcess, tp_size: int
) -> None:
    """The trainer shares his device with the second of two ranks, which NCCL refuses: then there is one rank."""
    if tp_size == 2 and torch.cuda.device_count() < 3:
        pytest.skip("two devices for the engine and one for the trainer")
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", inprocess=False, tp_size=tp_size)
    digests = [engine.digest()]
    join(engine, trainer, tp_size)
    for version, target, bucket in (("new", new, False), ("old", old, True), ("again", new, True)):
        push(engine, trainer, target, version, bucket=bucket)
        digests.append(engine.digest())
    assert digests[0] == digests[2] != digests[1] == digests[3]
    outputs(engine, new)
    engine.destroy_weights_update_group("g")
    trainer.ask(do="destroy", name="g")
    join(engine, trainer, tp_size)
    push(engine, trainer, old, "old again")
    assert engine.digest() == digests[0]


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("num_sent", [0, 5])
def test_a_trainer_that_is_lost_is_named(
    checkpoints: Checkpoints, start: Starter, trainer: TrainerProcess, how: str, num_sent: int
) -> None:
    """One that has ended at once, one that stands still by the deadline; before and after the ranks have met."""
    old = checkpoints.get()
    engine = start(old, dtype="float32", inprocess=False)
    join(engine, trainer)
    tensors = old.named_tensors()
    names = [name for name, _ in tensors]
    manifest = [(name, tuple(tensor.shape), "float32") for name, tensor in tensors]
    session = engine.begin_update("lost", manifest, timeout=60.0 if how == "killed" else 8.0)
    with ThreadPoolExecutor(1) as thread:
        staged = thread.submit(engine.stage_from_group, session, names, "g")
        trainer.ask(do="send", name="g", folder=str(old.folder), names=names[:num_sent])
        trainer.kill() if how == "killed" else trainer.stop()
        error = staged.exception(timeout=20.0)
    assert isinstance(error, WeightUpdateError if how == "killed" else DeadlineError), error
    assert how != "killed" or "'g'" in error.message and error.field == "group_name", error
    engine.abort_update()
    session = engine.begin_update("next", manifest)
    with pytest.raises(UpdateConflictError, match="'g'"):
        engine.stage_from_group(session, names, "g")
    engine.abort_update(session)
    engine.update_weights_from_tensor(tensors, "old")
    outputs(engine, old)
    successor = TrainerProcess()
    try:
        join(engine, successor)
        push(engine, successor, checkpoints.get(seed=1), "new")
    finally:
        successor.close()
    outputs(engine, checkpoints.get(seed=1))
