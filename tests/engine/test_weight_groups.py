"""Weights over a trainer's group, end to end: real processes, real sockets, the trainer made as slime's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import (
    AsyncEngine,
    DeadlineError,
    Engine,
    HeadraceError,
    RequestError,
    UpdateConflictError,
    WeightUpdateError,
)
from headrace.engine.update_session import UpdateSession
from tests.arch.source import ROOT
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model, shared_memory
from tests.engine.group_trainer import TrainerProcess
from tests.engine.test_updates import GREEDY, Load
from tests.free_ports import free_port

BUCKET = "flattened_bucket"
Starter = Callable[..., Engine]
Manifest = list[tuple[str, tuple[int, ...], str]]


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def shared(model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, **SETTINGS) as engine:
        yield engine


@pytest.fixture
def spawned(shared: Engine) -> Iterator[Engine]:
    """An engine with a core process, in no group and no update."""
    yield shared
    shared.abort_update()
    with contextlib.suppress(WeightUpdateError):
        shared.destroy_weights_update_group("g")


@pytest.fixture(scope="module")
def trainers() -> Iterator[list[TrainerProcess]]:
    started: list[TrainerProcess] = []
    yield started
    for each in started:
        each.close()


@pytest.fixture
def trainer(trainers: list[TrainerProcess]) -> TrainerProcess:
    """One that waits for orders."""
    if not trainers or trainers[-1].is_spent:
        trainers.append(TrainerProcess())
    return trainers[-1]


def join(engine: Engine, trainer: TrainerProcess, name: str = "g", port: int | None = None) -> int:
    """Have both sides make a group, as frameworks do: at the same time."""
    port = port or free_port()
    trainer.tell(do="init", port=port, name=name)
    engine.init_weights_update_group("127.0.0.1", port, 1, 2, name, "gloo", timeout=30)
    trainer.hear()
    return port


def manifest_of(dtype: str = "float32") -> Manifest:
    return [(name, tuple(tensor.shape), dtype) for name, tensor in named_tensors(model_of(1))]


NAMES = [name for name, _, _ in manifest_of()]


def push(engine: Engine, trainer: TrainerProcess, folder: Path, version: str = "v", **order: Any) -> None:
    """A whole update over group "g"."""
    session = engine.begin_update(version, manifest_of(order.get("dtype", "float32")), in_flight="keep")
    trainer.tell(do="send", name="g", folder=str(folder), names=NAMES, **order)
    engine.stage_from_group(session, NAMES, "g", BUCKET if order.get("bucket") else None)
    trainer.hear()
    engine.commit(session)


def refused(call: Callable[..., Any], *args: Any, **kwargs: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        call(*args, **kwargs)
    return caught.value


def check_unusable(engine: Engine, session: UpdateSession) -> None:
    """The group says that it is, and the engine lives with its old weights."""
    error = refused(engine.stage_from_group, session, NAMES, "g")
    assert isinstance(error, UpdateConflictError) and "'g'" in error.message and "init it again" in error.message
    engine.abort_update(session)
    assert engine.is_alive and engine.generate(input_ids=[1], sampling_params=GREEDY)


@pytest.mark.parametrize(
    ("inprocess", "dtype", "is_bucket"),
    [(False, "float32", False), (False, "bfloat16", True), (True, "float32", True), (True, "bfloat16", False)],
)
def test_an_update_equals_one_from_tensors(
    spawned: Engine,
    start: Starter,
    trainer: TrainerProcess,
    new_folder: Path,
    dtype: str,
    is_bucket: bool,
    inprocess: bool,
) -> None:
    engine = start() if inprocess else spawned
    sent = [(name, tensor.to(getattr(torch, dtype))) for name, tensor in named_tensors(model_of(1))]
    engine.update_weights_from_tensor(sent, "expected")
    expected = engine.digest()
    engine.update_weights_from_tensor(named_tensors(model_of(2)), "another")
    join(engine, trainer)
    push(engine, trainer, new_folder, "v", dtype=dtype, bucket=is_bucket)
    assert engine.digest() == expected and engine.version == "v"
    engine.destroy_weights_update_group("g")


def usage_of(engine: Engine) -> tuple[int, int, int]:
    pid = engine.asynchronous.runtime.host.pid
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), len(shared_memory())


def test_thirty_updates_hold_nothing(spawned: Engine, trainer: TrainerProcess, new_folder: Path) -> None:
    before = usage_of(spawned)
    join(spawned, trainer)
    push(spawned, trainer, new_folder)
    joined = usage_of(spawned)
    for number in range(30):
        push(spawned, trainer, new_folder, f"v{number}", bucket=number % 2 == 1)
    assert usage_of(spawned) == joined
    spawned.destroy_weights_update_group("g")
    deadline = time.monotonic() + 10
    while usage_of(spawned)[:2] != before[:2]:
        assert time.monotonic() < deadline, (usage_of(spawned), before)
        time.sleep(0.05)


def test_requests_go_on_while_tensors_arrive(
    spawned: Engine, trainer: TrainerProcess, model_folder: Path, new_folder: Path
) -> None:
    spawned.update_weights_from_disk(model_folder, "old")
    join(spawned, trainer)
    with Load(spawned) as load:
        session = spawned.begin_update("new", manifest_of(), mode="shadow", in_flight="keep")
        staging = threading.Thread(target=spawned.stage_from_group, args=(session, NAMES, "g"))
        staging.start()
        steps = spawned.metrics()["num_steps"]
        while spawned.metrics()["num_steps"] < steps + 5:  # nothing has been sent: no step waits for it
            time.sleep(0.002)
        trainer.ask(do="send", name="g", folder=str(new_folder), names=NAMES)
        staging.join(30)
        spawned.commit(session)
    for each in load.found:
        assert [version for version, _ in each.version_spans] == ["old", "new"]


@pytest.mark.parametrize("inprocess", [False, True])
def test_a_trainer_that_never_comes_is_named_in_time(
    spawned: Engine, start: Starter, trainer: TrainerProcess, new_folder: Path, inprocess: bool
) -> None:
    engine, port, began = start() if inprocess else spawned, free_port(), time.monotonic()
    error = refused(engine.init_weights_update_group, "127.0.0.1", port, 1, 2, "g", "gloo", timeout=1)
    assert isinstance(error, DeadlineError) and "'g'" in error.message and error.field == "group_name"
    assert time.monotonic() - began < 6
    join(engine, trainer, port=port)
    push(engine, trainer, new_folder)


def test_a_trainer_that_counts_otherwise_is_named_in_time(spawned: Engine, trainer: TrainerProcess) -> None:
    port = free_port()
    trainer.tell(do="init", port=port, name="g", world_size=3, seconds=3)
    error = refused(spawned.init_weights_update_group, "127.0.0.1", port, 1, 2, "g", "gloo", timeout=2)
    assert "'g'" in error.message and error.field == "group_name"
    trainer.kill()


def test_a_trainer_that_dies_while_ranks_meet(spawned: Engine, trainer: TrainerProcess, new_folder: Path) -> None:
    port = free_port()
    trainer.tell(do="init", port=port, name="g", world_size=3)
    failed: list[HeadraceError] = []
    arguments = ("127.0.0.1", port, 1, 3, "g", "gloo", 3)
    joining = threading.Thread(target=lambda: failed.append(refused(spawned.init_weights_update_group, *arguments)))
    joining.start()
    time.sleep(1.0)
    assert "being joined" in refused(spawned.init_weights_update_group, *arguments).message
    assert spawned.generate(input_ids=[1], sampling_params=GREEDY)  # other calls go on
    trainer.kill()
    joining.join(25)
    assert "'g'" in failed[0].message and failed[0].field == "group_name"
    successor = TrainerProcess()
    join(spawned, successor, port=port)
    push(spawned, successor, new_folder)
    successor.close()


@pytest.mark.parametrize("num_sent", [0, 5])
def test_a_trainer_that_dies_while_it_sends(
    spawned: Engine, trainer: TrainerProcess, new_folder: Path, num_sent: int
) -> None:
    port = join(spawned, trainer)
    session = spawned.begin_update("half", manifest_of(), timeout=60)
    failed: list[HeadraceError] = []
    staging = threading.Thread(target=lambda: failed.append(refused(spawned.stage_from_group, session, NAMES, "g")))
    staging.start()
    trainer.ask(do="send", name="g", folder=str(new_folder), names=NAMES[:num_sent])
    trainer.kill()
    staging.join(10)
    assert "'g'" in failed[0].message and failed[0].field == "group_name"
    check_unusable(spawned, session)
    successor = TrainerProcess()
    if num_sent:
        spawned.destroy_weights_update_group("g")
    join(spawned, successor, port=port)
    push(spawned, successor, new_folder)
    successor.close()


def test_a_trainer_that_stands_still(spawned: Engine, trainer: TrainerProcess, new_folder: Path) -> None:
    join(spawned, trainer)
    session, began = spawned.begin_update("still", manifest_of(), timeout=1.5), time.monotonic()
    trainer.stop()
    error = refused(spawned.stage_from_group, session, NAMES, "g")
    assert isinstance(error, DeadlineError) and time.monotonic() - began < 6.5
    assert "joined as rank 1 of 2: the trainer" in error.message
    spawned.abort_update()
    session = spawned.begin_update("next", manifest_of())
    check_unusable(spawned, session)
    successor = TrainerProcess()
    join(spawned, successor)
    push(spawned, successor, new_folder)
    successor.close()


@pytest.mark.parametrize("sizes", [[10], [100_000]], ids=["fewer", "more"])
def test_bytes_that_were_not_announced_are_found(spawned: Engine, trainer: TrainerProcess, sizes: list[int]) -> None:
    """gloo takes fewer without a word, and ends the process at more."""
    join(spawned, trainer)
    session = spawned.begin_update("wrong", manifest_of())
    trainer.tell(do="send_sizes", name="g", sizes=sizes)
    error = refused(spawned.stage_from_group, session, NAMES, "g")
    assert isinstance(error, WeightUpdateError) and NAMES[0] in error.message and "'g'" in error.message
    check_unusable(spawned, session)


def test_a_tensor_that_is_refused_lets_the_rest_pass(
    spawned: Engine, trainer: TrainerProcess, new_folder: Path
) -> None:
    """Else the next update's tensors would be taken for this one's."""
    join(spawned, trainer)
    session = spawned.begin_update("nan", manifest_of())
    trainer.tell(do="send", name="g", folder=str(new_folder), names=NAMES, add=float("inf"))
    error = refused(spawned.stage_from_group, session, NAMES, "g")
    assert "NaN or infinity" in error.message
    trainer.hear()
    trainer.tell(do="send", name="g", folder=str(new_folder), names=NAMES)
    spawned.stage_from_group(session, NAMES, "g")  # it may be sent again
    trainer.hear()
    spawned.commit(session)
    digest = spawned.digest()
    push(spawned, trainer, new_folder)
    assert spawned.digest() == digest


def test_a_call_that_is_given_up_at_once_lets_what_it_announced_pass(
    spawned: Engine, trainer: TrainerProcess, new_folder: Path
) -> None:
    """Its sender knows nothing of that."""
    join(spawned, trainer)
    session = spawned.begin_update("given up", manifest_of())

    async def give_up() -> None:
        staging = asyncio.create_task(spawned.asynchronous.stage_from_group(session, NAMES, "g"))
        await asyncio.sleep(0)
        staging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await staging

    asyncio.run(give_up())
    trainer.ask(do="send", name="g", folder=str(new_folder), names=NAMES)
    spawned.abort_update(session)
    push(spawned, trainer, new_folder)


def bucket_call(names: list[str]) -> tuple[list[str], list[str], list[list[int]]]:
    """What slime's call says of these tensors."""
    shapes = {name: list(shape) for name, shape, _ in manifest_of()}
    return names, ["torch.float32"] * len(names), [shapes[name] for name in names]


