"""Tensors that arrive many at a time, cut anyhow. On a CPU the batches are those of a device, and done at once."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from headrace.config import ModelSpec
from headrace.kernels.triton import weight_pieces
from headrace.kernels.triton.weight_pieces import Row, Table
from headrace.models import weight_map
from headrace.types.errors import UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo, UpdateMode
from headrace.weights import Shard, piece_slices
from headrace.weights.memory import StagePiece
from headrace.weights.position_sum import PositionKeys, PositionSum
from headrace.weights.stage_buffers import DeviceBuffers
from headrace.weights.staging import Enqueued
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import WeightMap
from tests.core.harness import TINY
from tests.weights.tiny import LAYOUTS, Tensors, live_bits, make_map, make_store, make_tensors, manifest_of

CPU = torch.device("cpu")
KEYS = PositionKeys(CPU)


def moved_one_by_one(rows: Sequence[Row] | Table, words: torch.Tensor, *, sums: bool = True) -> torch.Tensor:
    """What `move_rows` does, by definition."""
    results = torch.zeros(len(rows), 3, dtype=torch.int64)
    for result, row in zip(results, rows, strict=True):
        source, target, start, count, exponent, size = map(int, row)
        if not count:
            continue
        dtype = {(0x7F80, 2): torch.bfloat16, (0x7C00, 2): torch.float16, (0x7F80, 4): torch.float32}[exponent, size]
        values = torch.frombuffer((ctypes.c_ubyte * (count * size)).from_address(source), dtype=dtype)
        if target:
            ctypes.memmove(target, source, count * size)
        total = PositionSum(KEYS)
        total.add(values, start)
        lanes = [int(total.hexdigest()[at : at + 16], 16) for at in (0, 16)]
        result[:2] = torch.tensor([lane - (lane >> 63 << 64) for lane in lanes]) * sums
        result[2] = int(not values.isfinite().all())
    return results


@pytest.fixture(autouse=True)
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel by its definition: the interpreter takes a thousand times as long."""
    monkeypatch.setattr(weight_pieces, "move_rows", moved_one_by_one)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def store_of(weight_map: WeightMap, tensors: Tensors, dtype: torch.dtype) -> WeightStore:
    store = WeightStore(weight_map, dtype, CPU)
    store.load(tensors.items())
    return store


def pieces_of(tensors: Tensors, choose: random.Random) -> Iterator[StagePiece]:
    """Every tensor, whole or cut at random elements, in order of its bytes."""
    for index, tensor in enumerate(tensors.values()):
        flat, size = tensor.contiguous().view(-1).view(torch.uint8), tensor.element_size()
        cuts = sorted({choose.randrange(1, tensor.numel()) * size for _ in range(choose.randrange(3))})
        for start, stop in zip([0, *cuts], [*cuts, len(flat)], strict=True):
            yield StagePiece(index, flat[start:stop], start if cuts else None, stop == len(flat), False)


def whole_pieces(tensors: Tensors) -> list[StagePiece]:
    return [
        StagePiece(index, tensor.contiguous().view(-1).view(torch.uint8), None, True, False)
        for index, tensor in enumerate(tensors.values())
    ]


def fill(store: WeightStore, tensors: Tensors, mode: UpdateMode, choose: random.Random) -> None:
    """An update by commands of one to six pieces each, which may be pieces of one tensor."""
    store.begin(manifest_of(tensors), mode, False)
    pieces, whole = list(pieces_of(tensors, choose)), list[int]()
    while pieces:
        size = choose.randrange(1, 7)
        copies = store.stage_all(iter(pieces[:size]))
        assert copies.advance(60.0)
        assert sorted(copies.whole) == [piece.index for piece in pieces[:size] if piece.is_last]
        whole, pieces = whole + copies.whole, pieces[size:]
    assert sorted(whole) == list(range(len(tensors)))
    assert store.commit().is_done()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_batches_end_in_the_bits_of_a_cold_load(layout: dict[str, bool], mode: UpdateMode) -> None:
    weight_map = make_map(**layout)
    for seed in range(12):
        choose = random.Random(seed)
        engine, sent = choose.choice(DTYPES), choose.choice(DTYPES)
        after = make_tensors(weight_map, seed, sent)
        store = store_of(weight_map, make_tensors(weight_map, 100), engine)
        fill(store, after, mode, choose)
        assert live_bits(store) == live_bits(make_store(weight_map, after, engine))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, -1])
