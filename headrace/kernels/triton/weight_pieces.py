"""Moving pieces of weights on a device, with what is reckoned of them on the way: sums keyed by position, and whether
they are finite. A launch takes hundreds of pieces and reads each element once.

A piece is seen as int16 units; what the sums are is defined by `headrace.weights.position_sum`, whose keys are given.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Units of a row, and rows of a square, which share all keys but the last."""

MAX_PIECES = 512
"""Of one launch."""

_ROWS, _COLUMNS = 128, 1024  # of a block: what one program takes
_AT_ONCE = 4  # rows that are loaded before the first is looked at
_SIDE = WIDTH // _COLUMNS
_UNIT_BYTES = 2
_ALIGNMENT = 8  # units that are moved at once, where every piece allows it
_EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80}
_FIELDS = ("first_block", "source", "target", "start", "count", "exponent", "is_wide", "result")
_NO_BLOCK = 1 << 62


class UnitPiece(NamedTuple):
    """Elements `start` on of a tensor, flat and contiguous: where they are, and where they are to be, if anywhere else,
    which is as they are."""

    source: Tensor
    target: Tensor | None
    start: int


def move_pieces(pieces: Sequence[UnitPiece], words: Tensor, *, sums: bool = True) -> Tensor:
    """Copy them, on the current stream. Returns int64 [pieces, 3]: both sums of each, by the keys in `words`, int64
    [4, 4096, 2], or zeros without `sums`, which take a fifth of the time; and 1 where it holds NaN or infinity, else 0.
    """
    results = torch.zeros(len(pieces), 3, dtype=torch.int64, device=words.device)
    rows = np.array([_fields(piece, number) for number, piece in enumerate(pieces)], dtype=np.int64)
    rows = rows.reshape(-1, len(_FIELDS))[rows.reshape(-1, len(_FIELDS))[:, 4] > 0]
    is_uneven = (rows[:, 1:3] % (_ALIGNMENT * _UNIT_BYTES)).any(1) | (rows[:, 3:5] % _ALIGNMENT).any(1)
    for is_aligned, chosen in ((True, rows[~is_uneven]), (False, rows[is_uneven])):
        for first in range(0, len(chosen), MAX_PIECES):
            _launch(chosen[first : first + MAX_PIECES], words, results, is_aligned, sums)
    return results


def warm(words: Tensor) -> None:
    """Build every launch that `move_pieces` may need, ahead of it."""
    memory = torch.zeros(2 * _ALIGNMENT, dtype=torch.bfloat16, device=words.device)
    for sums in (True, False):
        move_pieces([UnitPiece(memory, None, 0), UnitPiece(memory[1:], None, 0)], words, sums=sums)


def _fields(piece: UnitPiece, number: int) -> tuple[int, ...]:
    source, target = piece.source, piece.target
    units, exponent = source.element_size() // _UNIT_BYTES, _EXPONENTS[source.dtype]
    place = 0 if target is None else target.data_ptr()
    return 0, source.data_ptr(), place, piece.start * units, source.numel() * units, exponent, units == 2, number


