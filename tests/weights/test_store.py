"""Live weights: cold loads, the transaction in both modes, digests that see every bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.types.errors import CheckpointError, NotFoundError, UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo, UpdateMode
from headrace.weights.boxes import Box
from headrace.weights.position_sum import PositionKeys, position_digest
from headrace.weights.shadow import SHADOW_HEADROOM_BYTES
from headrace.weights.staging import BLOCK_BYTES
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import Derived, ParamSpec, WeightMap, whole_rows
from tests.weights.tiny import (
    LAYOUTS,
    DrivenStore,
    Tensors,
    as_bytes,
    live_bits,
    make_map,
    make_store,
    make_tensors,
    manifest_of,
    update,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("shadow", "inplace")
KEYS = PositionKeys(torch.device("cpu"))
Q = "model.layers.1.self_attn.q_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def state_of(store: DrivenStore) -> str:
    return store.state


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(as_bytes(tensor))).hexdigest()


def digest_of(tensor: torch.Tensor) -> str:
    return position_digest(tensor.contiguous().view(-1), KEYS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_load_is_read_back_and_digested_in_hf_layout(layout: dict[str, bool], dtype: torch.dtype) -> None:
    weight_map = make_map(**layout)
    tensors = make_tensors(weight_map, 1)
    store = make_store(weight_map, tensors, dtype)
    assert state_of(store) == "ready"
    assert store.digest() == {name: digest_of(tensor.to(dtype)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(store.read(name), tensor.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("raw", [True, False])
def test_an_update_equals_a_cold_load_in_every_layout(layout: dict[str, bool], mode: str, raw: bool) -> None:
    weight_map = make_map(**layout)
    before, after = make_tensors(weight_map, 1), make_tensors(weight_map, 2)
    store = make_store(weight_map, before)
    assert update(store, after, mode, raw=raw) == mode  # type: ignore[arg-type]
    assert store.digest() == make_store(weight_map, after).digest()
    assert live_bits(store) == live_bits(make_store(weight_map, after))
    update(store, before, mode, raw=raw)  # type: ignore[arg-type]
    assert live_bits(store) == live_bits(make_store(weight_map, before))  # A -> B -> A


def test_digests_do_not_depend_on_the_engine_layout() -> None:
    tensors = make_tensors(make_map(fused=False), 3)
    assert make_store(make_map(fused=False), tensors).digest() == make_store(make_map(fused=True), tensors).digest()


@pytest.mark.parametrize("engine", DTYPES)
@pytest.mark.parametrize("sent", DTYPES)
def test_any_float_dtype_arrives_in_the_engine_dtype(engine: torch.dtype, sent: torch.dtype) -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2, sent)
    for raw in (True, False):
        store = make_store(weight_map, make_tensors(weight_map, 1), engine)
        update(store, after, raw=raw)
        assert store.digest() == make_store(weight_map, after, engine).digest()
        assert store.read(Q).dtype == engine


def test_addresses_of_live_parameters_never_change() -> None:
    weight_map = make_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    addresses = {name: tensor.data_ptr() for name, tensor in store.live.items()}
    held = dict(store.live)
    update(store, make_tensors(weight_map, 2), "shadow")
    update(store, make_tensors(weight_map, 3), "inplace")
    store.scramble(1)
    store.load(make_tensors(weight_map, 4).items())
    assert {name: tensor.data_ptr() for name, tensor in store.live.items()} == addresses
    assert all(store.live[name] is tensor for name, tensor in held.items())


def test_one_flipped_bit_changes_exactly_its_name() -> None:
    weight_map = make_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    clean = store.digest()
    for name, rule in weight_map.rules_by_name.items():
        (piece,) = rule.pieces
        region = store.live[piece.param][piece.target.slices].view(-1).view(torch.uint8)
        for byte, bit in ((0, 0), (len(region) - 1, 7), (len(region) // 2, 3)):
            region[byte] ^= 1 << bit
            assert {other for other, digest in store.digest().items() if digest != clean[other]} == {name}
            region[byte] ^= 1 << bit
    assert store.digest() == clean


def test_nothing_is_live_before_the_commit_of_a_shadow_update() -> None:
    weight_map = make_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    before, after = live_bits(store), make_tensors(weight_map, 2)
    store.begin(manifest_of(after), "shadow", False)
    assert state_of(store) == "updating"
    for index, tensor in enumerate(after.values()):
        store.stage(index, as_bytes(tensor)).advance(1.0)
        assert live_bits(store) == before
    store.commit()
    assert state_of(store) == "ready" and live_bits(store) != before


@pytest.mark.parametrize("start", ["ready", "needs_weights"])
def test_an_abort_at_every_index_leaves_a_shadow_update_without_a_trace(start: str) -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2)
    for stop_at in range(len(after) + 1):
        store = make_store(weight_map, make_tensors(weight_map, 1))
        if start == "needs_weights":
            store.scramble(0)
        before = live_bits(store)
        store.begin(manifest_of(after), "shadow", False)
        for index, tensor in list(enumerate(after.values()))[:stop_at]:
            store.stage(index, tensor).advance(1.0)
        store.abort()
        assert state_of(store) == start and live_bits(store) == before


def test_an_abort_at_every_index_poisons_an_update_in_place_once_it_wrote() -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2)
    for stop_at in range(len(after) + 1):
        store = make_store(weight_map, make_tensors(weight_map, 1))
        before = live_bits(store)
        store.begin(manifest_of(after), "inplace", False)
        for index, tensor in list(enumerate(after.values()))[:stop_at]:
            store.stage(index, tensor).advance(1.0)
        store.abort()
        assert state_of(store) == ("poisoned" if stop_at else "ready")
        assert (live_bits(store) == before) == (stop_at == 0)
        if state_of(store) == "poisoned":
            with pytest.raises(WeightUpdateError, match="only a complete update"):
                store.begin(manifest_of({Q: after[Q]}), "shadow", True)
            update(store, after)
            assert state_of(store) == "ready" and store.digest() == make_store(weight_map, after).digest()


def test_a_partial_update_changes_what_it_lists() -> None:
    weight_map = make_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    before, after = store.digest(), make_tensors(weight_map, 2)
    for mode in MODES:
        names = [Q, "model.norm.weight"] if mode == "shadow" else [EMBED]
        update(store, {name: after[name] for name in names}, mode, partial=True)  # type: ignore[arg-type]
        changed = {name for name, digest in store.digest().items() if digest != before[name]}
        assert changed == set(names)
        before = store.digest()


@pytest.mark.parametrize("fault", ["unknown", "missing", "doubled", "misshapen", "dtype"])
@pytest.mark.parametrize("mode", MODES)
def test_a_refused_manifest_touches_nothing(fault: str, mode: str) -> None:
    weight_map = make_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    before, manifest = live_bits(store), manifest_of(make_tensors(weight_map, 2))
    info = manifest[7]
    bad = {
        "unknown": [*manifest, TensorInfo("model.extra", (1,), "float32")],
        "missing": [*manifest[:7], *manifest[8:]],
        "doubled": [*manifest, info],
        "misshapen": [*manifest[:7], TensorInfo(info.name, (*info.shape, 1), info.dtype), *manifest[8:]],
        "dtype": [*manifest[:7], TensorInfo(info.name, info.shape, "int64"), *manifest[8:]],
    }[fault]
    with pytest.raises(WeightUpdateError) as caught:
        store.begin(bad, mode, False)  # type: ignore[arg-type]
    assert caught.value.field == ("model.extra" if fault == "unknown" else info.name)
    assert state_of(store) == "ready" and live_bits(store) == before
    store.begin(manifest, mode, False)  # type: ignore[arg-type]


def test_a_second_begin_is_a_conflict_and_other_commands_need_an_open_update() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = make_store(weight_map, tensors)
    closed: list[Callable[[], object]] = [store.commit, store.abort, lambda: store.stage(0, tensors[EMBED])]
    for command in closed:
        with pytest.raises(UpdateConflictError, match="no weight update is open"):
            command()
    store.begin(manifest_of(tensors), "shadow", False)
    opened: list[Callable[[], object]] = [
        lambda: store.begin(manifest_of(tensors), "shadow", False),
        lambda: store.load(tensors.items()),
        lambda: store.scramble(1),
        lambda: store.fill_random(1),
    ]
    for command in opened:
        with pytest.raises(UpdateConflictError, match="open"):
            command()
    with pytest.raises(WeightUpdateError, match="mode must be"):
        make_store(weight_map, tensors).begin(manifest_of(tensors), "sideways", False)  # type: ignore[arg-type]


def test_a_commit_names_what_was_not_staged_and_can_be_tried_again() -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2)
    store = make_store(weight_map, make_tensors(weight_map, 1))
    store.begin(manifest_of(after), "shadow", False)
    names = list(after)
    for index, name in enumerate(names):
        if index != 4:
            store.stage(index, after[name]).advance(1.0)
    with pytest.raises(WeightUpdateError, match=names[4]):
        store.commit()
    assert state_of(store) == "updating"
    store.stage(4, after[names[4]]).advance(1.0)
    store.commit()
    assert store.digest() == make_store(weight_map, after).digest()


def test_a_stage_is_refused_when_it_is_not_what_the_manifest_says() -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2)
    store = make_store(weight_map, make_tensors(weight_map, 1))
    store.begin(manifest_of(after), "shadow", False)
    good = after[EMBED]
    for bad in (as_bytes(good)[:-1], as_bytes(good.bfloat16()), good.bfloat16(), good[:-1], good.t(), good[None]):
        with pytest.raises(WeightUpdateError, match=EMBED) as caught:
            store.stage(0, bad)
        assert caught.value.field == EMBED
    for index in (-1, len(after), 10**9):
        with pytest.raises(WeightUpdateError, match="not in the manifest"):
            store.stage(index, good)
    store.stage(0, good).advance(1.0)
    with pytest.raises(WeightUpdateError, match="staged twice"):
        store.stage(0, good)


def test_two_works_of_one_tensor_count_once() -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2)
    store = make_store(weight_map, make_tensors(weight_map, 1))
    store.begin(manifest_of(after), "shadow", False)
    first, second = store.stage(0, after[EMBED]), store.stage(0, after[EMBED])
    assert first.advance(1.0)
    with pytest.raises(WeightUpdateError, match="staged twice"):
        second.advance(1.0)


def big_map(rows: int = 5000, columns: int = 100) -> WeightMap:
    return WeightMap([ParamSpec("p", (rows, columns))], [whole_rows("big", "p", 0, (rows, columns))])


@pytest.mark.parametrize("mode", MODES)
def test_staging_goes_in_slices_and_the_buffer_is_released_at_the_end(mode: str) -> None:
    weight_map = big_map()
    before, after = make_tensors(weight_map, 1), make_tensors(weight_map, 2)
    store = make_store(weight_map, before)
    store.begin(manifest_of(after, {"big": sha256(after["big"])}), mode, False)  # type: ignore[arg-type]
    buffer = memoryview(bytearray(bytes(as_bytes(after["big"]))))
    work = store.stage(0, buffer)
    assert torch.equal(store.read("big"), before["big"])
    assert not work.has_written
    num_slices = 1
    while not work.advance(0.0):
        num_slices += 1
        with pytest.raises(BufferError):
            buffer.obj.extend(b"x")  # type: ignore[attr-defined]
    assert num_slices >= after["big"].nbytes // BLOCK_BYTES
    buffer.release()
    assert work.advance(0.0)  # asking again is harmless
    store.commit()
    assert torch.equal(store.read("big"), after["big"])


@pytest.mark.parametrize("mode", MODES)
def test_work_left_over_from_an_aborted_update_writes_nothing(mode: str) -> None:
    weight_map = big_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    after = make_tensors(weight_map, 2)
    store.begin(manifest_of(after), mode, False)  # type: ignore[arg-type]
    started, waiting = store.stage(0, after["big"]), store.stage(0, after["big"])
    started.advance(0.0)
    store.abort()
    bits = live_bits(store)
    store.begin(manifest_of(after), mode, False)  # type: ignore[arg-type]
    for work in (started, waiting):
        with pytest.raises(UpdateConflictError, match="no longer open"):
            work.advance(60.0)
    assert live_bits(store) == bits


def test_a_tensor_that_is_not_contiguous_is_staged_by_value() -> None:
    weight_map = big_map(300, 40)
    wide = torch.randn(300, 80)
    store = make_store(weight_map, make_tensors(weight_map, 1))
    update(store, {"big": wide[:, ::2]}, raw=False)
    assert torch.equal(store.read("big"), wide[:, ::2])
    update(store, {"big": torch.nn.Parameter(wide[:, 1::2].t().contiguous().t())}, raw=False)
    assert torch.equal(store.read("big"), wide[:, 1::2])


@pytest.mark.parametrize("kind", [sha256, digest_of])
def test_a_digest_that_does_not_match_is_named_and_does_not_count(kind: Callable[[torch.Tensor], str]) -> None:
    weight_map = make_map()
    after = make_tensors(weight_map, 2)
    digests = {name: kind(tensor.bfloat16()) for name, tensor in after.items()}
    store = make_store(weight_map, make_tensors(weight_map, 1), torch.bfloat16)
    store.begin(manifest_of(after, digests), "shadow", False)
    names = list(after)
    corrupt = after[names[3]].clone()
    corrupt.view(-1)[5] += 1.0
    work = store.stage(3, corrupt)
    with pytest.raises(WeightUpdateError, match="arrived with digest") as caught:
        work.advance(1.0)
    assert caught.value.field == names[3]
    for index, name in enumerate(names):
        store.stage(index, after[name]).advance(1.0)
    store.commit()
    assert store.digest() == {name: digest_of(tensor.bfloat16()) for name, tensor in after.items()}


def tied_pair() -> tuple[WeightMap, Tensors]:
    weight_map = make_map(tied=True)
    return weight_map, make_tensors(weight_map, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False])
def test_a_tied_tensor_may_be_sent_with_the_same_values(mode: str, first: bool) -> None:
    weight_map, after = tied_pair()
    head = {HEAD: after[EMBED].clone()}
    store = make_store(weight_map, make_tensors(weight_map, 1))
    update(store, head | after if first else after | head, mode)  # type: ignore[arg-type]
    assert store.digest() == make_store(weight_map, after).digest()
    assert HEAD not in store.digest() and torch.equal(store.read(HEAD), after[EMBED])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False])
def test_a_tied_tensor_with_other_values_is_refused_by_name(mode: str, first: bool) -> None:
    weight_map, after = tied_pair()
    other = after[EMBED].clone()
    other[-1, -1] += 1e-3
    tensors = {HEAD: other} | after if first else after | {HEAD: other}
    store = make_store(weight_map, make_tensors(weight_map, 1))
    with pytest.raises(WeightUpdateError, match=r"lm_head.weight is tied to .* tie_word_embeddings false") as caught:
        update(store, tensors, mode)  # type: ignore[arg-type]
    assert caught.value.field == HEAD
    with pytest.raises(WeightUpdateError, match="not staged"):
        store.commit()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [[HEAD, EMBED], [EMBED, HEAD]])
def test_what_is_forgotten_comes_again_and_a_tied_tensor_with_it(mode: Any, order: list[str]) -> None:
    weight_map, after = tied_pair()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    both = {**after, HEAD: after[EMBED]}
    manifest = manifest_of(both)
    index = {info.name: at for at, info in enumerate(manifest)}
    store.begin(manifest, mode, False)
    other = next(name for name in after if name != EMBED)
    assert store.forget(index[other]) == []  # nothing has come yet
    for name, tensor in both.items():
        store.stage(index[name], tensor + 1).advance(1.0)
    assert store.forget(index[other]) == [index[other]]
    store.stage(index[other], after[other]).advance(1.0)
    assert sorted(store.forget(index[order[0]])) == sorted([index[HEAD], index[EMBED]])
    with pytest.raises(WeightUpdateError, match="not staged"):
        store.commit()
    assert store.forget(index[order[1]]) == []
    for name in order:
        store.stage(index[name], both[name]).advance(1.0)
    for name in set(after) - {EMBED, other}:
        assert store.forget(index[name]) == [index[name]]
        store.stage(index[name], after[name]).advance(1.0)
    store.commit()
    assert store.digest() == make_store(weight_map, after).digest()


def test_a_tied_tensor_alone_is_compared_with_what_is_live() -> None:
    weight_map, tensors = tied_pair()
    store = make_store(weight_map, tensors)
    bits = live_bits(store)
    update(store, {HEAD: tensors[EMBED]}, "inplace", partial=True)
    store.begin(manifest_of({HEAD: tensors[EMBED]}), "inplace", True)
    work = store.stage(0, tensors[EMBED] + 1)
    with pytest.raises(WeightUpdateError, match="lm_head.weight is tied to"):
        work.advance(1.0)
    assert not work.has_written
    store.abort()
    assert state_of(store) == "ready" and live_bits(store) == bits


def test_auto_takes_the_shadow_only_when_it_fits() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    needed = weight_map.num_elements * 4 + SHADOW_HEADROOM_BYTES
    for memory, mode in ((needed, "shadow"), (needed - 1, "inplace")):
        store = make_store(weight_map, tensors, memory=memory)
        assert update(store, tensors, "auto") == mode
    with pytest.raises(WeightUpdateError, match="shadow needs") as caught:
        make_store(weight_map, tensors, memory=needed - 1).begin(manifest_of(tensors), "shadow", False)
    assert caught.value.field == "mode"


def test_a_shadow_that_finds_no_room_after_all_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allocator keeps may look free and not be."""
    weight_map = make_map()
    before, after = make_tensors(weight_map, 1), make_tensors(weight_map, 2)
    store, real = make_store(weight_map, before), torch.empty
    num_left = 0

    def exhausted(*sizes: Any, **options: Any) -> torch.Tensor:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise torch.OutOfMemoryError
        return real(*sizes, **options)

    monkeypatch.setattr(torch, "empty", exhausted)
    num_left = 3
    with pytest.raises(WeightUpdateError, match="use inplace"):
        store.begin(manifest_of(after), "shadow", False)
    num_left = 3
    assert store.begin(manifest_of(after), "auto", False) == "inplace"
    store.abort()
    monkeypatch.undo()
    assert state_of(store) == "ready" and live_bits(store) == live_bits(make_store(weight_map, before))
    assert update(store, after, "auto") == "shadow"


