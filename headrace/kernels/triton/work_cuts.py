"""How finely the contexts of a step are cut, and how much room its launch needs. Owns these rules and their numbers.

Must not know how items are laid out, nor rows and groups: it is given query tiles with the positions that they see.
Everything here depends on its inputs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

FEW_PROGRAMS = 264
"""Two per multiprocessor of a large device: with fewer programs the time of one item decides."""

LONGEST = 32767
"""Longer items count as this long where items are sorted."""

_MIN_SPLIT = 64  # and the unit of splits: what kernels walk at a time
_MIN_WIDE_SPLIT = 1024
_RESIDENT_PROGRAMS = 1056  # item x kv-head programs that a large device holds at once: eight per multiprocessor
_TARGET_WIDE_PROGRAMS = 528  # four per multiprocessor of a large device
_MAX_WIDE_PARTS = 8  # partial results of long prompts are large
_MAX_WIDE_ROWS = 64  # more rows than these in one launch share what room it has for wide items


@dataclass(frozen=True)
class TileSizes:
    """Query tokens that an item of each class holds: BLOCK_M // query heads per kv head."""

    narrow: int
    wide: int


@dataclass(frozen=True)
class LaunchBounds:
    """What a launch holds: items of each class, and leading packed tokens whose parts it merges."""

    narrow: int
    wide: int
    merged: int


class TileRanges(NamedTuple):
    """What the query tiles of a step see, those of groups [s] before those of rows [n].

    own       positions of the tile that no other tile computes for it [s + n]
    is_wide   [s + n], or None if no tile is
    before    positions of a row's tile that its group computes [n], or None without groups
    num_q     tokens of a row's tile [n]
    ends      context of a row's tile [n]
    """

    own: Int64Array
    is_wide: npt.NDArray[np.bool_] | None
    before: Int64Array | None
    num_q: Int64Array
    ends: Int64Array
    num_tokens: int

    @property
    def num_shared(self) -> int:
        """Tiles of groups."""
        return len(self.own) - len(self.ends)


class Cut(NamedTuple):
    """Tiles cut into parts.

    split          of decode rows
    splits, parts  length and number of each tile's parts [s + n]
    before         parts of a row's tile that its group computes [n]
    token_parts    all parts of each token, in packed order
    slots          partial results of each token, and their running sum in `slot_ends`
    """

    split: int
    splits: Int64Array | int
    parts: Int64Array
    before: Int64Array | int
    token_parts: Int64Array
    slots: Int64Array
    slot_ends: Int64Array
    num_narrow: int
    num_wide: int

    @property
    def num_slots(self) -> int:
        """Partial results of all tokens."""
        return int(self.slot_ends[-1]) if len(self.slot_ends) else 0


