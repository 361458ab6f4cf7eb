"""A trainer's process group, joined and received from by calls of a client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headrace import Client, Engine, TensorInfo, UpdateConflictError, WeightUpdateError
from tests.client.conftest import CONNECT
from tests.engine.group_trainer import TrainerProcess
from tests.free_ports import free_port

GROUP = "trainer"


@contextlib.contextmanager
def joined(client: Client) -> Iterator[tuple[TrainerProcess, ThreadPoolExecutor]]:
    """A trainer whose group the client's engine is in, and a thread for calls beside what the trainer does."""
    with contextlib.closing(TrainerProcess()) as trainer, ThreadPoolExecutor(1) as pool:
        port = free_port()
        joining = pool.submit(client.init_weights_update_group, "127.0.0.1", port, 1, 2, GROUP, "gloo", timeout=60)
        trainer.ask(do="init", port=port, name=GROUP)
        joining.result(60)
        yield trainer, pool


def test_weights_come_from_a_group(connect: CONNECT, engine: Engine, model_folder: Path) -> None:
    client, newer = connect(), model_folder / "newer"
    expected = {name: each.to(torch.bfloat16) for name, each in load_file(newer / "model.safetensors").items()}
    names = list(expected)
    with joined(client) as (trainer, pool):
        reports = []
        for part in (names[:5], names[5:]):
            shapes = [list(expected[name].shape) for name in part]
            update = pool.submit(
                client.update_weights_from_distributed,
                part,
                ["bfloat16"] * len(part),
                shapes,
                GROUP,
                version="grouped",
                timeout=60,
            )
            trainer.ask(do="send", name=GROUP, folder=str(newer), names=part, dtype="bfloat16", bucket=False)
            reports.append(update.result(60))
        assert reports[0] is None and reports[1] is not None and reports[1].version == "grouped"
        assert all(torch.equal(client.get_weights_by_name(name), expected[name].float()) for name in names)
        client.destroy_weights_update_group(GROUP)
        with pytest.raises(WeightUpdateError):
            client.destroy_weights_update_group(GROUP)
    assert engine.status().version == "grouped" and isinstance(client, Client)


def test_a_session_takes_what_a_group_brings_and_another_gives_the_group_up(
    connect: CONNECT, engine: Engine, model_folder: Path
) -> None:
    client, newer = connect(), model_folder / "newer"
    expected = load_file(newer / "model.safetensors")
    names = list(expected)
    manifest = [TensorInfo(name, tuple(expected[name].shape), "float32") for name in names]
    with joined(client) as (trainer, pool):
        session = client.begin_update("staged", manifest, timeout=60)
        for part, load_format in ((names[:5], None), (names[5:], "flattened_bucket")):
            staging = pool.submit(client.stage_from_group, session, part, GROUP, load_format)
            trainer.ask(do="send", name=GROUP, folder=str(newer), names=part, bucket=load_format is not None)
            staging.result(60)
        assert client.commit(session).num_tensors == len(names) and engine.version == "staged"
        assert all(torch.equal(client.get_weights_by_name(name), expected[name]) for name in names)
        with pytest.raises(UpdateConflictError):
            client.stage_from_group(session, names[:2], GROUP)
        session = client.begin_update("next", manifest, timeout=60)
        with pytest.raises(WeightUpdateError, match="cannot be used any more"):
            client.stage_from_group(session, names[:2], GROUP)
        client.abort_update(session)
