"""What trainer ranks do in the tests of `Engine(rank_group=...)`. Each function runs on every rank, in a process of its
own."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from headrace import Engine
from headrace.engine import rank_group
from headrace.engine.core_host import resolve_settings
from headrace.ipc import rank_meeting
from headrace.rl import WeightPusher
from headrace.types.errors import HeadraceError
from tests.engine import test_closing
from tests.engine.builders import SETTINGS
from tests.engine.test_ranks import GREEDY, LONG, PROMPTS, outputs
from tests.engine.test_restart import wait_for

ENGINE: dict[str, Any] = {"device": "cpu", "start_timeout": 60, "skip_tokenizer_init": True, **SETTINGS}
GROUPS: dict[str, Any] = {
    "mesh": lambda mesh: mesh,
    "group": lambda mesh: mesh.get_group(),
    "world": lambda _: distributed.group.WORLD,
}
"""What a trainer may give for its ranks."""


def refuse_memory() -> None:
    """As if ranks were on different machines."""
    rank_meeting._can_read = lambda *_: False


def error_of(folder: str, **settings: Any) -> tuple[str, str, str]:
    try:
        with Engine(folder, **{**ENGINE, "rank_group": distributed.group.WORLD, **settings}):
            return "no error", "", ""
    except HeadraceError as error:
        return type(error).__name__, error.field, error.message


def used_group(is_over: threading.Event) -> threading.Thread:
    """The trainer goes on using its own group, in a thread, until all ranks say that it is over."""

    def use() -> None:
        for _ in range(100_000):
            found = torch.tensor([1.0, float(is_over.is_set())])
            distributed.all_reduce(found)
            assert found[0] == distributed.get_world_size()
            if found[1] == distributed.get_world_size():
                return
            time.sleep(0.01)  # it is there all the time, and leaves the engine the processor

    thread = threading.Thread(target=use)
    thread.start()
    return thread


def held() -> tuple[int, set[str]]:
    gc.collect()
    names = {each.name for each in threading.enumerate()}
    return len(os.listdir("/proc/self/fd")), {name for name in names if name.startswith("headrace")}


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    """Without transformers, which takes seconds to load."""
    return load_file(Path(folder) / "model.safetensors")


def whole_life(
    rank: int, folder: str, other: str, num_ranks: int, far: bool, groups: list[str], settings: dict[str, Any]
) -> Any:
    """Engines, one after the other, beside a trainer that goes on."""
    if far:
        refuse_memory()
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("tp",))
    found: list[Any] = []
    holds: list[Any] = []
    for name in groups:
        is_over = threading.Event()
        trainer = used_group(is_over)
        with Engine(folder, rank_group=GROUPS[name](mesh), **ENGINE, **settings) as engine:
            if rank == 0:
                found.append(life_of_leader(engine, folder, other))
            else:
                found.append(calls_of_follower(engine, folder))
        is_over.set()
        trainer.join(60.0)
        assert not trainer.is_alive()
        holds.append(held())
    assert holds[-1][0] <= holds[0][0] and not holds[-1][1], holds
    return found


def life_of_leader(engine: Engine, folder: str, other: str) -> Any:
    first, digest = outputs(engine, GREEDY), engine.digest()
    new = tensors_of(other)
    engine.update_weights_from_tensor(new.items(), "b")
    new_digest = engine.digest()
    name = "model.layers.1.mlp.down_proj.weight"
    same = bool((engine.get_weights_by_name(name) == new[name]).all())
    engine.update_weights_from_disk(Path(folder), "a")
    engine.release_memory_occupation()
    engine.resume_memory_occupation(restore="await")
    engine.update_weights_from_disk(Path(folder), "a")
    again = outputs(engine, GREEDY)
    is_back = [each.token_ids for each in again] == [each.token_ids for each in first]
    return [each.token_ids for each in first], digest, new_digest, same, is_back and engine.digest() == digest


def calls_of_follower(engine: Engine, folder: str) -> Any:
    errors = []
    for call in (
        lambda: engine.generate(input_ids=[1]),
        lambda: engine.digest(),
        lambda: list(engine.stream(input_ids=[1])),
        lambda: engine.update_weights_from_tensor([], "x"),
        lambda: engine.begin_update("x", []),
        lambda: engine.pause(),
        lambda: engine.is_alive,
    ):
        try:
            call()
        except HeadraceError as error:
            errors.append((type(error).__name__, error.field, "call it on rank 0" in error.message))
    return errors


def lost(rank: int, folder: str, how: int, which: int) -> Any:
    """One rank of four is lost while requests run; the others live on, and can meet again."""
    engine = Engine(folder, rank_group=distributed.group.WORLD, **{**ENGINE, "control_timeout": 60})
    if rank == which:
        distributed.barrier()
        time.sleep(0.5)
        os.kill(os.getpid(), how)
        time.sleep(600)
    if rank == 0:
        outcome: list[Any] = []

        def generate() -> None:
            try:
                engine.generate(input_ids=[PROMPTS[0]] * 4, sampling_params=LONG)
            except HeadraceError as error:
                outcome.extend((type(error).__name__, error.message))

        thread = threading.Thread(target=generate)
        thread.start()
        wait_for(lambda: engine.metrics()["num_running"] == 4)
        distributed.barrier()
        began = time.monotonic()
        thread.join(60.0)
        outcome.append(time.monotonic() - began)
    else:
        distributed.barrier()
        outcome = []
    engine.shutdown()
    wait_for(lambda: not {name for name in held()[1] if "rank" in name})
    return outcome


def leader_is_lost(rank: int, folder: str, how: int) -> Any:
    """Rank 0 is gone, or stands still: its process's end is the end of the engine, and of nothing else."""
    engine = Engine(folder, rank_group=distributed.group.WORLD, **{**ENGINE, "control_timeout": 2})
    if rank == 0:
        os.kill(os.getpid(), how)
        time.sleep(600)
    engine.shutdown()
    wait_for(lambda: not held()[1])
    return "lives"