@pytest.mark.parametrize("fault", ["unknown", "missing", "doubled", "misshapen", "dtype", "tied"])
def test_a_bad_cold_load_is_named_and_leaves_no_weights(fault: str) -> None:
    weight_map = make_map(tied=True)
    tensors = list(make_tensors(weight_map, 1).items())
    name, tensor = tensors[6]
    bad = {
        "unknown": [*tensors, ("model.extra", tensor)],
        "missing": [*tensors[:6], *tensors[7:]],
        "doubled": [*tensors, (name, tensor)],
        "misshapen": [*tensors[:6], (name, tensor[None]), *tensors[7:]],
        "dtype": [*tensors[:6], (name, tensor.long()), *tensors[7:]],
        "tied": [*tensors, (HEAD, tensors[0][1] + 1)],
    }[fault]
    store = make_store(weight_map, dict(tensors))
    with pytest.raises(CheckpointError) as caught:
        store.load(bad)
    assert caught.value.field == {"unknown": "model.extra", "tied": HEAD}.get(fault, name)
    assert state_of(store) == "needs_weights"
    store.load(tensors)
    assert state_of(store) == "ready"


def test_a_cold_load_accepts_a_tied_copy_and_derived_buffers() -> None:
    weight_map = make_map(tied=True)
    tensors = make_tensors(weight_map, 1)
    extra = {HEAD: tensors[EMBED].clone(), "model.rotary_emb.inv_freq": torch.zeros(3)}
    for dtype in DTYPES:
        assert state_of(make_store(weight_map, extra | tensors, dtype)) == "ready"


