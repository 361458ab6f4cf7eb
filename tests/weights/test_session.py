"""The weight state machine: each rule by name, then random event sequences against a model a few lines long."""

from __future__ import annotations

import random

import pytest
import torch

from headrace.core.fake_executor import FreeWeights
from headrace.types.errors import (
    DeadlineError,
    NeedsWeightsError,
    PoisonedError,
    UpdateConflictError,
    WeightUpdateError,
)
from headrace.types.weights import TensorInfo, UpdateMode
from headrace.weights import OpenUpdate, WeightMachine
from headrace.weights.memory import ResolvedMode, Ticket
from headrace.weights.store import WeightStore
from tests.weights.tiny import Tensors, live_bits, make_map, make_store, make_tensors, manifest_of

MANIFEST = [TensorInfo(name, (2,), "float32") for name in "abc"]


def begin(
    machine: WeightMachine,
    version: str = "v",
    mode: ResolvedMode = "shadow",
    *,
    partial: bool = False,
    now: float = 0.0,
) -> int:
    return machine.begin(version, MANIFEST, mode, now=now, timeout_s=10.0, partial=partial).session_id


def expire(machine: WeightMachine, now: float) -> OpenUpdate | None:
    """What a core does with a session that nobody has touched in time."""
    session = machine.session
    return machine.abort(session.session_id, session.expired()) if session and now >= session.deadline else None


def stage_all(machine: WeightMachine, session_id: int, now: float = 0.0) -> None:
    for index in range(len(MANIFEST)):
        machine.check_stage(session_id, index, now)
        machine.note_write(session_id)
        machine.mark_staged(session_id, [index], now)


def test_a_commit_gives_the_new_version_and_an_epoch_even_for_the_same_label() -> None:
    machine = WeightMachine(FreeWeights())
    assert (machine.state, machine.version, machine.epoch, machine.can_generate) == ("ready", "default", 0, True)
    for epoch in (1, 2, 3):
        session_id = begin(machine, "step")
        assert machine.state == "updating" and machine.version == ("default" if epoch == 1 else "step")
        stage_all(machine, session_id)
        machine.commit(session_id)
        assert (machine.state, machine.version, machine.epoch) == ("ready", "step", epoch)


def test_a_second_begin_is_a_conflict_naming_the_open_session() -> None:
    machine = WeightMachine(FreeWeights())
    session_id = begin(machine)
    with pytest.raises(UpdateConflictError, match=f"session {session_id} is open"):
        begin(machine)
    with pytest.raises(UpdateConflictError, match="is open"):
        machine.lose()


def test_session_ids_are_never_reused_and_stale_ones_are_conflicts() -> None:
    machine = WeightMachine(FreeWeights())
    first = begin(machine)
    machine.abort(first)
    second = begin(machine)
    assert second != first
    for command in (
        lambda: machine.check_stage(first, 0, 0.0),
        lambda: machine.note_write(first),
        lambda: machine.mark_staged(first, [0], 0.0),
        lambda: machine.stage(first, 0, b""),
        lambda: machine.commit(first),
        lambda: machine.abort(first),
    ):
        with pytest.raises(UpdateConflictError, match=f"session {first} was aborted"):
            command()
    machine.abort(second)
    with pytest.raises(UpdateConflictError, match=f"session {second} was aborted"):
        machine.commit(second)
    with pytest.raises(UpdateConflictError, match=f"session {first} is not open; none is"):
        machine.commit(first)
    third = begin(machine)
    with pytest.raises(UpdateConflictError, match=f"session {first} is not open; session {third} is"):
        machine.commit(first)


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("how", ["abort", "expire"])
def test_an_abort_poisons_only_after_a_write_in_place(mode: ResolvedMode, wrote: bool, how: str) -> None:
    machine = WeightMachine(FreeWeights())
    session_id = begin(machine, mode=mode)
    assert machine.can_generate
    if wrote:
        machine.note_write(session_id)
    is_whole = mode == "shadow" or not wrote
    assert machine.can_generate == is_whole
    ended = machine.abort(session_id) if how == "abort" else expire(machine, 10.0)
    assert ended is not None and ended.session_id == session_id
    assert machine.state == ("ready" if is_whole else "poisoned")
    assert machine.can_generate == is_whole
    assert (machine.version, machine.epoch) == ("default", 0)


