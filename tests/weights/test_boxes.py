"""Boxes, and maps made of random ones: whatever is cut apart is put together again, and a wrong cut is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from headrace.types.errors import InternalError, UnsupportedModelError
from headrace.weights import Box, ParamSpec, Piece, Shard, WeightMap, WeightRule
from headrace.weights.boxes import boxes_of_range, find_overlap
from headrace.weights.staging import TORCH_DTYPES
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import prove_mesh
from tests.rounds import rounds
from tests.weights.tiny import as_bytes, manifest_of


def cuts(chance: random.Random, box: Box, depth: int) -> Iterator[Box]:
    """The box, cut in two at random, again and again."""
    axes = [axis for axis, size in enumerate(box.shape) if size > 1]
    if not depth or not axes:
        yield box
        return
    axis = chance.choice(axes)
    at = chance.randint(1, box.shape[axis] - 1)
    for offset, size in ((0, at), (at, box.shape[axis] - at)):
        start, shape = list(box.start), list(box.shape)
        start[axis], shape[axis] = start[axis] + offset, size
        yield from cuts(chance, Box(tuple(start), tuple(shape)), chance.randint(0, depth - 1))


def random_shape(chance: random.Random, rank: int) -> tuple[int, ...]:
    return tuple(chance.randint(1, 6) for _ in range(rank))


def random_pieces(chance: random.Random, number: int) -> tuple[ParamSpec, list[WeightRule]]:
    """A parameter of any rank cut into boxes, each of them the whole of a tensor, turned and with axes of size 1."""
    param = ParamSpec(
        f"p{number}", random_shape(chance, chance.randint(1, 4)), chance.choice(("", "float32", "bfloat16"))
    )
    rules: list[WeightRule] = []
    padding: list[Box] = []
    for count, target in enumerate(cuts(chance, Box.whole(param.shape), 5)):
        if count and chance.random() < 0.1:
            padding.append(target)
            continue
        sizes = [size for size in target.shape if size > 1 or chance.random() < 0.7] or [1]
        sizes.insert(chance.randint(0, len(sizes)), 1)
        axes = list(range(len(sizes)))
        chance.shuffle(axes)
        shape = tuple(sizes[axes.index(axis)] for axis in range(len(sizes)))
        piece = Piece(param.name, Box.whole(shape), target, tuple(axes))
        rules.append(WeightRule(f"t{number}.{count}", shape, (piece,)))
    return ParamSpec(param.name, param.shape, param.dtype, tuple(padding)), rules


def random_map(chance: random.Random) -> tuple[list[ParamSpec], list[WeightRule]]:
    params: list[ParamSpec] = []
    rules: list[WeightRule] = []
    for number in range(chance.randint(1, 3)):
        param, more = random_pieces(chance, number)
        params.append(param)
        rules += more
    # And one tensor that is cut into boxes of a parameter each.
    shape = random_shape(chance, chance.randint(1, 4))
    boxes = list(cuts(chance, Box.whole(shape), 3))
    pieces = tuple(Piece(f"b{at}", box, Box.whole(box.shape)) for at, box in enumerate(boxes))
    params += [ParamSpec(f"b{at}", box.shape) for at, box in enumerate(boxes)]
    return params, [*rules, WeightRule("cut", shape, pieces)]


def test_a_range_is_its_boxes_in_order() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        shape = random_shape(chance, chance.randint(1, 4))
        values = np.arange(np.prod(shape)).reshape(shape)
        start = chance.randint(0, values.size)
        stop = chance.randint(start, values.size)
        boxes = list(boxes_of_range(shape, start, stop)) if stop > start else []
        found = [values[box.slices].reshape(-1) for box in boxes]
        assert np.concatenate([np.zeros(0, int), *found]).tolist() == list(range(start, stop))
        assert len(boxes) <= 2 * len(shape)


def test_an_overlap_is_found_if_there_is_one() -> None:
    chance, seen = random.Random(2), [0, 0]
    for _ in range(1500):
        shape = random_shape(chance, chance.randint(1, 3))
        boxes = list(cuts(chance, Box.whole(shape), 4))
        assert find_overlap(boxes) is None
        size = tuple(chance.randint(1, each) for each in shape)
        extra = Box(tuple(chance.randint(0, each - part) for each, part in zip(shape, size, strict=True)), size)
        some = chance.sample(boxes, chance.randint(0, len(boxes)))
        expected = any(extra.common(box) is not None for box in some)
        assert (find_overlap([*some, extra]) is not None) == expected
        seen[expected] += 1
    assert min(seen) > 100


def test_random_maps_are_proved_and_any_change_to_one_is_refused() -> None:
    chance, num_refused = random.Random(3), 0
    for _ in range(1500):
        params, rules = random_map(chance)
        WeightMap(params, rules)
        at = chance.randrange(len(rules))
        rule = rules[at]
        which = chance.randrange(len(rule.pieces))
        piece = rule.pieces[which]
        fault = chance.choice(("lost", "piece lost", "moved", "grown", "shrunk", "doubled", "copy"))
        start, shape = list(piece.target.start), list(piece.target.shape)
        axis = chance.randrange(len(shape))
        start[axis] += {"moved": chance.choice((-1, 1))}.get(fault, 0)
        shape[axis] += {"grown": 1, "shrunk": -1}.get(fault, 0)
        target = Box(tuple(start), tuple(shape))
        others = [each for number, each in enumerate(rule.pieces) if number != which]
        changed = {
            "lost": [],
            "piece lost": others,
            "doubled": [*rule.pieces, piece],
            "copy": [*others, Piece(piece.param, piece.source, piece.target, piece.axes, is_counted=False)],
        }.get(fault, [*others, Piece(piece.param, piece.source, target, piece.axes)])
        wrong = [] if fault == "lost" else [WeightRule(rule.hf_name, rule.shape, tuple(changed))]
        with pytest.raises(InternalError):
            WeightMap(params, [*rules[:at], *wrong, *rules[at + 1 :]])
        num_refused += 1
    assert num_refused == 1500


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_what_goes_in_through_random_boxes_is_read_back(mode: str) -> None:
    """Loads, updates (whole, and in pieces of any length) and reading, in the dtype of each parameter."""
    chance = random.Random(4)
    for number in range(rounds(70)):
        params, rules = random_map(chance)
        weight_map = WeightMap(params, rules)
        store = WeightStore(weight_map, torch.float16, torch.device("cpu"), memory=lambda: 1 << 40)
        generator = torch.Generator().manual_seed(number)
        first, second = (
            {rule.hf_name: torch.randn(rule.shape, generator=generator) for rule in rules} for _ in range(2)
        )
        store.load(first.items())
        assert_holds(store, first)
        store.begin(manifest_of(second), mode, False)  # type: ignore[arg-type]
        for index, tensor in enumerate(second.values()):
            data, at = as_bytes(tensor), 0
            while at < len(data):
                size = min(4 * chance.randint(1, max(1, len(data) // 4)), len(data) - at)
                assert store.stage(index, data[at : at + size], None if size == len(data) else at).advance(60.0)
                at += size
        store.commit()
        assert_holds(store, second)
        for spec in params:
            assert store.live[spec.name].dtype == TORCH_DTYPES[spec.dtype or "float16"]
            assert all(not store.live[spec.name][box.slices].any() for box in spec.padding)


def assert_holds(store: WeightStore, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        found = store.read(name)
        assert torch.equal(found, tensor.to(found.dtype)), name
        whole = bytearray(found.nbytes)
        for _ in store.copy_in_slices(name, 0, memoryview(whole)):
            pass
        assert bytes(whole) == bytes(as_bytes(found))


def split(shape: tuple[int, ...], axis: int, num_ranks: int, unit: int) -> list[WeightMap]:
    maps = []
    for rank in range(num_ranks):
        held, is_counted = Shard(rank, num_ranks).part(shape, axis, unit)
        num_holders = Shard(rank, num_ranks).num_holders(shape[axis] // unit)
        piece = Piece("p", held, Box.whole(held.shape), is_counted=is_counted, num_holders=num_holders)
        maps.append(WeightMap([ParamSpec("p", held.shape)], [WeightRule("t", shape, (piece,))], is_shard=True))
    return maps


def test_the_ranks_of_a_mesh_hold_every_element_and_a_wrong_mesh_is_refused() -> None:
    chance, num_split = random.Random(5), 0
    for _ in range(2000):
        unit, rank = chance.randint(1, 3), chance.randint(1, 3)
        axis, num_ranks = chance.randrange(rank), chance.choice((1, 2, 3, 4, 8))
        shape = list(random_shape(chance, rank))
        shape[axis] = unit * chance.randint(1, 8)
        try:
            maps = split(tuple(shape), axis, num_ranks, unit)
        except UnsupportedModelError:
            num_units = shape[axis] // unit
            assert num_units % num_ranks and num_ranks % num_units
            continue
        num_split += 1
        prove_mesh(maps)
        counted = [table for table in maps if table.rules_by_name["t"].pieces[0].is_counted]
        if len(counted) > 1:
            with pytest.raises(InternalError, match="not covered"):
                prove_mesh([table for table in maps if table is not counted[-1]])
        with pytest.raises(InternalError, match="overlap"):
            prove_mesh([*maps, counted[0]])
        if len(counted) < len(maps):
            with pytest.raises(InternalError, match="do not know how many they are"):
                prove_mesh([table for table in maps if table is not maps[-1]])
    assert num_split > 500


def test_rows_are_padded_to_the_same_number_on_every_rank() -> None:
    for num_rows in range(1, 40):
        for num_ranks in (1, 2, 3, 4):
            if num_rows <= (num_ranks - 1) * -(-num_rows // num_ranks):
                with pytest.raises(UnsupportedModelError):
                    Shard(num_ranks - 1, num_ranks).padded_rows((num_rows, 2))
                continue
            maps = []
            for rank in range(num_ranks):
                held, padding = Shard(rank, num_ranks).padded_rows((num_rows, 2))
                param = ParamSpec("p", (-(-num_rows // num_ranks), 2), padding=padding)
                rule = WeightRule("t", (num_rows, 2), (Piece("p", held, Box.whole(held.shape)),))
                maps.append(WeightMap([param], [rule], is_shard=True))
            prove_mesh(maps)