def _launch(rows: npt.NDArray[np.int64], words: Tensor, results: Tensor, is_aligned: bool, sums: bool) -> None:
    start, count = rows[:, 3], rows[:, 4]
    tile = WIDTH * _ROWS
    num_blocks = ((start + count - 1) // tile - start // tile + 1) * _SIDE
    rows[:, 0] = np.cumsum(num_blocks) - num_blocks
    is_cuda = words.device.type == "cuda"
    table = torch.full((len(_FIELDS), MAX_PIECES), _NO_BLOCK, dtype=torch.int64, device="cpu", pin_memory=is_cuda)
    table[:, : len(rows)] = torch.from_numpy(rows.T)
    _move[(int(num_blocks.sum()),)](
        table.to(words.device, non_blocking=True),
        words,
        results,
        IS_ALIGNED=is_aligned,
        SUMS=sums,
        PIECES=MAX_PIECES,
        ROWS=_ROWS,
        AT_ONCE=_AT_ONCE,
        COLUMNS=_COLUMNS,
        WIDTH=WIDTH,
        num_warps=4,
    )


@triton.jit
def _move(
    table,
    words,
    results,
    IS_ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of one piece. The sum over a column of units times the keys of their rows is multiplied by the key of
    the column once, at the end: the loop has two products a unit."""
    block = tl.program_id(0).to(tl.int64)
    about = table + tl.sum((tl.load(table + tl.arange(0, PIECES)) <= block).to(tl.int32), 0) - 1
    number = block - tl.load(about)
    source, target = tl.load(about + PIECES), tl.load(about + 2 * PIECES)
    first, count = tl.load(about + 3 * PIECES), tl.load(about + 4 * PIECES)
    exponent, is_wide = tl.load(about + 5 * PIECES).to(tl.int32), tl.load(about + 6 * PIECES)
    result = results + tl.load(about + 7 * PIECES) * 3
    if IS_ALIGNED:
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
        first, count = tl.multiple_of(first, 8), tl.multiple_of(count, 8)
    side: tl.constexpr = WIDTH // COLUMNS
    first_row = (first // (WIDTH * ROWS) + number // side) * ROWS
    start = tl.maximum(first_row, first // WIDTH // AT_ONCE * AT_ONCE)
    stop = tl.minimum(first_row + ROWS, (first + count + WIDTH - 1) // WIDTH)
    num_written = tl.where(target != 0, count, 0)
    if IS_ALIGNED:
        num_written = tl.multiple_of(num_written, 8)
    lane = tl.arange(0, COLUMNS)
    column = (number % side) * COLUMNS
    units = source.to(tl.pointer_type(tl.int16))
    places = target.to(tl.pointer_type(tl.int16))
    seen = tl.zeros([COLUMNS], tl.int32)
    sum_0, sum_1 = tl.zeros([COLUMNS], tl.int64), tl.zeros([COLUMNS], tl.int64)
    for row in range(start, stop, AT_ONCE):
        at = row * WIDTH + column - first
        if IS_ALIGNED:
            at = tl.multiple_of(at, 8)
        step = tl.arange(0, AT_ONCE)
        offsets = at + step[:, None] * WIDTH + lane[None, :]
        inside = (offsets >= 0) & (offsets < count)
        unit = tl.load(units + offsets, mask=inside, other=0)
        tl.store(places + offsets, unit, mask=(offsets >= 0) & (offsets < num_written))
        seen |= tl.max(((unit.to(tl.int32) & exponent) == exponent).to(tl.int32), 0)
        if SUMS:
            key = words + (WIDTH + (row + step) % WIDTH) * 2  # of rows beyond the end there are no units
            sum_0 += tl.sum(unit.to(tl.int64) * tl.load(key)[:, None], 0)
            sum_1 += tl.sum(unit.to(tl.int64) * tl.load(key + 1)[:, None], 0)
    if SUMS:
        square = first_row // WIDTH
        second, third = words + (2 * WIDTH + square % WIDTH) * 2, words + (3 * WIDTH + square // WIDTH) * 2
        keys = words + (column + lane) * 2
        total_0 = tl.sum(sum_0 * tl.load(keys), 0) * (tl.load(second) * tl.load(third))
        total_1 = tl.sum(sum_1 * tl.load(keys + 1), 0) * (tl.load(second + 1) * tl.load(third + 1))
        tl.atomic_add(result, total_0)
        tl.atomic_add(result + 1, total_1)
    is_bad = tl.max(tl.where((is_wide == 1) & (lane % 2 == 0), 0, seen), 0)  # a float32's exponent is in its second
    tl.atomic_max(result + 2, is_bad.to(tl.int64), mask=is_bad > 0)
