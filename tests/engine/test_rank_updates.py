"""Every road by which weights come, to an engine of two ranks, again and again, with nothing left of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import DeadlineError, Engine, HeadraceError, PoisonedError, WeightUpdateError
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model, shared_memory
from tests.engine.group_trainer import TrainerProcess
from tests.engine.test_ranks import rank_pids
from tests.engine.test_restart import pid_of
from tests.engine.test_weight_groups import NAMES, manifest_of
from tests.free_ports import free_port

NEW = named_tensors(model_of(1))
NUM_UPDATES = int(os.environ.get("HEADRACE_UPDATES", "100"))


@pytest.fixture(scope="module", params=["tp_size", "pp_size"])
def ranks(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Engine]:
    settings: dict[str, Any] = {**SETTINGS, request.param: 2}
    with Engine(model_folder, device="cpu", **settings) as started:
        yield started


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def digests(new_folder: Path) -> dict[str, str]:
    """Of the new weights, by one rank that has loaded them."""
    with Engine(new_folder, inprocess=True, **SETTINGS) as alone:
        return alone.digest()


@pytest.fixture(autouse=True)
def old(ranks: Engine, model_folder: Path) -> None:
    """Every test begins with weights that are not the new ones."""
    ranks.abort_update()
    ranks.update_weights_from_disk(model_folder, "old", in_flight="abort")


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    """One that takes part in a group after the other."""
    started = TrainerProcess()
    yield started
    started.close()


def join(ranks: Engine, trainer: TrainerProcess) -> None:
    port = free_port()
    trainer.tell(do="init", port=port, name="g", world_size=3)
    ranks.init_weights_update_group("127.0.0.1", port, 1, 3, "g", "gloo", timeout=30)
    trainer.hear()


@pytest.mark.parametrize("is_bucket", [False, True], ids=["tensors", "bucket"])
def test_both_ranks_are_part_of_a_trainers_group(
    ranks: Engine, trainer: TrainerProcess, new_folder: Path, digests: dict[str, str], is_bucket: bool
) -> None:
    join(ranks, trainer)
    session = ranks.begin_update("new", manifest_of(), in_flight="keep")
    trainer.tell(do="send", name="g", folder=str(new_folder), names=NAMES, bucket=is_bucket)
    ranks.stage_from_group(session, NAMES, "g", "flattened_bucket" if is_bucket else None)
    trainer.hear()
    ranks.commit(session)
    assert ranks.digest() == digests
    ranks.destroy_weights_update_group("g")


def test_what_is_refused_is_received_by_both(
    ranks: Engine, trainer: TrainerProcess, new_folder: Path, digests: dict[str, str]
) -> None:
    """What another call staged before passes by; so the next call finds what is its own."""
    join(ranks, trainer)
    session = ranks.begin_update("new", manifest_of(), in_flight="keep")
    ranks.stage(session, NEW[:1])
    trainer.tell(do="send", name="g", folder=str(new_folder), names=NAMES[:2])
    with pytest.raises(WeightUpdateError, match="staged twice"):
        ranks.stage_from_group(session, NAMES[:2], "g")
    trainer.hear()
    trainer.tell(do="send", name="g", folder=str(new_folder), names=NAMES[1:])
    ranks.stage_from_group(session, NAMES[1:], "g")
    trainer.hear()
    ranks.commit(session)
    assert ranks.digest() == digests
    ranks.destroy_weights_update_group("g")


def test_a_group_without_room_for_all_ranks_is_refused(ranks: Engine) -> None:
    with pytest.raises(WeightUpdateError, match="has no 2 ranks") as refusal:
        ranks.init_weights_update_group("127.0.0.1", 1, 1, 2, "g", "gloo", timeout=5)
    assert refusal.value.field == "world_size"


def test_buckets_join_one_update(ranks: Engine, digests: dict[str, str]) -> None:
    reports = [ranks.update_weights_from_bucket(NEW[start : start + 7], "new") for start in range(0, len(NEW), 7)]
    assert [report is not None for report in reports] == [False] * (len(reports) - 1) + [True]
    assert ranks.digest() == digests


def test_a_tensor_that_is_not_finite_is_refused_and_may_come_again(ranks: Engine, digests: dict[str, str]) -> None:
    name, tensor = next(each for each in NEW if "down_proj" in each[0])
    session = ranks.begin_update("new", manifest_of())
    bad = tensor.clone()
    bad[-1, -1] = torch.nan
    with pytest.raises(WeightUpdateError, match="NaN") as refusal:
        ranks.stage(session, [(name, bad)])
    assert refusal.value.field == name
    ranks.stage(session, NEW)
    ranks.commit(session)
    assert ranks.digest() == digests


def held(engine: Engine) -> tuple[int, ...]:
    """Descriptors and mappings of all processes, and the processes."""
    pids = [os.getpid(), pid_of(engine), *rank_pids(engine)]
    descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
    mappings = [Path(f"/proc/{pid}/maps").read_text().count("memfd:headrace") for pid in pids]
    return (len(pids), *descriptors, *mappings)


def resident_bytes(engine: Engine) -> int:
    """Of the engine's processes and this one."""
    pids = [os.getpid(), pid_of(engine), *rank_pids(engine)]
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def test_many_updates_hold_nothing(ranks: Engine, digests: dict[str, str]) -> None:
    """Whole ones, and in three buckets: descriptors, mappings, processes, names and memory are what they were after the
    first few."""
    names, before = shared_memory(), ranks.digest()
    old = named_tensors(model_of(0))
    num_rounds = NUM_UPDATES // 2 if ranks.resolved.engine.tp_size > 1 else NUM_UPDATES // 8  # stages: the same roads
    for number in range(num_rounds):
        for tensors, expected in ((NEW, digests), (old, before)):
            if number % 2:
                for start in range(3):
                    ranks.update_weights_from_bucket(tensors[start::3], f"v{number}")
            else:
                ranks.update_weights_from_tensor(tensors, f"v{number}")
            if number % 25 == 0:
                assert ranks.digest() == expected
        if number == NUM_UPDATES // 20:
            first, num_bytes = held(ranks), resident_bytes(ranks)
    assert all(now <= then for now, then in zip(held(ranks), first, strict=True))
    assert resident_bytes(ranks) < num_bytes * 1.01
    assert shared_memory() == names and ranks.digest() == before


