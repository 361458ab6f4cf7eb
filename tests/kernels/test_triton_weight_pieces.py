"""Pieces of weights that are moved in one launch: their copies, their position sums and whether they are finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from headrace.kernels.triton import weight_pieces as module
from headrace.kernels.triton.weight_pieces import WIDTH, move_rows, row_of
from headrace.weights.position_sum import PositionKeys, PositionSum

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = PositionKeys(DEVICE).words
KEYS = PositionKeys(CPU)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GUARD = 1 << 13
PLACES = [(5, 0), (0, 0), (WIDTH, 0), (9000, 16), (WIDTH * 6 + 77, WIDTH * 3 + 3), (6000, WIDTH**2 - 4000)]


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows, and so several of them: the interpreter is slow."""
    for name in ("TILE", "SUMMED_TILE"):
        monkeypatch.setattr(module, name, getattr(module, name)._replace(rows=4))


class UnitPiece(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor | None
    start: int


def move_pieces(pieces: list[UnitPiece], words: torch.Tensor, *, sums: bool = True) -> torch.Tensor:
    return move_rows([row_of(*piece) for piece in pieces], words, sums=sums)


def pieces_of(dtype: torch.dtype, *, copies: bool) -> list[UnitPiece]:
    found = []
    for size, start in PLACES:
        source = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)
        found.append(UnitPiece(source, torch.zeros_like(source) if copies else None, start))
    return found


def sum_of(piece: UnitPiece) -> str:
    total = PositionSum(KEYS)
    total.add(piece.source.to(CPU), piece.start)
    return total.hexdigest()


def shown(lanes: list[int]) -> str:
    total = PositionSum(KEYS)
    total.add_lanes(lanes)
    return total.hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("sums", [True, False])
def test_pieces_anywhere_are_copied_and_summed(dtype: torch.dtype, copies: bool, sums: bool) -> None:
    """And nothing beside their targets is touched."""
    pieces, around = pieces_of(dtype, copies=copies), []
    if copies:
        around = [torch.full((len(piece.source) + 2 * GUARD,), 3.0).to(DEVICE, dtype) for piece in pieces]
        held = zip(pieces, around, strict=True)
        pieces = [piece._replace(target=memory[GUARD : GUARD + len(piece.source)]) for piece, memory in held]
    results = move_pieces(pieces, WORDS, sums=sums).tolist()
    for piece, found in zip(pieces, results, strict=True):
        assert shown(found) == sum_of(piece) if sums else found[:2] == [0, 0]
        assert found[2] == 0 and (piece.target is None or torch.equal(piece.target, piece.source))
    for memory in around:
        assert bool((memory[:GUARD] == 3.0).all() and (memory[-GUARD:] == 3.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(0, 3, 5), (2, 3, 4)])
@pytest.mark.parametrize("sums", [True, False])
def test_what_is_not_finite_shows_in_its_piece(dtype: torch.dtype, places: tuple[int, ...], sums: bool) -> None:
    """Each value is first in a piece and last in another."""
    pieces = pieces_of(dtype, copies=True)
    for piece in pieces:
        piece.source[...] = torch.finfo(dtype).max  # all bits but one of the exponent, and all of the rest
    first, values = places[0] == 0, (float("inf"), -float("inf"), float("nan"))
    for number, (place, value) in enumerate(zip(places, values, strict=True)):
        pieces[place].source[0 if (number % 2 == 0) == first else -1] = value
    assert move_pieces(pieces, WORDS, sums=sums)[:, 2].tolist() == [int(place in places) for place in range(6)]
    for source, target, _ in pieces:
        assert target is not None and torch.equal(source.view(torch.int8), target.view(torch.int8))


def test_aligned_pieces_are_moved_as_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside each other."""
    launched: list[bool] = []
    launch = module._launch

    def launch_and_note(*call: Any) -> None:
        launched.append(call[3])
        launch(*call)

    monkeypatch.setattr(module, "_launch", launch_and_note)
    source = torch.randn(4 * WIDTH + 8, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    beside = torch.cat([source[:3], source])[3:]
    target = torch.zeros_like(source)
    results = move_pieces([UnitPiece(beside, None, 8), UnitPiece(source, target, 8)], WORDS).tolist()
    assert launched == [True, False] and results[0] == results[1]
    assert torch.equal(target, source) and shown(results[0]) == sum_of(UnitPiece(source, None, 8))


def test_neighbours_are_not_touched() -> None:
    memory = torch.full((WIDTH + 64,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    for first, size in ((8, WIDTH), (9, 100), (16, 24)):
        into = memory.clone()
        source = torch.randn(size, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
        move_pieces([UnitPiece(source, into[first : first + size], 0)], WORDS)
        assert torch.equal(into[first : first + size], source)
        assert torch.equal(into[:first], memory[:first]) and torch.equal(into[first + size :], memory[first + size :])


def test_nothing_is_nothing() -> None:
    assert move_pieces([], WORDS).shape == (0, 3)


def test_what_is_warm_is_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[tuple[bool, bool]] = set()
    monkeypatch.setattr(module, "_launch", lambda *call: kinds.add((call[3], call[4])))
    module.warm(WORDS)
    assert len(kinds) == 4


def test_more_pieces_than_a_launch_takes_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PIECES", 2)
    pieces = [
        piece._replace(target=torch.zeros_like(piece.source)) for piece in pieces_of(torch.bfloat16, copies=False)
    ]
    results = move_pieces(pieces, WORDS).tolist()
    for piece, (*lanes, is_bad) in zip(pieces, results, strict=True):
        assert piece.target is not None and torch.equal(piece.source, piece.target)
        assert shown(lanes) == sum_of(piece) and not is_bad
