"""Open-ended updates: parts of a manifest planned one by one, and random splits of models against cold loads."""

from __future__ import annotations

import random

import pytest
import torch

from headrace.types.errors import HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo, UpdateMode
from headrace.weights.open_plan import OpenPlan
from headrace.weights.shadow import SHADOW_HEADROOM_BYTES
from headrace.weights.weight_map import ParamSpec, WeightMap, whole_rows
from tests.rounds import rounds
from tests.weights import test_experts
from tests.weights.tiny import (
    DrivenStore,
    Tensors,
    as_bytes,
    live_bits,
    make_map,
    make_store,
    make_tensors,
    manifest_of,
)

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
MODES: list[UpdateMode] = ["shadow", "inplace"]


def worlds_of(name: str, seed: int) -> tuple[WeightMap, list[Tensors]]:
    """A map, and one set of weights in every way that it may be named."""
    if name == "experts":
        single, fused = test_experts.make_worlds(seed)
        mixed = {name: tensor for name, tensor in single.items() if "down_proj" not in name}
        down = "mlp.experts.down_proj"
        return test_experts.make_map(), [single, fused, mixed | {down: fused[down]}]
    weight_map = make_map(tied=name == "tied")
    tensors = make_tensors(weight_map, seed)
    if name != "tied":
        return weight_map, [tensors]
    only_head = {name: tensor for name, tensor in tensors.items() if name != EMBED} | {HEAD: tensors[EMBED]}
    return weight_map, [tensors, tensors | {HEAD: tensors[EMBED].clone()}, only_head]


def split(names: list[str], chance: random.Random) -> list[list[str]]:
    """The names, shuffled, in some buckets, of which some are empty."""
    chance.shuffle(names)
    cuts = sorted(chance.choices(range(len(names) + 1), k=chance.randint(0, 6)))
    return [names[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(names)], strict=True)]


def stage_bucket(store: DrivenStore, tensors: Tensors, names: list[str], *, raw: bool = True) -> int:
    """Extend the update by a bucket, and stage it; what the map still lacks."""
    first = len(store.machine.session.staged.manifest) if store.machine.session else 0
    num_missing = store.extend(manifest_of({name: tensors[name] for name in names}))
    for index, name in enumerate(names, first):
        assert store.stage(index, as_bytes(tensors[name]) if raw else tensors[name]).advance(60.0)
    return num_missing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["plain", "tied", "experts"])
def test_random_buckets_end_as_a_cold_load_or_in_the_old_weights(kind: str, mode: UpdateMode) -> None:
    """In any order and split, with doubled, unknown and misshapen tensors and aborts in between."""
    chance = random.Random(f"{kind} {mode}")
    weight_map, ways = worlds_of(kind, 0)
    store = make_store(weight_map, ways[0])
    live, ends = store.digest(), {"committed": 0, "aborted": 0}
    for number in range(1, rounds(40)):
        ways = worlds_of(kind, number)[1]
        tensors = chance.choice(ways)
        new = make_store(weight_map, ways[0]).digest()
        store.begin_open(mode, False)
        seen: list[str] = []
        ends_early, raw = chance.random() < 0.3, chance.random() < 0.5
        for names in split(list(tensors), chance):
            play_mistakes(store, tensors, seen, chance)
            if ends_early and chance.random() < 0.3:
                break
            assert (stage_bucket(store, tensors, names, raw=raw) == 0) == weight_map_is_full(weight_map, seen, names)
            seen += names
            if len(seen) < len(tensors) and weight_map.missing({EMBED, *seen} if HEAD in seen else set(seen)):
                with pytest.raises(WeightUpdateError, match="not staged"):
                    store.commit()
        if len(seen) == len(tensors):
            store.commit()
            live = new
            ends["committed"] += 1
        else:
            store.abort()
            ends["aborted"] += 1
            if mode == "inplace" and store.state == "poisoned":
                store.begin_open(mode, False)
                stage_bucket(store, tensors, list(tensors))
                store.commit()
                live = new
        assert store.state == "ready" and store.digest() == live, number
    assert min(ends.values()) >= 5


def weight_map_is_full(weight_map: WeightMap, seen: list[str], names: list[str]) -> bool:
    found = {*seen, *names}
    return not weight_map.missing(found | ({EMBED} if HEAD in found and weight_map.aliases else set()))