def test_random_weights_are_a_function_of_the_seed_not_of_the_layout() -> None:
    stores = [make_store(make_map(fused=fused)) for fused in (True, False, True)]
    for store, seed in zip(stores, (1, 1, 2), strict=True):
        assert state_of(store) == "needs_weights"
        store.fill_random(seed)
        assert state_of(store) == "ready"
    first, same, other = (store.digest() for store in stores)
    assert first == same and first[Q] != other[Q]
    assert stores[0].read("model.norm.weight").tolist() == [1.0] * 12
    assert 0.015 < float(stores[0].read(EMBED).std()) < 0.025


def test_a_scramble_overwrites_everything_and_needs_a_complete_update() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    tensors["model.norm.weight"] = torch.ones(12)
    store = make_store(weight_map, tensors)
    before = store.digest()
    store.scramble(3)
    assert state_of(store) == "needs_weights" and all(store.digest()[name] != before[name] for name in before)
    with pytest.raises(WeightUpdateError, match="only a complete update"):
        store.begin(manifest_of({Q: tensors[Q]}), "shadow", True)
    update(store, tensors)
    assert state_of(store) == "ready" and store.digest() == before


def test_reading_gives_a_copy_and_names_what_it_does_not_know() -> None:
    weight_map = make_map()
    store = make_store(weight_map, make_tensors(weight_map, 1))
    copy = store.read(Q)
    copy.zero_()
    assert store.read(Q).abs().sum() > 0
    with pytest.raises(NotFoundError, match=r"model\.nope is not a tensor"):
        store.read("model.nope")


