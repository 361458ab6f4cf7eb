"""Moving pieces of weights on a device, with what is reckoned of them on the way: sums keyed by position, and whether
they are finite. A launch takes any number of pieces and reads each element once.

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


class Tile(NamedTuple):
    """What one program takes of a piece: rows, units of each, and the warps that do it."""

    rows: int
    columns: int
    warps: int


TILE = Tile(8, WIDTH, 8)
SUMMED_TILE = Tile(128, 512, 4)
_UNIT_BYTES = 2
_ALIGNMENT = 8  # units that are moved at once, where every piece allows it
_FIELDS = 7
_MAX_PIECES = 512  # of a launch
_EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80}
Table = npt.NDArray[np.int64]
Row = tuple[int, ...]
"""A piece: addresses of source and target, 0 for none; its first element in its tensor, and their number; the bits of
an exponent, and the bytes of an element."""


def row_of(source: Tensor, target: Tensor | None, start: int) -> Row:
    """Elements `start` on of a tensor, flat and contiguous: where they are, and where they are to be, if anywhere else,
    which is as they are."""
    place = 0 if target is None else target.data_ptr()
    return source.data_ptr(), place, start, source.numel(), _EXPONENTS[source.dtype], source.element_size()


def target_of(memory: Tensor) -> Row:
    """All of it as the end of a row, whose first number is the address of its values."""
    return memory.data_ptr(), 0, memory.numel(), _EXPONENTS[memory.dtype], memory.element_size()


def move_rows(rows_of_pieces: Sequence[Row] | Table, words: Tensor, *, sums: bool = True) -> Tensor:
    """Copy pieces, on the current stream: their memory is to be held until this returns. Returns int64 [pieces, 3]:
    both sums of each, by the keys in `words`, int64 [4, 4096, 2], or zeros without `sums`, which take a quarter of the
    time; and 1 where it holds NaN or infinity, else 0."""
    results = torch.zeros(len(rows_of_pieces), 3, dtype=torch.int64, device=words.device)
    pieces = np.array(rows_of_pieces, dtype=np.int64)
    rows = np.empty((len(pieces), _FIELDS), dtype=np.int64)
    if len(pieces):
        units = pieces[:, 5] // _UNIT_BYTES
        rows[:, :2], rows[:, 4], rows[:, 5] = pieces[:, :2], pieces[:, 4], units == 2
        rows[:, 2:4] = pieces[:, 2:4] * units[:, None]
        rows[:, 6] = np.arange(len(rows))
    rows = rows[rows[:, 3] > 0]
    is_uneven = (rows[:, :2] % (_ALIGNMENT * _UNIT_BYTES)).any(1) | (rows[:, 2:4] % _ALIGNMENT).any(1)
    for is_aligned, chosen in ((True, rows[~is_uneven]), (False, rows[is_uneven])):
        for first in range(0, len(chosen), _MAX_PIECES):
            _launch(chosen[first : first + _MAX_PIECES], words, results, is_aligned, sums)
    return results


def warm(words: Tensor) -> None:
    """Build every launch that `move_rows` may need, ahead of it."""
    memory = torch.zeros(2 * _ALIGNMENT, dtype=torch.bfloat16, device=words.device)
    for sums in (True, False):
        move_rows([row_of(memory, None, 0), row_of(memory[1:], None, 0)], words, sums=sums)


def _launch(rows: Table, words: Tensor, results: Tensor, is_aligned: bool, sums: bool) -> None:
    tile = SUMMED_TILE if sums else TILE
    start, count, height = rows[:, 2], rows[:, 3], WIDTH * tile.rows
    blocks_of_pieces = ((start + count - 1) // height - start // height + 1) * (WIDTH // tile.columns)
    first_blocks = np.full(_MAX_PIECES, np.iinfo(np.int64).max)
    num_blocks = int(blocks_of_pieces.sum())
    first_blocks[: len(rows)] = np.cumsum(blocks_of_pieces) - blocks_of_pieces
    table = _on_device(np.concatenate((first_blocks, rows.reshape(-1))), words.device)
    _move[(num_blocks,)](
        table,
        words,
        results,
        IS_ALIGNED=is_aligned,
        SUMS=sums,
        PIECES=_MAX_PIECES,
        FIELDS=_FIELDS,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        WIDTH=WIDTH,
        num_warps=tile.warps,
    )


def _on_device(table: Table, device: torch.device) -> Tensor:
    """A copy that nothing waits for: what is not pinned waits for the stream."""
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@triton.jit
def _move(
    table,
    words,
    results,
    IS_ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
    PIECES: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of one piece: the table says which block is the first of each, then what the pieces are.

    The sum over a column of units times the keys of their rows is multiplied by the key of the column once, at the end:
    the loop has two products a unit. Of the units of a column the greatest is kept, without their signs: where it has
    all bits of an exponent, one is not finite."""
    block = tl.program_id(0).to(tl.int64)
    piece = tl.sum((tl.load(table + tl.arange(0, PIECES)) <= block).to(tl.int32), 0) - 1
    number = block - tl.load(table + piece)
    about = table + PIECES + piece * FIELDS
    source, target = tl.load(about), tl.load(about + 1)
    first, count = tl.load(about + 2), tl.load(about + 3)
    exponent, is_wide = tl.load(about + 4).to(tl.int16), tl.load(about + 5)
    result = results + tl.load(about + 6) * 3
    units, places = source.to(tl.pointer_type(tl.int16)), target.to(tl.pointer_type(tl.int16))
    if IS_ALIGNED:  # said of pointers: of the numbers that they are made of it would be forgotten
        units, places = tl.multiple_of(units, 16), tl.multiple_of(places, 16)
        first, count = tl.multiple_of(first, 8), tl.multiple_of(count, 8)
    side: tl.constexpr = WIDTH // COLUMNS
    first_row = (first // (WIDTH * ROWS) + number // side) * ROWS
    start = tl.maximum(first_row, first // WIDTH)
    stop = tl.minimum(first_row + ROWS, (first + count + WIDTH - 1) // WIDTH)
    lane = tl.arange(0, COLUMNS)
    column = (number % side) * COLUMNS
    greatest = tl.zeros([COLUMNS], tl.int16)
    sum_0, sum_1 = tl.zeros([COLUMNS], tl.int64), tl.zeros([COLUMNS], tl.int64)
    if not SUMS:
        # Rows that are all in the piece and have somewhere to go need no masks, which cost a tenth.
        is_plain = (target != 0) & (start * WIDTH >= first) & (stop * WIDTH <= first + count)
        plain_stop = tl.where(is_plain, stop, start)
        for row in range(start, plain_stop):
            at = row * WIDTH + column - first
            if IS_ALIGNED:
                at = tl.multiple_of(at, 8)
            unit = tl.load(units + at + lane)
            tl.store(places + at + lane, unit)
            greatest = tl.maximum(greatest, unit & 0x7FFF)
        start = plain_stop
    for row in range(start, stop):
        at = row * WIDTH + column - first
        if IS_ALIGNED:
            at = tl.multiple_of(at, 8)
        offsets = at + lane
        inside = (offsets >= 0) & (offsets < count)
        unit = tl.load(units + offsets, mask=inside, other=0)
        if target != 0:
            tl.store(places + offsets, unit, mask=inside)
        greatest = tl.maximum(greatest, unit & 0x7FFF)
        if SUMS:
            key = words + (WIDTH + row % WIDTH) * 2
            sum_0 += unit.to(tl.int64) * tl.load(key)
            sum_1 += unit.to(tl.int64) * tl.load(key + 1)
    if SUMS:
        square = first_row // WIDTH
        second, third = words + (2 * WIDTH + square % WIDTH) * 2, words + (3 * WIDTH + square // WIDTH) * 2
        keys = words + (column + lane) * 2
        total_0 = tl.sum(sum_0 * tl.load(keys), 0) * (tl.load(second) * tl.load(third))
        total_1 = tl.sum(sum_1 * tl.load(keys + 1), 0) * (tl.load(second + 1) * tl.load(third + 1))
        tl.atomic_add(result, total_0)
        tl.atomic_add(result + 1, total_1)
    has_exponent = (is_wide == 0) | (lane % 2 == 1)  # a float32's is in its second unit
    is_bad = tl.max((has_exponent & (greatest >= exponent)).to(tl.int32), 0)
    tl.atomic_max(result + 2, is_bad.to(tl.int64), mask=is_bad > 0)