@pytest.mark.parametrize("is_bucket", [False, True])
def test_buckets_join_one_update(
    spawned: Engine, trainer: TrainerProcess, model_folder: Path, new_folder: Path, is_bucket: bool
) -> None:
    with Engine(new_folder, inprocess=True, **SETTINGS) as cold:
        expected = cold.digest()
    spawned.update_weights_from_disk(model_folder, "old")
    join(spawned, trainer)
    reports = []
    for part in (NAMES[:10], NAMES[10:11], NAMES[11:]):
        trainer.tell(do="send", name="g", folder=str(new_folder), names=part, bucket=is_bucket)
        load_format = BUCKET if is_bucket else None
        reports.append(spawned.update_weights_from_distributed(*bucket_call(part), "g", load_format, 7))
        trainer.hear()
    assert reports[:2] == [None, None] and reports[2] is not None and reports[2].version == "7"
    assert spawned.digest() == expected


@pytest.mark.parametrize(
    ("how", "mode"),
    [("destroyed", "shadow"), ("destroyed", "inplace"), ("killed", "inplace"), ("another name", "shadow")],
)
def test_half_an_update_of_a_trainer_that_died_is_not_completed_by_the_next(
    spawned: Engine, trainers: list[TrainerProcess], trainer: TrainerProcess, how: str, mode: Any, new_folder: Path
) -> None:
    """The next one sends what the first has not sent first, with the same label."""
    spawned.abort_update()
    other = save_model(new_folder / "other", seed=2)
    join(spawned, trainer)
    assert distribute(spawned, trainer, new_folder, NAMES[:9], mode=mode) is None
    if how == "destroyed":
        spawned.destroy_weights_update_group("g")
        assert not spawned.status().updating
        trainer.ask(do="destroy", name="g")
    else:
        trainer.kill()
        trainers.append(TrainerProcess())
    name = "h" if how == "another name" else "g"
    join(spawned, trainers[-1], name)
    assert not spawned.status().updating
    assert distribute(spawned, trainers[-1], other, NAMES[9:], name, mode=mode) is None
    assert distribute(spawned, trainers[-1], other, NAMES[:9], name, mode=mode) is not None
    with Engine(other, inprocess=True, **SETTINGS) as cold:
        assert spawned.digest() == cold.digest()
    spawned.destroy_weights_update_group(name)
    trainers[-1].ask(do="destroy", name=name)