def play_mistakes(store: DrivenStore, tensors: Tensors, seen: list[str], chance: random.Random) -> None:
    """A bucket that is wrong changes nothing."""
    if chance.random() < 0.6:
        return
    assert store.machine.session is not None
    before = list(store.machine.session.staged.manifest)
    fresh = [name for name in tensors if name not in seen]
    good = manifest_of({name: tensors[name] for name in chance.sample(fresh, min(2, len(fresh)))})
    bad = [TensorInfo("model.nobody", (2,), "float32")]
    if seen:
        bad.append(manifest_of({seen[0]: tensors[seen[0]]})[0])
    if fresh:
        bad.append(TensorInfo(fresh[-1], (1, 2, 3), "float32"))
        bad.append(TensorInfo(fresh[-1], tuple(tensors[fresh[-1]].shape), "int8"))
    wrong = chance.choice(bad)
    with pytest.raises(WeightUpdateError) as caught:
        store.extend([*(info for info in good if info.name != wrong.name), wrong])
    assert caught.value.field == wrong.name
    assert store.machine.session.staged.manifest == before


@pytest.mark.parametrize("kind", ["plain", "tied", "experts"])
def test_what_is_missing_is_counted_part_by_part_as_for_the_whole(kind: str) -> None:
    weight_map, ways = worlds_of(kind, 1)
    for number in range(rounds(100)):
        chance = random.Random(number)
        plan, seen = OpenPlan(weight_map, False), list[str]()
        assert plan.num_missing == len(weight_map.missing(set())) > 0
        tensors = chance.choice(ways)
        for names in split(list(tensors), chance):
            part = plan.plan(manifest_of({name: tensors[name] for name in names}))
            plan.take()
            seen += [info.name for info in part.manifest]
            assert plan.num_missing == len(weight_map.missing(set(seen)))
        assert plan.num_missing == 0


def test_the_two_name_worlds_of_experts_are_never_mixed() -> None:
    weight_map, (single, fused, _) = worlds_of("experts", 1)
    infos = {info.name: info for tensors in (single, fused) for info in manifest_of(tensors)}
    one, whole = infos["mlp.experts.0.up_proj.weight"], infos["mlp.experts.gate_up_proj"]
    for first, second in ((one, whole), (whole, one)):
        plan = OpenPlan(weight_map, False)
        with pytest.raises(WeightUpdateError, match="under another name"):
            plan.plan([first, second])
        plan.plan([first])
        plan.take()
        before = plan.num_missing
        with pytest.raises(WeightUpdateError, match="under another name") as caught:
            plan.plan([infos["mlp.gate.weight"], second])
        assert caught.value.field == second.name and plan.num_missing == before
        plan.plan([infos["mlp.gate.weight"]])  # nothing of the refused part was kept