def test_one_store_loads_from_another() -> None:
    tensors = make_tensors(make_map(fused=True), 1)
    first = make_store(make_map(fused=True), tensors)
    second = make_store(make_map(fused=False))
    second.load((name, first.read(name)) for name in first.weight_map.rules_by_name)
    assert second.digest() == first.digest()


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(mode: UpdateMode, raw: bool, dtype: torch.dtype, value: float) -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1, dtype)
    good = tensors[Q].clone()
    tensors[Q][-1, -1] = value
    store = make_store(weight_map, make_tensors(weight_map, 2), dtype)
    before = live_bits(store)
    store.begin(manifest_of(tensors), mode, False)
    for index, (name, tensor) in enumerate(tensors.items()):
        work = store.stage(index, as_bytes(tensor) if raw else tensor)
        if name != Q:
            assert work.advance(60.0)
            continue
        with pytest.raises(WeightUpdateError, match="holds NaN or infinity in") as caught:
            work.advance(60.0)
        assert caught.value.field == Q
    with pytest.raises(WeightUpdateError, match=f"not staged: {Q}"):
        store.commit()
    if mode == "shadow":
        assert live_bits(store) == before
    assert store.stage(list(tensors).index(Q), good).advance(60.0)  # it may be sent again
    store.commit()
    assert store.digest()[Q] == digest_of(good)