def test_what_is_not_finite_is_refused_by_name_and_may_come_again(value: float, at: int) -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = store_of(weight_map, tensors, torch.float32)
    names = list(tensors)
    bad = {**tensors, names[3]: tensors[names[3]].clone()}
    bad[names[3]].view(-1)[at] = value
    store.begin(manifest_of(bad), "shadow", False)
    whole = whole_pieces(bad)
    with pytest.raises(WeightUpdateError, match="NaN or infinity") as caught:
        store.stage_all(iter(whole)).advance(60.0)
    assert caught.value.field == names[3]
    again = whole_pieces(tensors)
    assert store.stage_all(iter(again[3:])).advance(60.0)
    assert store.commit().is_done()
    assert live_bits(store) == live_bits(make_store(weight_map, tensors))


def test_a_batch_that_is_left_over_writes_nothing() -> None:
    weight_map = make_map()
    store = store_of(weight_map, make_tensors(weight_map, 1), torch.float32)
    before, after = live_bits(store), make_tensors(weight_map, 2)
    store.begin(manifest_of(after), "inplace", False)
    batch = store.stage_all(iter(whole_pieces(after)[:1]))
    store.abort()
    with pytest.raises(UpdateConflictError):
        batch.advance(60.0)
    assert live_bits(store) == before and not batch.has_written


def test_a_piece_that_is_not_the_next_one_is_refused() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = store_of(weight_map, tensors, torch.float32)
    store.begin(manifest_of(tensors), "shadow", False)
    flat = next(iter(tensors.values())).view(-1).view(torch.uint8)
    with pytest.raises(WeightUpdateError, match="is not the next one"):
        store.stage_all(iter([StagePiece(0, flat[4:8], 4, False, False)])).advance(60.0)


def test_digests_of_the_manifest_and_tied_tensors_are_checked() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = store_of(weight_map, tensors, torch.float32)
    digests = store.digest()
    manifest = [
        TensorInfo(info.name, info.shape, info.dtype, digests.get(info.name, "")) for info in manifest_of(tensors)
    ]
    store.begin(manifest, "shadow", False)
    whole = whole_pieces(tensors)
    assert store.stage_all(iter(whole)).advance(60.0)
    store.abort()
    store.begin(manifest, "shadow", False)
    wrong = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(WeightUpdateError, match="arrived with digest"):
        store.stage_all(iter(whole_pieces(wrong)[:1])).advance(60.0)


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)], ids=["alone", "one of two"])
@pytest.mark.parametrize("budget_s", [60.0, 0.0])
def test_sha_256s_of_the_manifest_are_checked(shard: Shard, budget_s: float) -> None:
    """Of the whole tensor, also where a rank holds some of it; in slices, and of tensors in pieces too."""
    spec = ModelSpec.from_config(TINY)
    tensors = make_tensors(weight_map(spec), 1)
    store = store_of(weight_map(spec, shard), tensors, torch.float32)
    shas = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    manifest = [TensorInfo(info.name, info.shape, info.dtype, shas[info.name]) for info in manifest_of(tensors)]
    for sent in (whole_pieces(tensors), list(pieces_of(tensors, random.Random(1)))):
        store.begin(manifest, "shadow", False)
        copies, num_slices = store.stage_all(iter(sent)), 1
        while not copies.advance(budget_s):
            num_slices += 1
        assert sorted(copies.whole) == list(range(len(tensors))) and (num_slices > 1) == (not budget_s)
        store.abort()
    store.begin(manifest, "shadow", False)
    wrong = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(WeightUpdateError, match="arrived with digest"):
        store.stage_all(iter(whole_pieces(wrong)[:1])).advance(60.0)


def test_the_kernel_itself_ends_in_a_cold_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight_map = make_map()
    after = make_tensors(weight_map, 3)
    store = store_of(weight_map, make_tensors(weight_map, 100), torch.float32)
    fill(store, after, "shadow", random.Random(1))
    assert live_bits(store) == live_bits(make_store(weight_map, after))