def distribute(
    engine: Engine, trainer: TrainerProcess, folder: Path, names: list[str], name: str = "g", **terms: Any
) -> Any:
    """A bucket, under one label whoever sends it."""
    trainer.tell(do="send", name=name, folder=str(folder), names=names)
    report = engine.update_weights_from_distributed(*bucket_call(names), name, None, 7, **terms)
    trainer.hear()
    return report


def test_a_head_that_comes_with_its_tied_embedding(spawned: Engine, trainer: TrainerProcess, new_folder: Path) -> None:
    join(spawned, trainer)
    (embedding,) = [name for name in NAMES if "embed_tokens" in name]
    names, dtypes, shapes = bucket_call(NAMES)
    tied = ["lm_head.weight", *names], ["float32", *dtypes], [shapes[names.index(embedding)], *shapes]
    trainer.tell(do="send", name="g", folder=str(new_folder), names=[embedding, *NAMES])
    report = spawned.update_weights_from_distributed(*tied, "g", None, "tied")
    trainer.hear()
    assert report is not None and spawned.version == "tied"
    trainer.tell(do="send", name="g", folder=str(new_folder), names=[NAMES[1] if embedding == NAMES[0] else NAMES[0]])
    trainer.kill()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model.norm.weight", {"names": lambda names: ["model.norm.weight", *names[1:]]}),  # of another shape
        ("no.such.tensor", {"names": lambda names: ["no.such.tensor", *names[1:]]}),
        ("mode", {"mode": "sideways"}),
        ("in_flight", {"in_flight": "wait"}),
        ("version", {"version": ""}),
        ("timeout", {"timeout": -1}),
    ],
)
def test_a_refused_bucket_leaves_the_group_as_good_as_before(
    spawned: Engine, trainer: TrainerProcess, new_folder: Path, field: str, change: dict[str, Any]
) -> None:
    join(spawned, trainer)
    names, dtypes, shapes = bucket_call([name for name in NAMES if name != "model.norm.weight"])
    options = {"names": names, **change}
    options["names"] = change["names"](names) if "names" in change else names
    trainer.tell(do="send", name="g", folder=str(new_folder), names=names)
    error = refused(spawned.update_weights_from_distributed, dtypes=dtypes, shapes=shapes, group_name="g", **options)
    assert error.field == field and error.status == 400
    trainer.hear()  # what it sends is taken
    trainer.tell(do="send", name="g", folder=str(new_folder), names=NAMES)
    assert spawned.update_weights_from_distributed(*bucket_call(NAMES), "g", None, "after") is not None
    trainer.hear()
    with Engine(new_folder, inprocess=True, **SETTINGS) as cold:
        assert spawned.digest() == cold.digest()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dtypes", {"dtypes": ["float31"]}),
        ("dtypes", {"dtypes": ["float32"] * 2}),
        ("dtypes", {"dtypes": None}),
        ("shapes", {"shapes": [[-1]]}),
        ("shapes", {"shapes": [["1"]]}),
        ("shapes", {"shapes": [[1] * 9]}),
        ("names", {"names": [7]}),
        ("names", {"names": "model.norm.weight"}),
        ("load_format", {"load_format": "direct"}),
    ],
)
def test_a_bucket_that_nobody_can_count_is_named(engine: Engine, field: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[32]]}
    error = refused(engine.update_weights_from_distributed, **{**arguments, **change})
    assert error.field == field and error.status == 400