def test_a_poisoned_or_empty_engine_says_so_and_takes_only_a_complete_update() -> None:
    poisoned = WeightMachine(FreeWeights())
    session_id = begin(poisoned, mode="inplace")
    poisoned.note_write(session_id)
    assert poisoned.refusal() is None and not poisoned.can_generate  # requests wait
    poisoned.abort(session_id)
    assert isinstance(poisoned.refusal(), PoisonedError)
    empty = WeightMachine(FreeWeights(), has_weights=False)
    assert empty.state == "needs_weights" and type(empty.refusal()) is NeedsWeightsError
    for machine in (poisoned, empty):
        state = machine.state
        with pytest.raises(WeightUpdateError, match="only a complete update") as caught:
            begin(machine, partial=True)
        assert caught.value.field == "partial"
        machine.abort(begin(machine))
        assert machine.state == state
        session_id = begin(machine)
        assert not machine.can_generate
        stage_all(machine, session_id)
        machine.commit(session_id)
        assert machine.state == "ready" and machine.refusal() is None


def test_lost_weights_need_a_complete_update() -> None:
    machine = WeightMachine(FreeWeights(), "v1")
    machine.lose()
    assert machine.state == "needs_weights" and not machine.can_generate and machine.version == "v1"


def test_the_deadline_counts_from_the_last_command() -> None:
    machine = WeightMachine(FreeWeights())
    session_id = begin(machine, now=0.0)
    assert expire(machine, 9.9) is None
    machine.check_stage(session_id, 0, 5.0)
    assert expire(machine, 14.9) is None
    machine.mark_staged(session_id, [0], 12.0)
    assert expire(machine, 21.9) is None
    machine.require(session_id).touch(20.0)
    assert expire(machine, 29.9) is None
    expired = expire(machine, 30.0)
    assert expired is not None and expired.session_id == session_id and machine.state == "ready"
    assert expire(machine, 1e9) is None
    begin(machine)  # also while another is open
    with pytest.raises(DeadlineError, match=f"session {session_id} was aborted 10 s after its last command"):
        machine.commit(session_id)


def test_a_stage_is_counted_once_and_a_commit_names_the_rest() -> None:
    machine = WeightMachine(FreeWeights())
    session_id = begin(machine)
    machine.mark_staged(session_id, [1], 0.0)
    for command in (machine.check_stage, lambda at, index, now: machine.mark_staged(at, [index], now)):
        with pytest.raises(WeightUpdateError, match="b was staged twice"):
            command(session_id, 1, 0.0)
        for index in (-1, 3):
            with pytest.raises(WeightUpdateError, match="not in the manifest"):
                command(session_id, index, 0.0)
    with pytest.raises(WeightUpdateError, match="not staged: a, c") as caught:
        machine.commit(session_id)
    assert caught.value.field == "a" and machine.state == "updating"


def test_relabelling_changes_the_label_alone() -> None:
    machine = WeightMachine(FreeWeights(), "a")
    session_id = begin(machine, "c")
    machine.relabel("b")
    assert (machine.version, machine.epoch, machine.state) == ("b", 0, "updating")
    stage_all(machine, session_id)
    machine.commit(session_id)
    assert (machine.version, machine.epoch) == ("c", 1)


@pytest.mark.parametrize("version", ["", "x" * 1025, 7, None])
def test_a_version_is_a_short_string(version: object) -> None:
    machine = WeightMachine(FreeWeights())
    for command in (
        machine.relabel,
        lambda v: WeightMachine(FreeWeights(), v),
        lambda v: begin(machine, v),
    ):
        with pytest.raises(WeightUpdateError, match="version") as caught:
            command(version)  # type: ignore[arg-type]
        assert caught.value.field == "version"
    with pytest.raises(WeightUpdateError, match="timeout_s"):
        machine.begin("v", MANIFEST, "shadow", now=0.0, timeout_s=0.0)