def test_an_update_in_place_that_breaks_poisons_whichever_rank_has_written(
    ranks: Engine, digests: dict[str, str], model_folder: Path
) -> None:
    name, tensor = next(each for each in NEW if "down_proj" in each[0])
    bad = tensor.clone()
    bad[0, 0] = torch.nan
    session = ranks.begin_update("new", manifest_of(), mode="inplace")
    with pytest.raises(WeightUpdateError, match="NaN"):
        ranks.stage(session, [(name, bad)])
    ranks.abort_update()
    with pytest.raises(PoisonedError):
        ranks.generate(input_ids=[1])
    ranks.update_weights_from_tensor(NEW, "new")
    assert ranks.digest() == digests


def num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def settled(look: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """What is seen for two seconds on end: threads of the group before may still be on their way out."""
    found, since = look(), time.monotonic()
    until = since + 60
    while time.monotonic() < min(since + 2, until):
        time.sleep(0.1)
        if (seen := look()) != found:
            found, since = seen, time.monotonic()
    return found


def test_a_trainer_that_has_died_leaves_nothing_on_either_rank(ranks: Engine, new_folder: Path) -> None:
    """The next group takes its name; of those that are gone no rank waits for anything."""
    found = []
    for _ in range(3):
        started = TrainerProcess()
        join(ranks, started)
        found.append(settled(lambda: (*held(ranks), *map(num_threads, rank_pids(ranks)))))
        session = ranks.begin_update("new", manifest_of(), in_flight="keep", timeout=20)
        started.kill()
        with pytest.raises(HeadraceError):
            ranks.stage_from_group(session, NAMES, "g")
        ranks.abort_update(session)
        started.close()
    assert found[1] == found[2]
    ranks.destroy_weights_update_group("g")


def test_a_group_that_is_left_while_it_is_joined_is_left_by_both(ranks: Engine, trainer: TrainerProcess) -> None:
    for _ in range(3):
        with pytest.raises(DeadlineError):
            ranks.init_weights_update_group("127.0.0.1", free_port(), 1, 3, "g", "gloo", timeout=0.05)
    join(ranks, trainer)
    ranks.destroy_weights_update_group("g")
    assert len(rank_pids(ranks)) == 1