def test_a_bucket_that_nobody_can_count_ends_the_group(spawned: Engine, trainer: TrainerProcess) -> None:
    join(spawned, trainer)
    refused(spawned.update_weights_from_distributed, ["a"], ["float31"], [[1]], "g")
    check_unusable(spawned, spawned.begin_update("next", manifest_of()))


def test_a_call_that_does_not_say_how_much_comes_ends_the_group(spawned: Engine, trainer: TrainerProcess) -> None:
    join(spawned, trainer)
    session = spawned.begin_update("unknown", manifest_of())
    error = refused(spawned.stage_from_group, session, ["no.such.tensor"], "g")
    assert "no.such.tensor" in error.message
    check_unusable(spawned, session)


def test_two_groups_at_once(model_folder: Path, new_folder: Path, trainer: TrainerProcess) -> None:
    asyncio.run(_update_by_two_groups(model_folder, new_folder, trainer))


async def _update_by_two_groups(model_folder: Path, new_folder: Path, trainer: TrainerProcess) -> None:
    other, halves = TrainerProcess(), (NAMES[::2], NAMES[1::2])
    async with AsyncEngine(model_folder, inprocess=True, **SETTINGS) as engine:
        for each, name in ((trainer, "one"), (other, "two")):
            port = free_port()
            each.tell(do="init", port=port, name=name)
            await engine.init_weights_update_group("127.0.0.1", port, 1, 2, name, "gloo")
            each.hear()
        session = await engine.begin_update("both", manifest_of())
        staging = [
            asyncio.create_task(engine.stage_from_group(session, half, name))
            for half, name in zip(halves, ("one", "two"), strict=True)
        ]
        await asyncio.sleep(0.1)
        for each, half, name in ((other, halves[1], "two"), (trainer, halves[0], "one")):  # not in the order asked
            await asyncio.to_thread(each.ask, do="send", name=name, folder=str(new_folder), names=half)
        await asyncio.gather(*staging)
        await engine.commit(session)
        found = await engine.digest()
    with Engine(new_folder, inprocess=True, **SETTINGS) as cold:
        assert found == cold.digest()
    other.close()


