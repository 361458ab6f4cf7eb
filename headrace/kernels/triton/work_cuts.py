"""How finely the contexts of a step are cut, and how much room its launch needs. Owns these rules and their numbers.

Must not know how items are laid out, nor rows and groups: it is given query tiles with the positions that they see.
Everything here depends on its inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

FEW_PROGRAMS = 396
"""Three per multiprocessor of a large device, which run at once: then the time of one item decides."""

LONGEST = 32767
"""Longer items count as this long where items are sorted."""

_FEW_ROWS = 66  # rows x kv heads up to which so few programs serve a decode step
_MIN_SPLIT = 64  # and the unit of splits: what kernels walk at a time
_MIN_PREFILL_SPLIT = 1024
_RESIDENT_PROGRAMS = 1056  # item x kv-head programs that a large device holds at once: eight per multiprocessor
_TARGET_PREFILL_PROGRAMS = 528  # four per multiprocessor of a large device
_MOST_WALKED = 1056  # no cut makes more items x kv heads than these, beside what there is
_ITEM_COST = 128  # positions that a walker could see while it begins an item
_PART_COST = 900  # while a part is written, read again and merged
_MAX_PREFILL_PARTS = 8  # partial results of long prompts are large
_MAX_PREFILL_ROWS = 64  # more rows than these in one launch share what room it has for prefill items


@dataclass(frozen=True)
class TileSizes:
    """Query tokens that an item of each class holds: BLOCK_M // query heads per kv head.

    walkers   programs that share all prefill items of a launch, in turns, there and back; 0: each item has its own
    """

    decode: int
    prefill: int
    walkers: int = 0


@dataclass(frozen=True)
class LaunchBounds:
    """What a launch holds: items of each class, and leading packed tokens whose parts it merges."""

    decode: int
    prefill: int
    merged: int


class TileRanges(NamedTuple):
    """What the query tiles of a step see, those of groups [s] before those of rows [n].

    own         positions of the tile that no other tile computes for it [s + n]
    is_prefill  the tile's class [s + n], or None if all are decode tiles
    before      positions of a row's tile that its group computes [n], or None without groups
    num_q       tokens of a row's tile [n]
    ends        context of a row's tile [n]
    """

    own: Int64Array
    is_prefill: npt.NDArray[np.bool_] | None
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
    partial_ends   partial results of each token and those before it: one for each part, none for a context left whole
    """

    split: int
    splits: Int64Array | int
    parts: Int64Array
    before: Int64Array | int
    token_parts: Int64Array
    partial_ends: Int64Array
    num_decode: int
    num_prefill: int

    @property
    def num_partials(self) -> int:
        """Partial results of all tokens."""
        return int(self.partial_ends[-1]) if len(self.partial_ends) else 0