def calls_in_vain(rank: int, folder: str) -> Any:
    """Rank 1 has called twice and rank 0 once, to which the other did not come, before both do: rank 1 once more, to
    hear what has become of rank 0's call."""
    found = []
    for caller in (1, 1, 0, 1):
        if rank == caller:
            found.append(error_of(folder, start_timeout=2))
        distributed.barrier()
    return [*found, error_of(folder)]


def settings_of_one(rank: int, folder: str, other: str) -> Any:
    """What one rank gives that is refused, or another thing than the others."""
    found = []
    for mine in (
        {0: {"no_such": 1}},
        {1: {"no_such": 1}},
        {0: {"tp_size": 1}, 1: {"tp_size": 1}},
        {1: {"dtype": "bfloat16"}},
        {0: {"nnodes": 2, "dist_init_addr": "127.0.0.1:1"}},
    ):
        found.append(error_of(folder, **mine.get(rank, {})))
    found.append(error_of(other if rank == 1 else folder))
    found.append(error_of(folder, rank_group="no group"))
    found.append(error_of(folder))
    return found


def fails_alone(rank: int, folder: str) -> Any:
    """What every rank is told where rank 1 fails before it has come, with an error that is none of ours."""

    fault = OSError("the disk is on fire") if rank == 1 else None
    with mock.patch.object(rank_group, "resolve_settings", side_effect=fault, wraps=resolve_settings):
        try:
            found = error_of(folder)
        except OSError as error:
            found = type(error).__name__, "", str(error)
    return found, error_of(folder)


def pushes_its_own(rank: int, folder: str, other: str) -> Any:
    """Every rank gives its engine to a pusher, which takes that of the first."""
    with Engine(folder, rank_group=distributed.group.WORLD, **ENGINE) as engine:
        pusher = WeightPusher(engine, distributed.group.WORLD)
        report = pusher.push(tensors_of(other), "pushed", verify=True)
        return engine.is_leading, report.update.version, report.is_verified


def starts_and_ends(rank: int, folder: str, num_cycles: int, settings: dict[str, Any]) -> Any:
    """What each rank holds after engines that were shut down, and after as many that did not start, as rank 1 refuses
    a setting: by then rank 0 has begun to listen. No collector of garbage comes meanwhile."""
    found: list[Any] = []
    for mine in ({}, {"dtype": "bfloat16"} if rank == 1 else {}):
        for number in range(num_cycles + 1):
            if number == 1:
                gc.collect()
                gc.disable()
            error_of(folder, **settings, **mine)
            found.append(test_closing.held(found[0][-1] if found else 0))
        gc.enable()
    return found


KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