def test_a_switch_lets_nan_and_infinity_in() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    tensors[Q][0, 0], tensors[Q][0, 1] = float("nan"), float("inf")
    store = make_store(weight_map, make_tensors(weight_map, 2), check_finite=False)
    update(store, tensors)
    assert store.digest() == {name: digest_of(tensor) for name, tensor in tensors.items()}


def test_large_finite_values_are_no_infinity() -> None:
    weight_map = make_map()
    for dtype, value in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4)):
        tensors = {name: torch.full_like(t, value) for name, t in make_tensors(weight_map, 1, dtype).items()}
        update(make_store(weight_map, make_tensors(weight_map, 2), dtype), tensors)


def test_a_value_that_overflows_in_the_engines_dtype_is_refused() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    tensors[Q][0, 0] = 1e6
    with pytest.raises(WeightUpdateError, match="infinity in float16"):
        update(make_store(weight_map, make_tensors(weight_map, 2), torch.float16), tensors)


def test_a_tied_name_that_comes_first_or_alone_fills_the_tensor() -> None:
    weight_map = make_map(tied=True)
    tensors = make_tensors(weight_map, 1)
    embedding = tensors.pop("model.embed_tokens.weight")
    want = make_store(weight_map, {**tensors, "model.embed_tokens.weight": embedding}).digest()
    assert make_store(weight_map, {"lm_head.weight": embedding, **tensors}).digest() == want
    both = {"lm_head.weight": embedding, **tensors, "model.embed_tokens.weight": embedding}
    assert make_store(weight_map, both).digest() == want
    both["model.embed_tokens.weight"] = embedding + 1
    with pytest.raises(CheckpointError, match="lm_head.weight is tied to model.embed_tokens.weight"):
        make_store(weight_map, both)