@pytest.mark.parametrize("how", ["killed", "destroyed"])
def test_a_group_whose_trainer_has_ended_gives_its_name_to_the_next(
    spawned: Engine, trainers: list[TrainerProcess], trainer: TrainerProcess, new_folder: Path, how: str
) -> None:
    """Also where nobody has sent anything meanwhile, by which the engine would have found out."""
    join(spawned, trainer)
    push(spawned, trainer, new_folder)
    after = trainer
    if how == "killed":
        trainer.kill()
        after = TrainerProcess()
        trainers.append(after)
    else:
        trainer.ask(do="destroy", name="g")
    session = spawned.begin_update("v", manifest_of())
    check_unusable(spawned, session)
    join(spawned, after)
    push(spawned, after, new_folder, "again")
    assert spawned.version == "again"


def test_names_of_groups(spawned: Engine, trainer: TrainerProcess) -> None:
    error = refused(spawned.destroy_weights_update_group, "nobody's")
    assert isinstance(error, WeightUpdateError) and error.status == 400 and error.field == "group_name"
    session = spawned.begin_update("v", manifest_of())
    assert refused(spawned.stage_from_group, session, NAMES, "nobody's").field == "group_name"
    spawned.abort_update(session)
    join(spawned, trainer)
    error = refused(spawned.init_weights_update_group, "127.0.0.1", 1, 1, 2, "g", "gloo")
    assert isinstance(error, UpdateConflictError) and error.field == "group_name"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("master_address", ""),
        ("master_address", 7),
        ("master_port", 0),
        ("master_port", "65536"),
        ("master_port", "x"),
        ("master_port", True),
        ("rank_offset", 0),
        ("rank_offset", 2),
        ("world_size", 1),
        ("group_name", ""),
        ("group_name", "\ud800"),
        ("backend", "mpi"),
        ("backend", "nccl"),
        ("timeout", 0),
    ],
)
def test_wrong_arguments_are_named_at_once(engine: Engine, field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    error = refused(engine.init_weights_update_group, **{**arguments, "backend": "gloo", field: value})
    assert error.field == field and error.status == 400


def test_wrong_load_format_is_named(engine: Engine) -> None:
    session = engine.begin_update("v", manifest_of())
    error = refused(engine.stage_from_group, session, NAMES, "g", "direct")
    assert isinstance(error, RequestError) and error.field == "load_format"
    engine.abort_update(session)


def test_leaving_ends_what_is_being_received(spawned: Engine, trainer: TrainerProcess) -> None:
    join(spawned, trainer)
    session = spawned.begin_update("v", manifest_of(), timeout=20)
    failed: list[HeadraceError] = []
    staging = threading.Thread(target=lambda: failed.append(refused(spawned.stage_from_group, session, NAMES, "g")))
    staging.start()
    time.sleep(0.3)
    spawned.destroy_weights_update_group("g")
    staging.join(5)
    assert "destroyed" in failed[0].message
    spawned.abort_update(session)
    trainer.kill()


_HANGING = """
import json, sys, threading, time
from tests.engine.builders import SETTINGS
from headrace import Engine, HeadraceError
engine = Engine(sys.argv[1], inprocess=sys.argv[2] == "True", skip_tokenizer_init=True, **SETTINGS)
port, manifest = int(sys.argv[3]), [(name, tuple(shape), dtype) for name, shape, dtype in json.loads(sys.argv[4])]
engine.init_weights_update_group("127.0.0.1", port, 1, 2, "g", "gloo", timeout=30)
session = engine.begin_update("v", manifest, timeout=300)
def say(*words):  # in one write: two threads do
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
def stage():
    try:
        engine.stage_from_group(session, [name for name, _, _ in manifest], "g")
    except HeadraceError as error:
        say("told")
threading.Thread(target=stage).start()
time.sleep(0.5)
say("receives")
sys.stdin.readline()
began = time.monotonic()
engine.shutdown()
say("seconds", time.monotonic() - began)
import atexit
atexit.register(lambda: say("ended"))
"""


@pytest.mark.parametrize("inprocess", [False, True])
def test_an_end_does_not_wait_for_a_broadcast(model_folder: Path, trainer: TrainerProcess, inprocess: bool) -> None:
    """The trainer stands still in the middle of one, and goes on doing so."""
    port = free_port()
    given = [str(model_folder), str(inprocess), str(port), json.dumps(manifest_of())]
    command = [sys.executable, "-c", _HANGING, *given]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as script:
        try:
            trainer.ask(do="init", port=port, name="g")
            assert script.stdout is not None and script.stdout.readline() == "receives\n"
            trainer.stop()
            said, _ = script.communicate("\n", timeout=60)
        finally:
            script.kill()
            trainer.kill()
    lines = dict(line.partition(" ")[::2] for line in said.splitlines())
    assert script.returncode == 0
    assert float(lines["seconds"]) < 8 and "told" in lines and "ended" in lines
