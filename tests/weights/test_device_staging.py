"""Tensors that arrive many at a time, cut anyhow. On a CPU the batches are those of a device, and done at once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from headrace.types.errors import UpdateConflictError, WeightUpdateError
from headrace.types.weights import TensorInfo, UpdateMode
from headrace.weights.memory import StagePiece
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import WeightMap
from tests.weights.tiny import LAYOUTS, Tensors, live_bits, make_map, make_store, make_tensors, manifest_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


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
    """An update in batches of one to six pieces, of different tensors each."""
    store.begin(manifest_of(tensors), mode, False)
    batch: list[StagePiece] = []
    size = choose.randrange(1, 7)
    for piece in pieces_of(tensors, choose):
        if len(batch) == size or any(each.index == piece.index for each in batch):
            assert store.stage_batch(batch).advance(0.0)
            batch, size = [], choose.randrange(1, 7)
        batch.append(piece)
    assert store.stage_batch(batch).advance(0.0)
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
        store.stage_batch(whole).advance(0.0)
    assert caught.value.field == names[3]
    again = whole_pieces(tensors)
    assert store.stage_batch(again[3:]).advance(0.0)
    assert store.commit().is_done()
    assert live_bits(store) == live_bits(make_store(weight_map, tensors))


def test_a_batch_that_is_left_over_writes_nothing() -> None:
    weight_map = make_map()
    store = store_of(weight_map, make_tensors(weight_map, 1), torch.float32)
    before, after = live_bits(store), make_tensors(weight_map, 2)
    store.begin(manifest_of(after), "inplace", False)
    batch = store.stage_batch(whole_pieces(after)[:1])
    store.abort()
    with pytest.raises(UpdateConflictError):
        batch.advance(0.0)
    assert live_bits(store) == before and not batch.has_written


def test_a_piece_that_is_not_the_next_one_is_refused() -> None:
    weight_map = make_map()
    tensors = make_tensors(weight_map, 1)
    store = store_of(weight_map, tensors, torch.float32)
    store.begin(manifest_of(tensors), "shadow", False)
    flat = next(iter(tensors.values())).view(-1).view(torch.uint8)
    with pytest.raises(WeightUpdateError, match="is not the next one"):
        store.stage_batch([StagePiece(0, flat[4:8], 4, False, False)])


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
    assert store.stage_batch(whole).advance(0.0)
    store.abort()
    store.begin(manifest, "shadow", False)
    wrong = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(WeightUpdateError, match="arrived with digest"):
        store.stage_batch(whole_pieces(wrong)[:1]).advance(0.0)