@pytest.mark.parametrize("order", [[EMBED, HEAD], [HEAD, EMBED]])
@pytest.mark.parametrize("is_one_bucket", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_tied_tensors_must_agree_in_whatever_order_they_come(
    order: list[str], is_one_bucket: bool, mode: UpdateMode
) -> None:
    weight_map, ways = worlds_of("tied", 1)
    tensors = ways[1] | {order[1]: ways[1][EMBED] + 1}
    store = make_store(weight_map, worlds_of("tied", 0)[1][0])
    store.begin_open(mode, False)
    buckets = [order] if is_one_bucket else [[order[0]], [order[1]]]
    with pytest.raises(WeightUpdateError, match="is tied to"):
        for names in buckets:
            stage_bucket(store, tensors, names)
    assert store.stage(1, tensors[order[0]]).advance(60.0)
    stage_bucket(store, tensors, [name for name in tensors if name not in order])
    store.commit()
    assert (
        store.digest() == make_store(weight_map, tensors | {EMBED: tensors[order[0]], HEAD: tensors[order[0]]}).digest()
    )


def test_in_a_partial_update_a_tied_name_alone_is_compared_with_what_is_live() -> None:
    weight_map, ways = worlds_of("tied", 1)
    store = make_store(weight_map, ways[0])
    store.begin_open("shadow", True)
    with pytest.raises(WeightUpdateError, match="tied to"):
        stage_bucket(store, {HEAD: ways[0][EMBED] + 1}, [HEAD])
    with pytest.raises(WeightUpdateError, match="name it first") as caught:
        store.extend(manifest_of({EMBED: ways[0][EMBED]}))
    assert caught.value.field == EMBED
    store.abort()
    store.begin_open("shadow", True)
    new = {EMBED: ways[0][EMBED] + 1, HEAD: ways[0][EMBED] + 1}
    stage_bucket(store, new, [EMBED])
    stage_bucket(store, new, [HEAD])
    store.commit()
    assert torch.equal(store.read(HEAD), new[EMBED])


def test_a_partial_update_commits_what_it_has_and_not_nothing() -> None:
    weight_map, (tensors,) = worlds_of("plain", 1)
    store = make_store(weight_map, worlds_of("plain", 0)[1][0])
    store.begin_open("shadow", True)
    with pytest.raises(WeightUpdateError, match="no tensors"):
        store.commit()
    name = "model.norm.weight"
    assert stage_bucket(store, tensors, [name]) == weight_map.num_needed - 1
    store.commit()
    assert torch.equal(store.read(name), tensors[name])


def test_the_mode_is_decided_by_the_size_of_the_whole_model() -> None:
    weight_map, (tensors,) = worlds_of("plain", 1)
    needed = weight_map.num_elements * 4 + SHADOW_HEADROOM_BYTES
    for memory, mode in ((needed, "shadow"), (needed - 1, "inplace")):
        store = make_store(weight_map, tensors, memory=memory)
        assert store.begin_open("auto", False) == mode
    tight = make_store(weight_map, tensors, memory=needed - 1)
    with pytest.raises(WeightUpdateError, match="shadow needs"):
        tight.begin_open("shadow", False)
    assert tight.begin_open("shadow", True) == "shadow"  # of a part that is not known yet
    name = "model.norm.weight"
    stage_bucket(tight, tensors, [name])
    tight.commit()


def test_a_part_that_finds_no_room_is_refused_and_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_map, (tensors,) = worlds_of("plain", 1)
    store = make_store(weight_map, worlds_of("plain", 0)[1][0])
    store.begin_open("shadow", False)
    names = list(tensors)
    stage_bucket(store, tensors, names[:5])
    left = store._shadow._left
    monkeypatch.setattr(store._shadow, "_left", lambda: 0)
    with pytest.raises(WeightUpdateError, match="shadow needs"):
        stage_bucket(store, tensors, names[5:])
    monkeypatch.setattr(store._shadow, "_left", left)
    assert stage_bucket(store, tensors, names[5:]) == 0
    store.commit()
    assert store.digest() == make_store(weight_map, tensors).digest()


def test_a_closed_update_is_not_extended() -> None:
    weight_map, (tensors,) = worlds_of("plain", 1)
    store = make_store(weight_map, tensors)
    with pytest.raises(UpdateConflictError):
        store.missing()
    name = "model.norm.weight"
    store.begin(manifest_of({name: tensors[name]}), "shadow", True)
    with pytest.raises(WeightUpdateError, match="of its manifest only"):
        store.extend(manifest_of({EMBED: tensors[EMBED]}))
    with pytest.raises(HeadraceError):
        store.missing()


class CountingMap(WeightMap):
    """Counts what is looked at."""

    num_checked = 0
    num_walks = 0

    def problem_of(self, info: TensorInfo, seen: object) -> str:
        self.num_checked += 1
        return super().problem_of(info, seen)  # type: ignore[arg-type]

    def missing(self, seen: object) -> list[str]:
        self.num_walks += 1
        return super().missing(seen)  # type: ignore[arg-type]


def test_each_tensor_is_planned_once_and_the_next_update_in_the_same_buckets_not_again() -> None:
    """No bucket walks through those before it, or through the map."""
    num, size = 800, 20
    names = [f"w{number}" for number in range(num)]
    weight_map = CountingMap(
        [ParamSpec("all", (num, 1))], [whole_rows(name, "all", row, (1, 1)) for row, name in enumerate(names)]
    )
    store = make_store(weight_map, {name: torch.zeros(1, 1) for name in names})
    weight_map.num_walks = 0
    buckets = [names[start : start + size] for start in range(0, num, size)]

    def update(order: list[list[str]], value: float) -> int:
        before = weight_map.num_checked
        store.begin_open("shadow", False)
        for bucket in order:
            stage_bucket(store, dict.fromkeys(bucket, torch.full((1, 1), value)), bucket)
        store.commit()
        assert store.live["all"].unique().tolist() == [value]
        return weight_map.num_checked - before

    assert update(buckets, 1.0) == num
    assert update(buckets, 2.0) == 0
    assert update(buckets[::-1], 3.0) == num
    changed = [*buckets[:1:-1], buckets[0], buckets[1]]
    assert update(changed, 4.0) <= 2 * num  # those that were the same, once more
    assert update(changed, 5.0) == 0
    assert weight_map.num_walks == 0


def test_a_refused_part_leaves_those_that_are_planned() -> None:
    weight_map, (tensors,) = worlds_of("plain", 1)
    infos = manifest_of(tensors)
    plan = OpenPlan(weight_map, False)
    first = plan.plan(infos[:3])
    plan.take()
    second = plan.plan(infos[3:])
    plan.take()
    plan.restart()
    assert plan.num_missing == weight_map.num_needed
    assert plan.plan(infos[:3]) is first
    plan.take()
    with pytest.raises(WeightUpdateError, match="named twice"):
        plan.plan(infos[2:])
    assert plan.plan(infos[3:]) == second and plan.plan(infos[3:]) is plan.plan(infos[3:])
    plan.take()
    assert plan.num_missing == 0
    assert live_bits(make_store(weight_map, tensors))
