"""Updates in buckets, without begin and commit, on a real model."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import (
    DeadlineError,
    Engine,
    HeadraceError,
    PoisonedError,
    TensorInfo,
    UpdateConflictError,
    UpdateReport,
    WeightUpdateError,
)
from headrace.engine import joined_update
from headrace.engine.control import terms_of_part
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.joined_update import JoinedUpdate
from headrace.engine.sender import HERE, Sender
from headrace.engine.update_session import UpdateSession
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model

Starter = Callable[..., Engine]
Tensors = list[tuple[str, torch.Tensor]]
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def new() -> Tensors:
    return named_tensors(model_of(1))


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of the weights of seeds 0, 1 and 2, loaded cold."""
    found = []
    for seed in range(3):
        with Engine(save_model(tmp_path_factory.mktemp("cold"), seed), inprocess=True, **SETTINGS) as cold:
            found.append(cold.digest())
    return found


@pytest.fixture(scope="module")
def shared(model_folder: Path) -> Iterator[Engine]:
    """An engine with a core process."""
    with Engine(model_folder, **SETTINGS) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """The same, with the weights of its checkpoint and without a pause."""
    shared.abort_update()
    shared.update_weights_from_tensor(named_tensors(model_of(0)), "old")
    yield shared
    shared.abort_update()
    shared.resume()


def buckets(tensors: Tensors, size: int = 7) -> list[Tensors]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


def send(engine: Engine, parts: list[Tensors], versions: list[Any] | None = None, **terms: Any) -> UpdateReport:
    """The report of the last bucket; those before have none."""
    given = versions or [None] * len(parts)
    found = [
        engine.update_weights_from_bucket(part, version, **terms) for part, version in zip(parts, given, strict=True)
    ]
    assert found[:-1] == [None] * (len(parts) - 1) and found[-1] is not None
    return found[-1]


def kill_core(engine: Engine) -> None:
    """And wait for the next one."""
    runtime = engine.asynchronous.runtime
    pid = runtime.host.pid
    os.kill(pid, signal.SIGKILL)
    while runtime.host.pid == pid or not runtime.client.is_alive:
        time.sleep(0.01)


@pytest.mark.parametrize("mode", ["auto", "shadow", "inplace"])
def test_buckets_end_as_a_cold_load(engine: Engine, new: Tensors, digests: list[dict[str, str]], mode: Any) -> None:
    parts = buckets(new)
    report = send(engine, parts, [None] * (len(parts) - 1) + [7], mode=mode)
    assert (report.version, report.num_tensors, engine.version) == ("7", len(new), "7")
    assert engine.digest() == digests[1]
    for seed, version in ((2, "8"), (1, "8"), (2, "9")):  # a second, third and fourth, all with every bucket's label
        parts = buckets(named_tensors(model_of(seed)))
        assert send(engine, parts, [version] * len(parts), mode=mode).version == version
        assert engine.digest() == digests[seed]
    [found] = engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 3, "ignore_eos": True})
    assert found.version_spans == [("9", 3)]


def test_without_a_label_the_weights_keep_theirs_in_a_new_epoch(engine: Engine, new: Tensors) -> None:
    epoch = engine.status().epoch
    report = send(engine, buckets(new))
    assert (report.version, report.epoch) == ("old", epoch + 1)


def test_shuffled_buckets_with_the_tied_head_anywhere_and_empty_ones(
    engine: Engine, digests: list[dict[str, str]]
) -> None:
    for number in range(6):
        chance, seed = random.Random(number), 1 + number % 2
        tensors = named_tensors(model_of(seed))
        if number % 3 == 1:
            tensors.append((HEAD, dict(tensors)[EMBED]))
        elif number % 3 == 2:
            tensors = [(HEAD if name == EMBED else name, tensor) for name, tensor in tensors]
        chance.shuffle(tensors)
        parts = buckets(tensors, chance.randint(3, 12))
        if number % 3 == 1:  # else the model may be whole before the second of the two has come
            parts = [[pair for pair in part if pair[0] != "model.norm.weight"] for part in parts]
            parts.append([pair for pair in tensors if pair[0] == "model.norm.weight"])
        parts.insert(chance.randrange(len(parts)), [])
        send(engine, parts, mode=chance.choice(["shadow", "inplace"]))
        assert engine.digest() == digests[seed]


