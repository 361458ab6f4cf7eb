"""Pushing over a process group to a server that is treated as one of another host: one transaction, as by all roads."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace import Client, Engine, WeightUpdateError, serve
from headrace.ipc.rank_meeting import splice
from headrace.rl import WeightPusher, group_road
from headrace.rl.group_road import GroupRoad
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
    for number in range(5):
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


@pytest.fixture(scope="module")
def elsewhere(engine: Engine) -> str:
    """The engine at another address than this process's."""
    return serve(engine, host="127.0.0.2").url


def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By which roads tensors go from now on."""
    roads: list[str] = []
    staged, sent = Client.stage, GroupRoad.send

    def stage(self: Client, *given: Any) -> Any:
        roads.append("client")
        return staged(self, *given)

    def send(self: GroupRoad, *given: Any) -> Any:
        roads.append("group")
        return sent(self, *given)

    monkeypatch.setattr(Client, "stage", stage)
    monkeypatch.setattr(GroupRoad, "send", send)
    return roads


@pytest.mark.parametrize("shares_memory", [False, True])
def test_a_pusher_finds_the_best_road_by_itself(
    elsewhere: str, engine: Engine, new: Tensors, monkeypatch: pytest.MonkeyPatch, shares_memory: bool
) -> None:
    """A group where the server does not read this process's memory."""
    roads = used(monkeypatch)
    with Client(elsewhere, shares_memory=shares_memory) as client:
        pusher = WeightPusher(client)
        for number in range(2):
            assert pusher.push({name: tensor + number for name, tensor in new.items()}, number, verify=True).is_verified
    assert roads == ["client" if shares_memory else "group"] * 2
    assert engine.version == "1"


def test_a_group_that_cannot_be_made_is_tried_once(
    elsewhere: str, new: Tensors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the server cannot connect to this host: it waits no longer than it has."""
    roads, init = used(monkeypatch), Client.init_weights_update_group
    monkeypatch.setattr(group_road, "JOIN_SECONDS", 0.5)
    monkeypatch.setattr(
        Client, "init_weights_update_group", lambda self, _, *rest, **more: init(self, "127.0.0.3", *rest, **more)
    )
    with Client(elsewhere, shares_memory=False) as client:
        pusher = WeightPusher(client)
        for number in range(3):
            assert pusher.push(new, number, verify=True).is_verified
    assert roads == ["client"] * 3
    (warning,) = [each.message for each in caplog.records if each.name == group_road.__name__]
    assert "no process group with http://127.0.0.2" in warning and "was not joined" in warning


def test_through_a_tunnel_nobody_is_waited_for(
    elsewhere: str, new: Tensors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server sees another end of the connection than this process: no address is known by which it gets here."""
    roads = used(monkeypatch)
    host, port = elsewhere.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_tunnel() -> None:
        with contextlib.suppress(OSError):
            while True:
                splice(listener.accept()[0], socket.create_connection((host, int(port))))

    thread = threading.Thread(target=serve_tunnel, daemon=True)
    thread.start()
    with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", shares_memory=False) as client:
        assert WeightPusher(client).push(new, "tunnelled", verify=True).is_verified
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30.0)
    assert roads == ["client"] and not caplog.records