REFUSED = (WeightUpdateError, DeadlineError)  # of a session that is not open, the latter if it outlived its time


class Model:
    """What a caller believes: four facts about the weights, and the open session as a dict."""

    def __init__(self) -> None:
        self.resting, self.version, self.epoch, self.ids = "ready", "default", 0, 0
        self.open: dict[str, object] | None = None

    def close(self) -> None:
        assert self.open
        if self.open["wrote"]:
            self.resting = "poisoned"
        self.open = None


EVENTS = (
    "begin",
    "begin",
    "stage",
    "stage",
    "stage",
    "stage_all",
    "commit",
    "commit",
    "abort",
    "expire",
    "lose",
    "relabel",
    "stale",
)


def play(machine: WeightMachine, model: Model, chance: random.Random) -> None:
    """One random event, legal or not, on both."""
    event, now = chance.choice(EVENTS), 0.0
    session = model.open
    session_id = int(str(session["id"])) if session else model.ids
    if event == "begin":
        mode: ResolvedMode = chance.choice(("shadow", "inplace"))
        partial, version = chance.random() < 0.3, chance.choice(("v1", "v2", ""))
        allowed = bool(version) and not session and not (partial and model.resting != "ready")
        if not allowed:
            with pytest.raises(WeightUpdateError):
                machine.begin(version, MANIFEST, mode, now=now, timeout_s=10.0, partial=partial)
            return
        model.ids += 1
        assert machine.begin(version, MANIFEST, mode, now=now, timeout_s=10.0, partial=partial).session_id == model.ids
        model.open = {"id": model.ids, "version": version, "mode": mode, "staged": set(), "wrote": False}
    elif event in ("stage", "stage_all"):
        for index in range(3) if event == "stage_all" else (chance.randint(-1, 3),):
            play_stage(machine, model, session_id, index, interrupted=chance.random() < 0.1)
    elif event == "commit":
        if not session or session["staged"] != {0, 1, 2}:
            with pytest.raises(REFUSED):
                machine.commit(session_id)
            return
        machine.commit(session_id)
        model.resting, model.version, model.epoch, model.open = "ready", str(session["version"]), model.epoch + 1, None
    elif event == "abort":
        if not session:
            with pytest.raises(REFUSED):
                machine.abort(session_id)
            return
        machine.abort(session_id)
        model.close()
    elif event == "expire":
        late = chance.random() < 0.5
        expired = expire(machine, 10.0 if late else 9.0)
        assert (expired is not None) == (late and session is not None)
        if expired:
            model.close()
    elif event == "lose" and chance.random() < 0.3:
        if session:
            with pytest.raises(UpdateConflictError):
                machine.lose()
            return
        machine.lose()
        model.resting = "needs_weights"
    elif event == "relabel":
        model.version = chance.choice(("x", "y"))
        machine.relabel(model.version)
    elif event == "stale":
        stale = chance.choice((-1, 0, model.ids + 1, session_id - 1 if session else session_id))
        for command in (machine.commit, machine.abort, machine.note_write):
            with pytest.raises(REFUSED):
                command(stale)


def play_stage(machine: WeightMachine, model: Model, session_id: int, index: int, *, interrupted: bool) -> None:
    session = model.open
    staged = session["staged"] if session else set()
    assert isinstance(staged, set)
    if not session or index in staged or not 0 <= index < 3:
        with pytest.raises(REFUSED):
            machine.check_stage(session_id, index, 0.0)
        return
    assert machine.check_stage(session_id, index, 0.0) is MANIFEST[index]
    machine.note_write(session_id)
    session["wrote"] = bool(session["wrote"]) or session["mode"] == "inplace"
    if not interrupted:
        machine.mark_staged(session_id, [index], 0.0)
        staged.add(index)