def test_a_tensor_that_comes_again_replaces_the_first(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    wrong = [(name, tensor + 1) for name, tensor in new[2:5]]
    for mode in ("shadow", "inplace"):
        assert engine.update_weights_from_bucket([*new[:2], *wrong], "v", mode=mode) is None
        assert engine.update_weights_from_bucket(new[2:4]) is None
        send(engine, [new[4:8], new[8:]])
        assert engine.digest() == digests[1] and engine.version == "v"


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_a_wrong_bucket_ends_the_update_and_the_next_begins_anew(
    engine: Engine, new: Tensors, digests: list[dict[str, str]], mode: Any
) -> None:
    name = new[-1][0]
    wrong: list[tuple[Tensors, str]] = [
        ([("nobody", torch.zeros(2))], "nobody"),
        ([(name, torch.zeros(3, 3, 3))], name),
        ([(new[0][0], torch.zeros(1))], new[0][0]),  # unlike the one that came
        ([new[-1], new[-1]], name),
        ([(name, torch.full_like(new[-1][1], torch.nan))], name),
    ]
    for bucket, field in wrong:
        assert engine.update_weights_from_bucket(new[:9], "v", mode=mode) is None
        with pytest.raises(WeightUpdateError) as caught:
            engine.update_weights_from_bucket(bucket)
        assert caught.value.field == field
        assert not engine.status().updating
        send(engine, buckets(new), mode=mode)
        assert engine.digest() == digests[1]


@pytest.mark.parametrize("terms", [{"version": ""}, {"mode": "magic"}, {"in_flight": "x"}, {"timeout": -1}])
@pytest.mark.parametrize("blocks", [True, False])
def test_wrong_words_of_a_bucket_end_the_update_too(
    engine: Engine, new: Tensors, digests: list[dict[str, str]], blocks: bool, terms: dict[str, Any]
) -> None:
    """Else buckets of its sender's next try, in another order, would be joined to those of the last."""
    assert engine.update_weights_from_bucket(new[:9]) is None
    with pytest.raises(HeadraceError):
        if blocks:
            engine.update_weights_from_bucket(new[9:], **terms)
        else:
            asyncio.run(engine.asynchronous.update_weights_from_bucket(new[9:], **terms))
    assert not engine.status().updating
    send(engine, [named_tensors(model_of(2))[9:], named_tensors(model_of(2))[:9]])
    assert engine.digest() == digests[2]


@pytest.mark.parametrize("label", [None, "v"])
def test_a_tied_head_that_comes_after_everything_else_is_compared_and_is_no_new_update(
    engine: Engine, new: Tensors, digests: list[dict[str, str]], label: Any
) -> None:
    """The model was whole without it, and a sender that stops there must find nothing open."""
    head = dict(new)[EMBED].clone()
    for _ in range(2):
        parts = buckets(new)
        report = send(engine, parts, [label] * len(parts))
        assert engine.update_weights_from_bucket([(HEAD, head)], label) == report
        engine.resume()
        assert not engine.status().updating and engine.status().epoch == report.epoch
        assert engine.digest() == digests[1]
    with pytest.raises(WeightUpdateError, match="is tied to"):
        engine.update_weights_from_bucket([(HEAD, head + 1)], label)
    assert not engine.status().updating and engine.digest() == digests[1]
    assert engine.update_weights_from_bucket([(HEAD, head)], "another") is None  # the first of another update
    send(engine, [[pair for pair in new if pair[0] != EMBED]])
    assert engine.digest() == digests[1] and engine.version == "another"
    assert engine.update_weights_from_bucket([(HEAD, head)]) is None  # this sender begins with it


@pytest.mark.parametrize("change", ["another update", "reset", "released", "killed"])
def test_a_head_alone_begins_an_update_where_the_last_one_is_not_live_any_more(
    start: Starter, new: Tensors, digests: list[dict[str, str]], change: str
) -> None:
    """Its report would be of weights that have gone, and what is live is nothing to compare with."""
    engine = start(inprocess=False, max_core_restarts=1)
    send(engine, [new], ["v"])
    if change == "another update":
        engine.update_weights_from_tensor(named_tensors(model_of(2)), "other")
    elif change == "reset":
        engine.weights_checker("reset_tensors")
    elif change == "released":
        engine.release_memory_occupation(["weights"])
        engine.resume_memory_occupation(["weights"], restore="await")
    else:
        kill_core(engine)
    send(engine, [[(HEAD, dict(new)[EMBED])], [pair for pair in new if pair[0] != EMBED]], ["v", "v"])
    assert engine.digest() == digests[1] and engine.version == "v"


def test_an_update_that_was_begun_by_name_is_live_when_it_is_finished(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    """Also where it is whole before, and where it begins with what would else be the head of the last one."""
    joined, wait = engine.asynchronous.runtime.joined, engine.asynchronous.runtime.wait
    send(engine, [new], ["v"])
    wait(joined.begin())
    assert engine.update_weights_from_bucket([(HEAD, dict(named_tensors(model_of(2)))[EMBED])], "v") is None
    for bucket in buckets(named_tensors(model_of(2))):
        assert engine.update_weights_from_bucket(bucket) is None
    assert engine.digest() == digests[1]
    report = wait(joined.finish("w"))
    assert report is not None and report.version == engine.version == "w" and engine.digest() == digests[2]
    assert wait(joined.finish("w")) == wait(joined.finish()) == report, "nothing is open"
    send(engine, [new], ["again"])  # without either
    wait(joined.begin())
    with pytest.raises(UpdateConflictError):
        wait(joined.finish())
    assert engine.digest() == digests[1]


@pytest.mark.parametrize("how", ["aborted", "aborted before anything came", "refused", "late", "never came"])
def test_an_update_that_was_begun_and_is_over_holds_up_no_other(
    engine: Engine, new: Tensors, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its trainer died, and the next one sends without begin and end, or by another road."""
    joined, wait = engine.asynchronous.runtime.joined, engine.asynchronous.runtime.wait
    if how == "never came":
        monkeypatch.setattr(joined_update, "DEFAULT_UPDATE_TIMEOUT", 0.0)
    wait(joined.begin())
    first, *rest = buckets(new)
    if how in ("aborted", "late", "refused"):
        assert engine.update_weights_from_bucket(first, "held", timeout=0.2 if how == "late" else 60.0) is None
    if how.startswith("aborted"):
        engine.abort_update()
    elif how == "refused":
        with pytest.raises(WeightUpdateError):
            engine.update_weights_from_bucket([("nobody's", torch.zeros(1))], "held")
    elif how == "late":
        time.sleep(0.5)
    reports = [engine.update_weights_from_bucket(part, "free") for part in (first, *rest)]
    assert reports[-1] is not None and engine.version == "free"
    assert wait(joined.finish()) == reports[-1], "whoever began it is told of the last one"


def test_a_late_head_is_still_one_after_a_call_that_was_refused(engine: Engine, new: Tensors) -> None:
    report = send(engine, [new])
    session = engine.begin_update("x", [(name, tuple(tensor.shape), "float32") for name, tensor in new])
    for bucket in ([(HEAD, dict(new)[EMBED])], new[:2]):
        with pytest.raises(UpdateConflictError):
            engine.update_weights_from_bucket(bucket)
    engine.abort_update(session)
    assert engine.update_weights_from_bucket([(HEAD, dict(new)[EMBED])]) == report


def test_weights_keep_a_label_that_they_get_while_an_update_without_one_is_open(engine: Engine, new: Tensors) -> None:
    assert engine.update_weights_from_bucket(new[:3]) is None
    engine.set_weight_version("relabelled")
    assert send(engine, [new[3:]]).version == "relabelled" == engine.version


def test_no_tensors_begin_no_update(engine: Engine) -> None:
    assert engine.update_weights_from_bucket([]) is None
    assert engine.update_weights_from_bucket([("model.rotary_emb.inv_freq", torch.zeros(3))], "v") is None
    assert not engine.status().updating


def test_a_call_of_no_tensors_takes_no_part_in_an_update_but_its_label_counts(engine: Engine, new: Tensors) -> None:
    """An error in one, as where the update is committed meanwhile, would end it."""
    runtime = engine.asynchronous.runtime

    async def fail(session: UpdateSession, indices: Any) -> None:
        raise DeadlineError("there is nothing to bring")

    assert engine.update_weights_from_bucket(new[:-1]) is None
    assert runtime.wait(runtime.joined.add([], terms_of_part("late", "shadow", "drain", None), fail)) is None
    assert send(engine, [new[-1:]]).version == "late"


def test_a_pause_does_not_end_while_tensors_are_missing(engine: Engine, new: Tensors) -> None:
    engine.pause("keep")
    assert engine.update_weights_from_bucket(new[:-2], "v") is None
    with pytest.raises(UpdateConflictError, match=new[-1][0]) as caught:
        engine.resume()
    assert "abort_update" in caught.value.message and engine.status().paused == "keep"
    assert engine.update_weights_from_bucket(new[-2:]) is not None
    engine.resume()


OTHER_ROADS: dict[str, Callable[[Engine, Tensors, Path], Any]] = {
    "begun": lambda engine, new, folder: engine.begin_update("x", manifest_of(new)),
    "begun without a list": lambda engine, new, folder: engine.begin_update("x", None),
    "tensors": lambda engine, new, folder: engine.update_weights_from_tensor(new, "x"),
    "folder": lambda engine, new, folder: engine.update_weights_from_disk(folder, "x"),
    "release": lambda engine, new, folder: engine.release_memory_occupation(),
}


def manifest_of(tensors: Tensors) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(tensor.shape), "float32") for name, tensor in tensors]


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("road", OTHER_ROADS)
def test_one_that_nobody_goes_on_with_makes_way(
    engine: Engine, new: Tensors, model_folder: Path, caplog: pytest.LogCaptureFixture, road: str, mode: Any
) -> None:
    """Its trainer has died, and the next one does not wait for its deadline."""
    assert engine.update_weights_from_bucket(new[:3], "v", mode=mode) is None
    OTHER_ROADS[road](engine, new, model_folder)
    (warning,) = [each.getMessage() for each in caplog.records if each.name == joined_update.logger.name]
    assert "3 tensors" in warning and ("until a complete update" in warning) == (mode == "inplace")
    status = engine.status()
    if road in ("folder", "tensors"):
        assert (status.state, engine.version) == ("ready", "x")
        return
    engine.abort_update()
    if road == "release":
        assert status.state == "released"
        engine.resume_memory_occupation()
        assert engine.status().state == "needs_weights"
    else:
        assert engine.status().state == ("poisoned" if mode == "inplace" else "ready")
    send(engine, buckets(new))
    assert engine.status().state == "ready"


def test_one_of_which_a_call_goes_on_is_told_of_and_makes_no_way(
    engine: Engine, new: Tensors, model_folder: Path, digests: list[dict[str, str]]
) -> None:
    runtime = engine.asynchronous.runtime
    infos = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new[:2]]

    async def attempt(session: UpdateSession, indices: Any) -> None:
        for call in OTHER_ROADS.values():
            with pytest.raises(UpdateConflictError, match="abort_update"):
                await asyncio.to_thread(call, engine, new, model_folder)
        raise DeadlineError("enough")

    with pytest.raises(DeadlineError):
        runtime.wait(runtime.joined.add(infos, terms_of_part(None, "shadow", "drain", None), attempt))
    send(engine, buckets(new))
    assert engine.digest() == digests[1]


def test_only_a_complete_update_takes_its_place_and_none_takes_that_of_a_session(
    engine: Engine, new: Tensors, model_folder: Path, digests: list[dict[str, str]]
) -> None:
    assert engine.update_weights_from_bucket(new[:3], "v") is None
    with pytest.raises(UpdateConflictError, match="abort_update"):
        engine.begin_update("x", manifest_of(new[:2]), partial=True)
    assert send(engine, [new[3:]]).version == "v"
    session = engine.begin_update("x", manifest_of(new))
    for call in (*OTHER_ROADS.values(), lambda *_: engine.update_weights_from_bucket(new[:3], "v")):
        with pytest.raises(UpdateConflictError, match=f"session {session.session_id} is open; commit or abort"):
            call(engine, new, model_folder)
    engine.abort_update(session)
    send(engine, buckets(new))
    assert engine.digest() == digests[1]


A, B = Sender("client", "a"), Sender("client", "b")
DEAD = Sender("payload", str(2**22 + 1))  # over the greatest number that a process may have
ALIVE = Sender("payload", str(os.getpid()))


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(A, B), (HERE, A), (Sender("payload"), Sender("group", "g")), (DEAD, ALIVE)],
)
def test_half_an_update_is_never_completed_by_another_sender(
    engine: Engine, new: Tensors, digests: list[dict[str, str]], first: Sender, second: Sender, mode: Any
) -> None:
    """Whatever the second brings first, and with the label of the first."""
    other = named_tensors(model_of(2))
    assert bring(engine, new[:9], first, mode) is None
    assert bring(engine, other[9:], second, mode) is None, "it lacks what the first has brought"
    assert engine.status().state == "updating" and engine.version == ("old" if mode == "shadow" else "")
    assert bring(engine, other[:9], second, mode) is not None
    assert engine.digest() == digests[2] and engine.version == "7"


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("sender", [Sender("payload"), ALIVE])
def test_what_comes_again_is_of_another_update_where_nobody_can_tell_senders_apart(
    engine: Engine, new: Tensors, digests: list[dict[str, str]], sender: Sender, mode: Any
) -> None:
    other = named_tensors(model_of(2))
    assert bring(engine, new[:9], sender, mode) is None and bring(engine, new[9:12], sender, mode) is None
    assert bring(engine, other[5:12], sender, mode) is None
    if mode == "inplace":
        with pytest.raises(PoisonedError):
            engine.generate(input_ids=[1])
    assert bring(engine, other[12:], sender, mode) is None, "it lacks what only the first has brought"
    assert bring(engine, other[:5], sender, mode) is not None
    assert engine.digest() == digests[2]


def test_groups_bring_an_update_together_unless_one_is_joined_or_left_meanwhile(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    """As the pipeline stages of a trainer do, each by a group of its own."""
    joined, wait = engine.asynchronous.runtime.joined, engine.asynchronous.runtime.wait
    groups = Sender("group", "0"), Sender("group", "1")
    for group in groups:
        wait(joined.note_joined(group.name))
    assert bring(engine, new[:9], groups[0]) is None and bring(engine, new[8:12], groups[1]) is None
    assert bring(engine, new[12:], groups[0]) is not None and engine.digest() == digests[1]
    for change in (joined.note_joined, joined.note_left):
        assert bring(engine, new[:9], groups[0]) is None and bring(engine, new[9:12], groups[1]) is None
        wait(change("1"))
        assert not engine.status().updating
        assert bring(engine, new[12:], groups[0]) is None
        engine.abort_update()
    wait(joined.note_left("nobody's"))


def test_a_group_that_is_joined_while_a_call_goes_on_has_no_part_in_that_update(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    """The call may wait for a trainer whose host has gone."""
    other, runtime = named_tensors(model_of(2)), engine.asynchronous.runtime
    infos = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new[:9]]

    async def attempt(session: UpdateSession, indices: Any) -> None:
        await runtime.joined.note_joined("g")
        assert await asyncio.to_thread(bring, engine, other[9:], Sender("group", "g")) is None
        assert await asyncio.to_thread(bring, engine, other[:9], Sender("group", "g")) is not None

    with pytest.raises(UpdateConflictError, match="was aborted"):
        runtime.wait(
            runtime.joined.add(infos, terms_of_part(7, "shadow", "drain", None), attempt, sender=Sender("group", "f"))
        )
    assert engine.digest() == digests[2]


def test_one_whose_client_has_gone_before_it_brought_anything_makes_way(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    """Over HTTP a bucket is joined by one call and settled by another."""
    runtime, terms = engine.asynchronous.runtime, terms_of_part(7, "shadow", "drain", None)
    assert runtime.wait(runtime.joined.join([TensorInfo(*manifest_of(new)[0])], terms, A)) is not None
    assert engine.status().updating
    assert engine.update_weights_from_tensor(new, "x").version == "x"
    assert engine.digest() == digests[1]


def test_a_head_alone_is_not_the_late_one_of_another_sender(engine: Engine, new: Tensors) -> None:
    other = dict(named_tensors(model_of(2)))
    assert bring(engine, new, A) is not None
    assert bring(engine, [(HEAD, other[EMBED])], B) is None, "it begins an update"
    assert engine.status().updating


def bring(engine: Engine, tensors: Tensors, sender: Sender, mode: Any = "shadow") -> UpdateReport | None:
    """A bucket of a sender, all of whose buckets have one label."""
    runtime, held = engine.asynchronous.runtime, HeldTensors(tensors)

    async def stage(session: UpdateSession, indices: Any) -> None:
        await runtime.updater.stage(_on_loop, session, held)

    terms = terms_of_part(7, mode, "drain", None)
    return runtime.wait(runtime.joined.add(held.manifest, terms, stage, sender=sender))


async def _on_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


def test_another_label_begins_anew_so_that_no_weights_are_mixed(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    """A trainer that died half-way, and another that sends its buckets in another order."""
    other = named_tensors(model_of(2))
    assert engine.update_weights_from_bucket(new[:-3], "1") is None
    parts = buckets(other)[::-1]
    assert send(engine, parts, ["2"] * len(parts)).version == "2"
    assert engine.digest() == digests[2]


def test_a_session_that_ran_out_of_its_time_is_begun_anew(
    engine: Engine, new: Tensors, digests: list[dict[str, str]]
) -> None:
    assert engine.update_weights_from_bucket(new[:4], "v", timeout=0.05) is None
    while engine.status().updating:
        pass
    send(engine, buckets(new))
    assert engine.digest() == digests[1]


def test_parts_may_be_staged_at_the_same_time(engine: Engine, new: Tensors, digests: list[dict[str, str]]) -> None:
    ours = engine.asynchronous

    async def scenario() -> list[UpdateReport | None]:
        return await asyncio.gather(*(ours.update_weights_from_bucket(part, "all") for part in buckets(new)))

    found = asyncio.run(scenario())
    assert [report.version for report in found if report] == ["all"]
    assert engine.digest() == digests[1]


def test_a_part_that_another_call_commits_is_no_conflict(
    engine: Engine, new: Tensors, digests: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are staged before either looks whether all of it is."""
    finish, num_waiting = JoinedUpdate._finish, 0

    async def once_both_are_staged(self: JoinedUpdate, *arguments: Any) -> UpdateReport | None:
        nonlocal num_waiting
        num_waiting += 1
        while num_waiting < 2:
            await asyncio.sleep(0.01)
        return await finish(self, *arguments)

    monkeypatch.setattr(JoinedUpdate, "_finish", once_both_are_staged)
    ours = engine.asynchronous

    async def scenario() -> list[UpdateReport | None]:
        halves = new[:5], new[5:]
        return await asyncio.gather(*(ours.update_weights_from_bucket(part, "all") for part in halves))

    found = asyncio.run(scenario())
    assert [report.version for report in found if report] == ["all"]
    assert engine.digest() == digests[1]


def test_whatever_happens_while_a_part_is_staged_ends_the_update(engine: Engine, new: Tensors) -> None:
    runtime = engine.asynchronous.runtime
    infos = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in new[:2]]
    terms = terms_of_part(None, "shadow", "drain", None)

    async def fail(session: UpdateSession, indices: Any) -> None:
        assert list(indices) == [0, 1]
        raise DeadlineError("the sender is gone")

    async def hang(session: UpdateSession, indices: Any) -> None:
        await asyncio.sleep(60)

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(runtime.joined.add(infos, terms, hang), 0.1)

    with pytest.raises(DeadlineError):
        runtime.wait(runtime.joined.add(infos, terms, fail))
    assert not engine.status().updating
    runtime.wait(cancelled())
    assert not engine.status().updating


def test_generation_goes_on_between_buckets(engine: Engine, new: Tensors) -> None:
    """And crosses the commit with `keep`."""
    found: list[Any] = []
    params = {"max_new_tokens": 400, "ignore_eos": True, "seed": 1}
    thread = threading.Thread(target=lambda: found.extend(engine.generate(input_ids=[1], sampling_params=params)))
    thread.start()
    while not engine.metrics()["num_running"]:
        pass
    parts = buckets(new)
    for part in parts[:-1]:
        before = engine.metrics()["num_steps"]
        assert engine.update_weights_from_bucket(part, "v", mode="shadow", in_flight="keep") is None
        while thread.is_alive() and engine.metrics()["num_steps"] == before:
            pass
    assert engine.update_weights_from_bucket(parts[-1]) is not None
    thread.join(60)
    assert [version for version, _ in found[0].version_spans][0] == "old"


def test_a_core_that_died_half_way_takes_the_next_update(
    model_folder: Path, new: Tensors, digests: list[dict[str, str]]
) -> None:
    with Engine(model_folder, max_core_restarts=1, **SETTINGS) as engine:
        assert engine.update_weights_from_bucket(new[:5], "v") is None
        kill_core(engine)
        send(engine, buckets(new))
        assert engine.digest() == digests[1]


def test_an_engine_without_weights_takes_them_in_buckets(
    start: Starter, new: Tensors, digests: list[dict[str, str]]
) -> None:
    engine = start()
    engine.weights_checker("reset_tensors")
    send(engine, buckets(new))
    assert engine.digest() == digests[1]
