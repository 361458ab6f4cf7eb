"""Pushing over a process group to a server that is treated as one of another host: one transaction, as by all roads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace import Client, Engine, WeightUpdateError, serve
from headrace.rl import WeightPusher, group_road
from headrace.types.errors import HeadraceError
from tests.engine.test_ranks import rank_pids
from tests.engine.test_restart import pid_of
from tests.server.builders import SETTINGS, save_random_model

HERE = "127.0.0.1"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = save_random_model(tmp_path_factory.mktemp("model"), seed=0)
    settings = {**SETTINGS, "inprocess": False, "tp_size": request.param, "device": "cpu"}
    with Engine(folder, **settings) as started:
        yield started


@pytest.fixture
def client(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Whose tensors come by the group, or not at all."""

    def refuse(*_: Any) -> None:
        raise AssertionError("sent by another road")

    with Client(serve(engine).url, shares_memory=False) as connected:
        monkeypatch.setattr(connected, "stage", refuse)
        yield connected


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    loaded: Tensors = load_file(save_random_model(tmp_path_factory.mktemp("new"), seed=1) / "model.safetensors")
    return loaded


@pytest.fixture(autouse=True)
def buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, which some tensors exceed."""
    monkeypatch.setattr(group_road, "BUCKET_BYTES", 5000)


def test_pushes_over_a_group_are_live_and_verified(engine: Engine, client: Client, new: Tensors) -> None:
    pusher = WeightPusher(client, address=HERE)
    for number in range(3):
        changed = {name: tensor * (1 + number) for name, tensor in new.items()}
        assert pusher.push(changed, number, verify=True, in_flight="keep").update.version == str(number)
        assert torch.equal(engine.get_weights_by_name("model.norm.weight"), changed["model.norm.weight"])
    pairs = ((name, tensor.clone()) for name, tensor in new.items())
    assert pusher.push(pairs, "yielded", verify=True).is_verified
    narrow = WeightPusher(client, dtype="bfloat16", address=HERE)
    assert narrow.push(new, "narrow", verify=True).update.num_tensors == len(new)


def broken(new: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(new.items())[:5]
    raise ArithmeticError("the trainer has failed")


def test_a_push_that_fails_leaves_the_old_weights_and_the_next_one_succeeds(
    engine: Engine, client: Client, new: Tensors
) -> None:
    pusher = WeightPusher(client, address=HERE)
    pusher.push(new, "whole")
    before = engine.digest()
    last = list(new)[-1]
    bad = {**new, last: torch.full_like(new[last], torch.nan)}
    with pytest.raises(WeightUpdateError, match="NaN"):
        pusher.push(bad, "nan", mode="shadow")
    with pytest.raises(WeightUpdateError, match="not staged|misses|lacks"):
        pusher.push(iter(list(new.items())[:-1]), "short", mode="shadow")
    with pytest.raises(WeightUpdateError, match=r"model\.nobody"):
        pusher.push(iter([*new.items(), ("model.nobody", torch.ones(2))]), "unknown", mode="shadow")
    with pytest.raises(ArithmeticError):
        pusher.push(broken(new), "broken", mode="shadow")
    assert engine.digest() == before and engine.version == "whole"
    assert pusher.push({name: tensor + 1 for name, tensor in new.items()}, "next", verify=True).is_verified
    assert engine.digest() != before


@pytest.mark.parametrize("address", ["203.0.113.7", "no address", "\0"])
def test_an_address_of_another_host_is_named(client: Client, new: Tensors, address: str) -> None:
    with pytest.raises(HeadraceError) as caught:
        WeightPusher(client, address=address).push(new, "lost")
    assert caught.value.field == "address"


def test_an_engine_of_this_process_has_no_address(engine: Engine) -> None:
    with pytest.raises(WeightUpdateError) as caught:
        WeightPusher(engine, address=HERE)
    assert caught.value.field == "address"


def test_a_push_after_a_core_was_started_again_is_as_any_other(tmp_path: Path, new: Tensors) -> None:
    folder = save_random_model(tmp_path, seed=0)
    settings = {**SETTINGS, "inprocess": False, "max_core_restarts": 1}
    with Engine(folder, **settings) as engine, Client(serve(engine).url, shares_memory=False) as client:
        pusher = WeightPusher(client, address=HERE)
        pusher.push(new, "first")
        os.kill(pid_of(engine), signal.SIGKILL)
        while not _needs_weights(engine):
            time.sleep(0.05)
        assert pusher.push(new, "second", verify=True).is_verified and engine.version == "second"


def test_pushes_leave_nothing(engine: Engine, client: Client, new: Tensors) -> None:
    pusher = WeightPusher(client, address=HERE)
    pusher.push(new, "first")
    found = []
    for number in range(8):
        found.append(settled(engine))
        pusher.push(new, number)
    grown = [now > then for now, then in zip(sum(settled(engine), ()), sum(found[1], ()), strict=True)]
    assert not any(grown), found


def _needs_weights(engine: Engine) -> bool:
    try:
        return engine.status(timeout=1.0).state == "needs_weights"
    except HeadraceError:  # while there is none
        return False


def settled(engine: Engine) -> list[tuple[int, int]]:
    """Threads and descriptors of all processes, once they do not change: a group's thread ends when it comes to it."""
    before: list[tuple[int, int]] = []
    while (now := _held(engine)) != before:
        before = now
        time.sleep(0.2)
    return now


def _held(engine: Engine) -> list[tuple[int, int]]:
    folders = [Path(f"/proc/{pid}") for pid in (os.getpid(), pid_of(engine), *rank_pids(engine))]
    return [(len(os.listdir(folder / "task")), len(os.listdir(folder / "fd"))) for folder in folders]