class CutRules:
    """The rules of one model on one device; the arguments are those of `work_items.AttentionPlanner`."""

    def __init__(
        self,
        tiles: TileSizes,
        num_kv_heads: int,
        fixed_split: int | None,
        max_positions: int | None,
        max_items: int,
        max_slots: int,
    ) -> None:
        self._tiles = tiles
        self._num_kv_heads = num_kv_heads
        self._fixed_split = fixed_split
        self._max_positions = max_positions
        self._max_items = max_items
        self._max_slots = max_slots

    def bounds(self, num_rows: int, num_tokens: int, *, is_decode: bool) -> LaunchBounds:
        """As `work_items.AttentionPlanner.bounds`."""
        rows = min(num_rows, num_tokens)
        wide = 0 if is_decode or num_tokens <= self._tiles.wide else self._wide_bound(rows, num_tokens)
        least = rows if is_decode else rows + (num_tokens - rows) // self._tiles.narrow  # all tiles narrow and uncut
        if least + wide > self._max_items:
            raise ValueError(f"{rows} rows of {num_tokens} tokens do not fit {self._max_items} items")
        wanted = self._narrow_wanted(rows, is_decode=is_decode or num_rows == num_tokens)
        return LaunchBounds(max(least, min(wanted, self._max_items - wide)), wide, num_tokens)

    def _narrow_wanted(self, num_rows: int, *, is_decode: bool) -> int:
        """As many as `_first_split` can make, not many more: idle programs cost little, but not nothing."""
        busy = max(1, _RESIDENT_PROGRAMS // self._num_kv_heads)
        if self._fixed_split is not None:  # a context is cut at every multiple or not at all
            wanted = max(3 * busy, num_rows * (4 if is_decode else 2))
        elif 4 * num_rows * self._num_kv_heads <= FEW_PROGRAMS:
            wanted = FEW_PROGRAMS // self._num_kv_heads
        else:
            wanted = busy + num_rows * 3 // 2 if is_decode else max(busy, num_rows)
        if self._max_positions is None:
            return wanted
        return min(wanted, num_rows * (ceil_divide(self._max_positions, self._fixed_split or _MIN_SPLIT) + 1))

    def _wide_bound(self, num_rows: int, num_tokens: int) -> int:
        """Tiles of the most wide rows there is room for, and the parts that `_wide_splits` makes of few of them."""
        tiles = self._tiles
        num_wide_rows = min(num_rows, num_tokens // (tiles.narrow + 1), _MAX_WIDE_ROWS)
        most = num_wide_rows + (num_tokens - num_wide_rows) // tiles.wide
        if self._fixed_split is not None:
            return most
        return min(_MAX_WIDE_PARTS * most, most + ceil_divide(_TARGET_WIDE_PROGRAMS, self._num_kv_heads))

    def wide_rows(self, lengths: Int64Array, max_wide: int) -> npt.NDArray[np.bool_]:
        """Which rows get wide tiles: those that a narrow one does not hold, the longest only where room is scarce."""
        longest = int(lengths.max())
        narrow_up_to = self._tiles.narrow if max_wide else longest
        is_wide = lengths > narrow_up_to
        while int(ceil_divide(lengths[is_wide], self._tiles.wide).sum()) > max_wide:
            narrow_up_to *= 2
            is_wide = lengths > narrow_up_to
        return is_wide

    def cut(self, tiles: TileRanges, bounds: LaunchBounds) -> Cut | None:
        """The finest cut wanted that fits; None if even the coarsest does not."""
        num_own = int((tiles.own if tiles.is_wide is None else tiles.own[~tiles.is_wide]).sum())
        if tiles.num_shared:
            num_own -= int(tiles.own[: tiles.num_shared].sum())
        split = self._fixed_split or self._first_split(num_own, bounds.narrow)
        wide_splits = tiles.own if tiles.is_wide is None else self._wide_splits(tiles.own, tiles.is_wide)
        whole_up_to = 1
        while True:
            cut = self._cut_at(tiles, split, wide_splits, whole_up_to)
            fits = cut.num_slots <= self._max_slots and cut.num_narrow + cut.num_wide <= self._max_items
            if fits and cut.num_narrow <= bounds.narrow and cut.num_wide <= bounds.wide:
                return cut
            is_whole = max(split, whole_up_to * (self._fixed_split or 0)) >= int(tiles.ends.max())
            if is_whole and wide_splits is tiles.own:
                return None
            if self._fixed_split is not None:
                whole_up_to *= 2
                continue
            if is_whole or not fits or cut.num_wide > bounds.wide:
                wide_splits = tiles.own
            if not is_whole and (not fits or cut.num_narrow > bounds.narrow):
                split = _longer(split, num_own // bounds.narrow)

    def _cut_at(self, tiles: TileRanges, split: int, wide_splits: Int64Array, whole_up_to: int) -> Cut:
        splits = split if tiles.is_wide is None else np.where(tiles.is_wide, wide_splits, split)
        parts, num_shared = ceil_divide(tiles.own, splits), tiles.num_shared
        before = 0 if tiles.before is None else ceil_divide(tiles.before, split)
        has_one_token = tiles.num_tokens == len(tiles.ends)
        if self._fixed_split is not None and (whole_up_to > 1 or not has_one_token):
            # Tiles of several tokens stay whole, and so do short contexts where room is scarce.
            rows = parts[num_shared:]
            rows[(tiles.num_q > 1) | ((rows <= whole_up_to) & (before == 0))] = 1
            splits = np.where(parts == 1, tiles.own, splits)
        totals = parts[num_shared:] + before if num_shared else parts
        token_parts = totals if has_one_token else totals.repeat(tiles.num_q)
        slots = token_parts * (token_parts > 1)
        num_wide = 0 if tiles.is_wide is None else int(parts[tiles.is_wide].sum())
        num_narrow = int(parts.sum()) - num_wide
        return Cut(split, splits, parts, before, token_parts, slots, slots.cumsum(), num_narrow, num_wide)

    def _wide_splits(self, own: Int64Array, is_wide: npt.NDArray[np.bool_]) -> Int64Array:
        """Per tile: long prompts are cut only where there are too few tiles to fill the device."""
        if self._fixed_split is not None:
            return own
        num_programs = int(np.count_nonzero(is_wide)) * self._num_kv_heads
        num_parts = min(_MAX_WIDE_PARTS, ceil_divide(_TARGET_WIDE_PROGRAMS, num_programs))
        return np.maximum(ceil_divide(own, num_parts), _MIN_WIDE_SPLIT)

    def _first_split(self, num_positions: int, bound: int) -> int:
        """More than an equal share of the programs that run at once: so no part of full length waits for a place, and
        what is left of the rows fills the gaps."""
        num_shares = max(1, min(_RESIDENT_PROGRAMS // self._num_kv_heads, bound))
        return (num_positions // num_shares // _MIN_SPLIT + 1) * _MIN_SPLIT


def _longer(split: int, least: int) -> int:
    """The next split to try: a quarter longer, or `least`."""
    return ceil_divide(max(split + split // 4, least), _MIN_SPLIT) * _MIN_SPLIT


@overload
def ceil_divide(number: int, divisor: int) -> int: ...


@overload
def ceil_divide(number: Int64Array, divisor: Int64Array | int) -> Int64Array: ...


def ceil_divide(number: Int64Array | int, divisor: Int64Array | int) -> Int64Array | int:
    """Quotient of positive numbers, rounded up."""
    return (number + (divisor - 1)) // divisor