def test_the_engine_dtype_must_be_a_float() -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        WeightStore(make_map(), torch.int8, torch.device("cpu"))


def test_a_tied_tensor_may_come_under_its_other_name_alone() -> None:
    weight_map = make_map(tied=True)
    before, after = make_tensors(weight_map, 1), make_tensors(weight_map, 2)
    renamed = {HEAD if name == EMBED else name: tensor for name, tensor in after.items()}
    expected = make_store(weight_map, after)
    assert live_bits(make_store(weight_map, renamed)) == live_bits(expected)
    for mode in MODES:
        store = make_store(weight_map, before)
        update(store, renamed, mode)  # type: ignore[arg-type]
        assert live_bits(store) == live_bits(expected)


def test_parameters_are_loaded_as_they_lie_and_what_follows_from_them_is_computed() -> None:
    """Padding is zero whatever a file says of it; a parameter that is missing, doubled or another is named."""
    params = [ParamSpec("wide", (4, 2), padding=(Box((3, 0), (1, 2)),)), ParamSpec("norm", (2,))]
    rules = [whole_rows("wide.weight", "wide", 0, (3, 2)), whole_rows("norm.weight", "norm", 0, (2,))]
    derived = Derived(ParamSpec("sum", (2,)), ("wide",), lambda wide: wide.sum(0))
    store = WeightStore(WeightMap(params, rules, derived=[derived]), torch.float32, torch.device("cpu"))
    (infos,) = store.parameters()
    assert [(info.name, info.shape) for info in infos] == [("wide", (4, 2)), ("norm", (2,))]
    held = {"wide": torch.arange(8.0).view(4, 2), "norm": torch.ones(2)}
    for _ in store.load_parameters_in_slices(held.items()):
        pass
    assert torch.equal(store.read("wide.weight"), held["wide"][:3])
    assert torch.equal(store.live["wide"][3], torch.zeros(2))
    assert torch.equal(store.live["sum"], held["wide"][:3].sum(0))
    for wrong, field in (
        ({"wide": held["wide"]}, "norm"),
        ({**held, "wide.weight": held["wide"]}, "wide.weight"),
        ({**held, "norm": torch.ones(3)}, "norm"),
        ({**held, "norm": torch.full((2,), torch.nan)}, "norm"),
    ):
        with pytest.raises(CheckpointError) as caught:
            list(store.load_parameters_in_slices(wrong.items()))
        assert caught.value.field == field