def test_what_is_under_way_is_bounded_and_goes_on_while_the_first_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that has not done anything yet two slices are enqueued, and none is waited for."""
    monkeypatch.setattr(piece_slices, "MAX_SLICE_PIECES", 2)
    done = [False]
    monkeypatch.setattr(Enqueued, "is_done", lambda _: done[0])
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = store_of(weight_map, make_tensors(weight_map, 100), torch.float32)
    store.begin(manifest_of(tensors), "shadow", False)
    taken: list[int] = []

    def pieces() -> Iterator[StagePiece]:
        for piece in whole_pieces(tensors):
            taken.append(piece.index)
            yield piece

    copies = store.stage_all(pieces())
    monkeypatch.setattr(copies._side, "is_ready", lambda: True)
    assert not copies.advance(60.0) and not copies.advance(60.0)
    assert len(taken) == 5 and copies.whole == []  # two slices of two, and the one that is looked at next
    done[0] = True
    assert copies.advance(60.0) and sorted(copies.whole) == list(range(len(tensors)))


def test_the_next_piece_of_a_tensor_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that is in a slice before, which the device has not done."""
    monkeypatch.setattr(piece_slices, "MAX_SLICE_PIECES", 1)
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = store_of(weight_map, make_tensors(weight_map, 100), torch.float32)
    store.begin(manifest_of(tensors), "shadow", False)
    flat = next(iter(tensors.values())).contiguous().view(-1).view(torch.uint8)
    halves = [StagePiece(0, flat[:8], 0, False, False), StagePiece(0, flat[8:], 8, True, False)]
    copies = store.stage_all(iter([*halves, *whole_pieces(tensors)[1:]]))
    done = [False]
    monkeypatch.setattr(Enqueued, "is_done", lambda _: done[0])
    monkeypatch.setattr(copies._side, "is_ready", lambda: True)
    assert not copies.advance(60.0) and len(copies._under_way) == 1
    done[0] = True
    assert copies.advance(60.0) and sorted(copies.whole) == list(range(len(tensors)))
    assert store.commit().is_done()
    assert live_bits(store) == live_bits(make_store(weight_map, tensors))


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("shard", [Shard(0, 2), Shard(1, 2), Shard(0, 1, 1, 2)], ids=["first", "second", "stage"])
@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
def test_of_a_whole_tensor_on_the_device_a_rank_reads_what_it_holds(
    shard: Shard, mode: UpdateMode, sent: torch.dtype
) -> None:
    """All else is NaN; and in what it holds a NaN is found, wherever."""
    spec = ModelSpec.from_config(TINY)
    own = weight_map(spec, shard)
    tensors = make_tensors(weight_map(spec), 1, sent)
    store = store_of(own, {name: torch.ones_like(tensor) for name, tensor in tensors.items()}, torch.float32)
    held = {name: store.read(name) != 0 for name in tensors}
    cut = {name for name, mask in held.items() if not mask.all()}
    assert len(cut) > 3
    rest = {name: tensor.masked_fill(~held[name], torch.nan) for name, tensor in tensors.items()}
    store.begin(manifest_of(tensors), mode, False)
    copies = store.stage_all(iter(whole_pieces(rest)))
    assert copies.advance(60.0) and sorted(copies.whole) == list(range(len(tensors)))
    assert store.commit().is_done()
    assert live_bits(store) == live_bits(store_of(own, tensors, torch.float32))
    for name in sorted(name for name in cut if held[name].any()):
        bad = rest | {name: rest[name].clone()}
        bad[name].view(-1)[int(held[name].view(-1).nonzero()[-1])] = torch.inf
        store.begin(manifest_of(tensors), "shadow", False)
        with pytest.raises(WeightUpdateError, match="NaN or infinity") as caught:
            store.stage_all(iter(whole_pieces(bad))).advance(60.0)
        assert caught.value.field == name
        store.abort()


def test_tensors_that_lie_on_the_device_come_into_place_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a group has brought: one launch for all of them; what is empty, in the host's memory or read against its
    strides goes by itself."""
    launches = list[int]()

    def moved(rows: Sequence[Row] | Table, words: torch.Tensor, *, sums: bool = True) -> torch.Tensor:
        launches.append(len(rows))
        return moved_one_by_one(rows, words, sums=sums)

    monkeypatch.setattr(weight_pieces, "move_rows", moved)
    weight_map = make_map()
    before, after = make_tensors(weight_map, 1), make_tensors(weight_map, 2)
    store = store_of(weight_map, before, torch.float32)
    store._buffers = DeviceBuffers(CPU, lambda: None)
    store.begin(manifest_of(after), "inplace", False)
    values: list[Any] = list(after.values())
    values[0] = memoryview(values[0].numpy().tobytes())
    values[1] = values[1].t().contiguous().t() if values[1].dim() == 2 else values[1]
    pieces = [StagePiece(index, value, None, True, False) for index, value in enumerate(values)]
    whole = list[int]()
    for copies in store.stage_arrived(pieces):
        assert copies is not None and copies[1].advance(60.0)
        whole += copies[0]
    assert sorted(whole) == list(range(len(after)))
    assert launches == [len(after) - 2]
    assert store.commit().is_done() and live_bits(store) == live_bits(make_store(weight_map, after))
