"""Pieces of weights that are moved in one launch: their copies, their position sums and whether they are finite."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.triton.weight_pieces import WIDTH, UnitMoves, UnitPiece
from headrace.weights.position_sum import PositionKeys, PositionSum

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEYS = PositionKeys(DEVICE)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLACES = [(5, 0), (0, 0), (WIDTH, 0), (9000, 16), (WIDTH * 130 + 77, WIDTH * 100 + 3), (6000, WIDTH**2 - 4000)]


def pieces_of(dtype: torch.dtype, *, copies: bool) -> list[UnitPiece]:
    found = []
    for size, start in PLACES:
        source = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)
        found.append(UnitPiece(source, torch.zeros_like(source) if copies else None, start))
    return found


def results() -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.zeros(len(PLACES), 2, dtype=torch.int64, device=DEVICE)
    return sums, torch.zeros(len(PLACES), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [True, False])
def test_pieces_anywhere_are_copied_and_summed(dtype: torch.dtype, copies: bool) -> None:
    pieces = pieces_of(dtype, copies=copies)
    sums, flags = results()
    UnitMoves(pieces, DEVICE).run(KEYS.words, sums, flags)
    for piece, found in zip(pieces, sums, strict=True):
        expected = PositionSum(KEYS)
        expected.add(piece.source, piece.start)
        assert "".join(f"{lane % 2**64:016x}" for lane in found.tolist()) == expected.hexdigest()
        assert piece.target is None or torch.equal(piece.target, piece.source)
    assert not flags.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_piece(dtype: torch.dtype, at: int, value: float) -> None:
    pieces = pieces_of(dtype, copies=True)
    for piece in pieces:
        piece.source[...] = torch.finfo(dtype).max  # all bits but one of the exponent, and all of the rest
    pieces[3].source[at] = value
    sums, flags = results()
    UnitMoves(pieces, DEVICE).run(None, sums, flags)
    assert flags.tolist() == [0, 0, 0, 1, 0, 0] and not sums.any()


def test_aligned_pieces_are_moved_as_others_are() -> None:
    source = torch.randn(4 * WIDTH + 8, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    aligned = UnitMoves([UnitPiece(source, None, 8)], DEVICE)
    shifted = UnitMoves([UnitPiece(torch.cat([source[:3], source])[3:], None, 8)], DEVICE)
    assert aligned.is_aligned and not shifted.is_aligned
    found = []
    for moves in (aligned, shifted):
        sums, flags = results()
        moves.run(KEYS.words, sums, flags)
        found.append(sums[0].tolist())
    assert found[0] == found[1] != [0, 0]