class CutRules:
    """The rules of one model on one device; the arguments are those of `work_items.AttentionPlanner`.

    cut   the finest cut wanted of these tiles that fits these bounds; None if even the coarsest does not
    """

    cut: Callable[[TileRanges, LaunchBounds], Cut | None]

    def __init__(
        self,
        tiles: TileSizes,
        num_kv_heads: int,
        fixed_split: int | None,
        max_positions: int | None,
        max_items: int,
        max_partials: int,
    ) -> None:
        self._tiles = tiles
        self._num_kv_heads = num_kv_heads
        self._fixed_split = fixed_split
        self._max_positions = max_positions
        self._max_items = max_items
        self._max_partials = max_partials
        self.cut = self._cut_freely if fixed_split is None else self._cut_at_multiples

    def bounds(self, num_rows: int, num_tokens: int, *, is_decode: bool) -> LaunchBounds:
        """As `work_items.AttentionPlanner.bounds`."""
        rows = min(num_rows, num_tokens)
        prefill = 0 if is_decode or num_tokens <= self._tiles.prefill else self._prefill_bound(rows, num_tokens)
        has_room = prefill > 0 and rows <= _MAX_PREFILL_ROWS  # for every row that one decode tile does not hold
        least = rows if is_decode or has_room else rows + (num_tokens - rows) // self._tiles.decode  # uncut
        if least + prefill > self._max_items:
            raise ValueError(f"{rows} rows of {num_tokens} tokens do not fit {self._max_items} items")
        wanted = self._decode_wanted(rows, is_decode=is_decode or num_rows == num_tokens)
        return LaunchBounds(max(least, min(wanted, self._max_items - prefill)), prefill, num_tokens)

    def _decode_wanted(self, num_rows: int, *, is_decode: bool) -> int:
        """As many as `_first_split` can make, not many more: idle programs cost little, but not nothing."""
        busy = max(1, _RESIDENT_PROGRAMS // self._num_kv_heads)
        if self._fixed_split is not None:  # a context is cut at every multiple or not at all
            wanted = max(3 * busy, num_rows * (4 if is_decode else 2))
        elif self._are_few(num_rows):
            wanted = FEW_PROGRAMS // self._num_kv_heads
        else:
            wanted = busy + num_rows * 3 // 2 if is_decode else max(busy, num_rows)
        if self._max_positions is None:
            return wanted
        return min(wanted, num_rows * (ceil_divide(self._max_positions, self._fixed_split or _MIN_SPLIT) + 1))

    def _are_few(self, num_rows: int) -> bool:
        """Whether a step of so many rows is a launch of few programs."""
        return num_rows * self._num_kv_heads <= _FEW_ROWS

    def _prefill_bound(self, num_rows: int, num_tokens: int) -> int:
        """Tiles of the most rows there is room for, and the parts that `_prefill_splits` makes of few of them."""
        tiles = self._tiles
        num_prefill_rows = min(num_rows, num_tokens // (tiles.decode + 1), _MAX_PREFILL_ROWS)
        most = num_prefill_rows + (num_tokens - num_prefill_rows) // tiles.prefill
        if self._fixed_split is not None:
            return most
        room = _MOST_WALKED if tiles.walkers else _TARGET_PREFILL_PROGRAMS
        return min(_MAX_PREFILL_PARTS * most, most + ceil_divide(room, self._num_kv_heads))

    def prefill_rows(self, lengths: Int64Array, max_prefill: int) -> npt.NDArray[np.bool_]:
        """Which rows get prefill tiles: those that a decode tile does not hold, the longest where room is scarce."""
        longest = int(lengths.max())
        decode_up_to = self._tiles.decode if max_prefill else longest
        is_prefill = lengths > decode_up_to
        while int(ceil_divide(lengths[is_prefill], self._tiles.prefill).sum()) > max_prefill:
            decode_up_to *= 2
            is_prefill = lengths > decode_up_to
        return is_prefill

    def _cut_freely(self, tiles: TileRanges, bounds: LaunchBounds) -> Cut | None:
        """Parts of one length that keep the device busy. Where they do not fit, prefill tiles are left whole and
        decode tiles cut into longer parts, each where it is the one in the way."""
        num_own = int((tiles.own if tiles.is_prefill is None else tiles.own[~tiles.is_prefill]).sum())
        if tiles.num_shared:
            num_own -= int(tiles.own[: tiles.num_shared].sum())
        split = self._first_split(num_own, bounds.decode)
        if tiles.is_prefill is None and self._are_few(len(tiles.ends)):
            split = _least_split(tiles.own, split, bounds.decode)
        prefill_splits = None if tiles.is_prefill is None else self._prefill_splits(tiles.own, tiles.is_prefill)
        while True:
            cut = self._cut(tiles, split, prefill_splits)
            has_room = cut.num_partials <= self._max_partials and cut.num_decode + cut.num_prefill <= self._max_items
            if has_room and cut.num_decode <= bounds.decode and cut.num_prefill <= bounds.prefill:
                return cut
            is_whole = split >= int(tiles.ends.max())
            if is_whole and prefill_splits is None:
                return None
            if is_whole or not has_room or cut.num_prefill > bounds.prefill:
                prefill_splits = None
            if not is_whole and (not has_room or cut.num_decode > bounds.decode):
                split = _longer(split, num_own // bounds.decode)

    def _cut_at_multiples(self, tiles: TileRanges, bounds: LaunchBounds) -> Cut | None:
        """Contexts of one-token tiles are cut at every multiple of the split, or stay whole: the shorter ones first
        where room is scarce."""
        assert self._fixed_split is not None
        whole_up_to = 1  # parts
        while True:
            cut = self._cut(tiles, self._fixed_split, None, whole_up_to)
            has_room = cut.num_partials <= self._max_partials and cut.num_decode + cut.num_prefill <= self._max_items
            if has_room and cut.num_decode <= bounds.decode and cut.num_prefill <= bounds.prefill:
                return cut
            if whole_up_to * self._fixed_split >= int(tiles.ends.max()):
                return None
            whole_up_to *= 2

    def _cut(self, tiles: TileRanges, split: int, prefill_splits: Int64Array | None, whole_up_to: int = 1) -> Cut:
        """`prefill_splits` None leaves prefill tiles whole; `whole_up_to` is that of `_cut_at_multiples`."""
        splits: Int64Array | int = split
        if tiles.is_prefill is not None:
            splits = np.where(tiles.is_prefill, tiles.own if prefill_splits is None else prefill_splits, split)
        parts, num_shared = ceil_divide(tiles.own, splits), tiles.num_shared
        before = 0 if tiles.before is None else ceil_divide(tiles.before, split)
        has_one_token = tiles.num_tokens == len(tiles.ends)
        if self._fixed_split is not None and (whole_up_to > 1 or not has_one_token):
            rows = parts[num_shared:]
            rows[(tiles.num_q > 1) | ((rows <= whole_up_to) & (before == 0))] = 1
            splits = np.where(parts == 1, tiles.own, splits)
        totals = parts[num_shared:] + before if num_shared else parts
        token_parts = totals if has_one_token else totals.repeat(tiles.num_q)
        partial_ends = (token_parts * (token_parts > 1)).cumsum()
        num_prefill = 0 if tiles.is_prefill is None else int(parts[tiles.is_prefill].sum())
        return Cut(split, splits, parts, before, token_parts, partial_ends, int(parts.sum()) - num_prefill, num_prefill)

    def _prefill_splits(self, own: Int64Array, is_prefill: npt.NDArray[np.bool_]) -> Int64Array:
        """Per tile: long prompts are cut only where there are too few tiles to fill the device."""
        if self._tiles.walkers:
            return _parts_of(own, self._even_parts(own[is_prefill]))
        num_programs = int(np.count_nonzero(is_prefill)) * self._num_kv_heads
        return _parts_of(own, min(_MAX_PREFILL_PARTS, ceil_divide(_TARGET_PREFILL_PROGRAMS, num_programs)))

    def _even_parts(self, own: Int64Array) -> int:
        """The fewest parts of these tiles with which all walkers are busy to the end; else the best there are."""
        most = min(_MAX_PREFILL_PARTS, 1 + _MOST_WALKED // (len(own) * self._num_kv_heads))
        best, least = 1, self._longest_walk(own, 1)
        even = int((own + _ITEM_COST).sum()) * self._num_kv_heads / self._tiles.walkers
        for num_parts in range(2, most + 1):
            if least <= 1.04 * even:
                break
            longest = self._longest_walk(own, num_parts)
            if longest < 0.98 * least:
                best, least = num_parts, longest
        return best

    def _longest_walk(self, own: Int64Array, num_parts: int) -> int:
        """Positions of the walker that has most, with what each item costs."""
        splits = _parts_of(own, num_parts)
        whole, rest = own // splits, own % splits
        sizes = np.concatenate((splits.repeat(whole), rest[rest > 0]))
        sizes += _ITEM_COST + _PART_COST * (num_parts > 1)
        walkers, kv = self._tiles.walkers, self._num_kv_heads
        walks = np.zeros(ceil_divide(len(sizes) * kv, walkers) * walkers, np.int64)
        walks[: len(sizes) * kv] = np.sort(sizes)[::-1].repeat(kv)
        rounds = walks.reshape(-1, walkers)
        rounds[1::2] = rounds[1::2, ::-1]
        return int(rounds.sum(0).max())

    def _first_split(self, num_positions: int, bound: int) -> int:
        """More than an equal share of the programs that run at once: so no part of full length waits for a place, and
        what is left of the rows fills the gaps."""
        num_shares = max(1, min(_RESIDENT_PROGRAMS // self._num_kv_heads, bound))
        return (num_positions // num_shares // _MIN_SPLIT + 1) * _MIN_SPLIT


def _parts_of(own: Int64Array, num_parts: int) -> Int64Array:
    """Sizes of about so many parts of each tile, which begin at whole pages of any size."""
    return np.maximum(ceil_divide(ceil_divide(own, num_parts), _MIN_SPLIT) * _MIN_SPLIT, _MIN_PREFILL_SPLIT)


def _least_split(own: Int64Array, least: int, max_parts: int) -> int:
    """The least split from `least` on that makes no more than so many parts, or one that leaves all whole: of few long
    parts that run at once the longest decides."""
    if int(ceil_divide(own, least).sum()) <= max_parts:
        return least
    low, high = least // _MIN_SPLIT, max(least, int(own.max())) // _MIN_SPLIT + 1
    while high - low > 1:
        middle = (low + high) // 2
        if int(ceil_divide(own, middle * _MIN_SPLIT).sum()) <= max_parts:
            high = middle
        else:
            low = middle
    return high * _MIN_SPLIT


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