def test_random_event_sequences_agree_with_the_model() -> None:
    outcomes = {"ready": 0, "updating": 0, "poisoned": 0, "needs_weights": 0}
    num_commits = 0
    for seed in range(4_000):
        chance = random.Random(seed)
        machine, model = WeightMachine(FreeWeights()), Model()
        for _ in range(chance.randint(1, 24)):
            epoch = machine.epoch
            play(machine, model, chance)
            state = "updating" if model.open else model.resting
            assert (machine.state, machine.version, machine.epoch) == (state, model.version, model.epoch), seed
            assert machine.can_generate == (model.resting == "ready" and not (model.open and model.open["wrote"])), seed
            assert (machine.refusal() is None) == (model.resting == "ready")
            assert machine.epoch - epoch in (0, 1)
            num_commits += machine.epoch - epoch
        outcomes[machine.state] += 1
    assert min(outcomes.values()) > 80 and num_commits > 200


def test_random_event_sequences_keep_live_memory_one_version() -> None:
    """The machine over a real store: whenever it may generate, live bits are those of its version."""
    weight_map = make_map(bias=False)
    versions = {f"v{seed}": make_tensors(weight_map, seed) for seed in range(3)}
    bits = {name: live_bits(make_store(weight_map, tensors)) for name, tensors in versions.items()}
    store = WeightStore(weight_map, torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)
    store.load(versions["v0"].items())
    machine = WeightMachine(store, "v0")
    chance, seen = random.Random(5), {"ready": 0, "updating": 0, "poisoned": 0, "needs_weights": 0}
    order: list[int] = []
    for _ in range(3000):
        event = chance.choice(
            ("begin", "stage", "stage", "stage", "finish", "commit", "commit", "abort", "misshapen", "scramble")
        )
        session = machine.session
        if event == "begin" and not session:
            version = chance.choice(tuple(versions))
            manifest = manifest_of(versions[version])
            mode: UpdateMode = chance.choice(("auto", "shadow", "inplace"))
            machine.begin(version, manifest, mode, now=0.0, timeout_s=1.0)
            order = chance.sample(range(len(manifest)), len(manifest))
        elif event == "misshapen":
            with pytest.raises(WeightUpdateError if not session else UpdateConflictError):
                machine.begin("v1", manifest_of(versions["v1"])[1:], "auto", now=0.0, timeout_s=1.0)
        elif event == "scramble" and not session and chance.random() < 0.2:
            store.scramble(1)
            machine.lose()
        elif session and event in ("stage", "finish"):
            for _ in range(1 if event == "stage" else len(order)):
                if order:
                    stage_one(machine, versions[session.version], order.pop())
        elif session and event == "abort" and chance.random() < 0.5:
            machine.abort(session.session_id)
        elif session and event == "commit" and order:
            with pytest.raises(WeightUpdateError, match="not staged"):
                machine.commit(session.session_id)
        elif session and event == "commit":
            machine.commit(session.session_id)
        seen[machine.state] += 1
        if machine.can_generate:
            assert live_bits(store) == bits[machine.version]
    assert min(seen.values()) > 50 and machine.epoch > 50


def test_a_commit_that_fails_half_way_poisons() -> None:
    class Torn(FreeWeights):
        def commit(self) -> Ticket:
            raise RuntimeError("a device is lost")

    machine = WeightMachine(Torn())
    session_id = begin(machine)
    stage_all(machine, session_id)
    with pytest.raises(RuntimeError):
        machine.commit(session_id)
    assert not machine.can_generate and machine.session is not None
    machine.abort(session_id)
    assert machine.state == "poisoned"


def stage_one(machine: WeightMachine, tensors: Tensors, index: int) -> None:
    assert machine.session is not None
    session_id = machine.session.session_id
    info = machine.check_stage(session_id, index, 0.0)
    work = machine.stage(session_id, index, tensors[info.name])
    machine.note_write(session_id)
    while not work.advance(0.0):
        pass
    machine.mark_staged(session_id, [index], 0.0)
