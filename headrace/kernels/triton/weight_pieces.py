"""Moving pieces of weights on a device, with what is reckoned of them on the way: sums keyed by position, and whether
they are finite. One launch takes any number of pieces and reads each element once.

A piece is seen as int16 units; what the sums are is defined by `headrace.weights.position_sum`, whose keys are given.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Units of a row, and rows of a square, which share all keys but the last."""

_ROWS, _COLUMNS = 128, 1024  # of a block: what one program takes
_SIDE_BLOCKS = WIDTH // _COLUMNS
_ALIGNMENT = 8  # units that are moved at once
_EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80}
_FIELDS = 6


@dataclass(frozen=True, slots=True)
class UnitPiece:
    """Elements `start` on of a tensor, flat and contiguous: where they are, and where they are to be, if anywhere."""

    source: Tensor
    target: Tensor | None
    start: int


class UnitMoves:
    """Copies of pieces, all with a target or none, as tables of a device; `run` may be called again and again."""

    def __init__(self, pieces: Sequence[UnitPiece], device: torch.device) -> None:
        self._held = pieces
        self._copies = bool(pieces) and pieces[0].target is not None
        rows = np.empty((len(pieces), _FIELDS), dtype=np.int64)
        for row, piece in zip(rows, pieces, strict=True):
            source, units = piece.source, piece.source.element_size() // 2
            target = 0 if piece.target is None else piece.target.data_ptr()
            count, exponent = source.numel() * units, _EXPONENTS[source.dtype]
            row[:] = source.data_ptr(), target, piece.start * units, count, exponent, units == 2
        first, counts = rows[:, 2], rows[:, 3]
        tiles = np.where(counts > 0, (first + counts - 1) // (WIDTH * _ROWS) - first // (WIDTH * _ROWS) + 1, 0)
        num_blocks = tiles * _SIDE_BLOCKS
        starts = np.cumsum(num_blocks) - num_blocks
        which = np.repeat(np.arange(len(pieces)), num_blocks)
        blocks = np.stack([which, np.arange(len(which)) - starts[which]], axis=1).astype(np.int32)
        self._num_blocks = len(blocks)
        self.is_aligned = not ((rows[:, :2] % (2 * _ALIGNMENT)).any() or (rows[:, 2:4] % _ALIGNMENT).any())
        self._pieces, self._blocks = torch.from_numpy(rows).to(device), torch.from_numpy(blocks).to(device)

    def run(self, words: Tensor | None, sums: Tensor, flags: Tensor, *, checks: bool = True) -> None:
        """Copy all pieces. With `words`, the keys as int64 [4, 4096, 2], the sums of piece i are added to `sums[i]`,
        int64 [pieces, 2]; `flags[i]`, int32, becomes 1 where it holds NaN or infinity, if that `checks`."""
        if self._num_blocks:
            _move[(self._num_blocks,)](
                self._pieces,
                self._blocks,
                sums if words is None else words,
                sums,
                flags,
                COPIES=self._copies,
                SUMS=words is not None,
                CHECKS=checks,
                IS_ALIGNED=self.is_aligned,
                FIELDS=_FIELDS,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                WIDTH=WIDTH,
                num_warps=4,
            )


@triton.jit
def _move(
    pieces,
    blocks,
    words,
    sums,
    flags,
    COPIES: tl.constexpr,
    SUMS: tl.constexpr,
    CHECKS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of one piece. The sum over a column of units times the keys of their rows is multiplied by the key of
    the column once, at the end: the loop has two products a unit."""
    block = tl.program_id(0).to(tl.int64)
    piece = tl.load(blocks + 2 * block).to(tl.int64)
    number = tl.load(blocks + 2 * block + 1).to(tl.int64)
    about = pieces + piece * FIELDS
    source, target = tl.load(about), tl.load(about + 1)
    first, count = tl.load(about + 2), tl.load(about + 3)
    exponent, is_wide = tl.load(about + 4).to(tl.int32), tl.load(about + 5)
    if IS_ALIGNED:
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
        first, count = tl.multiple_of(first, 8), tl.multiple_of(count, 8)
    side: tl.constexpr = WIDTH // COLUMNS
    first_row = (first // (WIDTH * ROWS) + number // side) * ROWS
    start = tl.maximum(first_row, first // WIDTH)
    stop = tl.minimum(first_row + ROWS, (first + count + WIDTH - 1) // WIDTH)
    lane = tl.arange(0, COLUMNS)
    column = (number % side) * COLUMNS
    units = source.to(tl.pointer_type(tl.int16))
    places = target.to(tl.pointer_type(tl.int16))
    if CHECKS:
        seen = tl.zeros([COLUMNS], tl.int32)
    if SUMS:
        sum_0, sum_1 = tl.zeros([COLUMNS], tl.int64), tl.zeros([COLUMNS], tl.int64)
    for row in range(start, stop):
        at = row * WIDTH + column - first
        if IS_ALIGNED:
            at = tl.multiple_of(at, 8)
        offsets = at + lane
        inside = (offsets >= 0) & (offsets < count)
        unit = tl.load(units + offsets, mask=inside, other=0)
        if COPIES:
            tl.store(places + offsets, unit, mask=inside)
        if CHECKS:
            seen |= ((unit.to(tl.int32) & exponent) == exponent).to(tl.int32)
        if SUMS:
            key = words + (WIDTH + row % WIDTH) * 2
            sum_0 += unit.to(tl.int64) * tl.load(key)
            sum_1 += unit.to(tl.int64) * tl.load(key + 1)
    if CHECKS:
        is_bad = tl.max(tl.where((is_wide == 1) & (lane % 2 == 0), 0, seen), 0)  # a float32's exponent is in its second
        tl.atomic_max(flags + piece, is_bad, mask=is_bad > 0)
    if SUMS:
        square = first_row // WIDTH
        second, third = words + (2 * WIDTH + square % WIDTH) * 2, words + (3 * WIDTH + square // WIDTH) * 2
        keys = words + (column + lane) * 2
        total_0 = tl.sum(sum_0 * tl.load(keys), 0) * (tl.load(second) * tl.load(third))
        total_1 = tl.sum(sum_1 * tl.load(keys + 1), 0) * (tl.load(second + 1) * tl.load(third + 1))
        tl.atomic_add(sums + piece * 2, total_0)
        tl.atomic_add(sums + piece * 2 + 1, total_1)
