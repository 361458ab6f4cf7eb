"""The attention metadata of one step: its work items. Owns their making and the layout of the array that carries them.

A work item is a run of packed query tokens against a range of positions of one page-table row. Rows that share leading
pages ("groups") become items of several rows that read those pages once. A token whose context is cut into several
parts gets one partial result per part, and a merge in order of position. Nothing here needs torch or a device: the
planner fills one int32 buffer, which travels in one copy.

Layout of the buffer, int32:

    header          [8]  first and number of the decode items, first and number of the prefill items, number of tokens
    first_partials  [max_tokens]  index of the token's first partial result
    token_parts     [max_tokens]  how many parts its context is cut into; 1 means the item wrote the output itself
    items           [max_items, 8], decode items first, the longest first in each class:
                    first query token, number of query tokens, page-table row, first position, end position,
                    part (-1: the whole context, write the output), position of the first query token, class

An item belongs to one of two classes of tiles, whose kernels differ in size: DECODE tiles hold a few query tokens (a
decode row, rows of a group, the end of a prompt), PREFILL tiles many of one row.

A query token at position p sees positions up to p; tokens of an item follow one another in position, except those of a
group, which see all of their item's range.

A launch holds `LaunchBounds`: programs for so many items of each class, and a merge of so many leading tokens. Programs
beyond the header's numbers leave at once, and tokens without parts are not merged, so a launch made for a size serves
every step of it: `bounds` says how many it takes, and `fill` with these bounds keeps within them. How fine to cut, and
what gives way where room is scarce, is in `work_cuts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.kernels.triton.work_cuts import (
    LONGEST,
    Cut,
    CutRules,
    Int64Array,
    LaunchBounds,
    TileRanges,
    TileSizes,
    ceil_divide,
)
from headrace.types.request import Int32Array

__all__ = ["DECODE", "ITEM_SIZE", "PREFILL", "WHOLE", "AttentionPlanner", "LaunchBounds", "TileSizes", "WorkLimits"]

DECODE, PREFILL = 0, 1
ITEM_SIZE = 8
WHOLE = -1
_Q_START, _NUM_Q, _TABLE_ROW, _FIRST, _END, _PART, _POSITION, _CLASS = range(ITEM_SIZE)

_HEADER_SIZE = 8
_LEAST_ITEMS = 8192
_MAX_PARTIALS = 16384
_MIN_SHARED = 64  # shared positions below this do not pay for one more part per row


@dataclass(frozen=True)
class WorkLimits:
    """Capacities, fixed when buffers are made: packed tokens, items, and partial results."""

    max_tokens: int
    max_items: int
    max_partials: int

    @classmethod
    def of_steps(cls, max_tokens: int) -> WorkLimits:
        """Room for every step of so many tokens: all of them in tiles of one, uncut, beside prefill tiles, whatever
        the model's heads."""
        return cls(max_tokens, max(_LEAST_ITEMS, 3 * max_tokens), _MAX_PARTIALS)

    @property
    def size(self) -> int:
        """Length of the int32 buffer."""
        return self.items_at + ITEM_SIZE * self.max_items

    @property
    def partials_at(self) -> int:
        """Where `first_partials` begins."""
        return _HEADER_SIZE

    @property
    def parts_at(self) -> int:
        """Where `token_parts` begins."""
        return _HEADER_SIZE + self.max_tokens

    @property
    def items_at(self) -> int:
        """Where `items` begins."""
        return _HEADER_SIZE + 2 * self.max_tokens


@dataclass(frozen=True)
class WorkSummary:
    """What `fill` wrote. The first `size` of the buffer are in use; the rest need not be copied."""

    num_decode: int
    num_prefill: int
    num_partials: int
    size: int
    split: int


class _Tiles(NamedTuple):
    """Query tiles [n]: tokens, page-table row, end of their context, position of the first token."""

    q_start: Int64Array
    num_q: Int64Array
    table_row: npt.NDArray[np.integer]
    end: Int64Array
    position: Int64Array
    is_prefill: npt.NDArray[np.bool_] | None = None


class _Groups(NamedTuple):
    """Groups [g] of one-token rows: first row, number of rows, positions shared."""

    first: Int64Array
    num_rows: Int64Array
    shared: Int64Array


class AttentionPlanner:
    """Cuts steps into items. Scratch only; a plan depends on its inputs alone.

    fixed_split    None: parts are as long as keeps the device busy. A number (a power of two): every context is cut at
                   its multiples whatever else runs, and prefill tiles are never cut, for the kernel walks the same
                   parts in order; so results do not depend on the batch
    num_kv_heads   only guides how fine to cut
    max_positions  longest context, if known: bounds then hold no more than it takes

    A launch that is captured holds a fixed number of programs. `bounds` says how many serve every step of a size, and
    `fill` keeps within them: for rows, groups and contexts of that size, whatever they are, it does not raise. What it
    gives up for that, in this order: prompts with few tokens become decode items where room for others is scarce;
    parts get longer (with a fixed split: contexts stay whole, the shorter ones first); groups are read row by row. With
    a fixed split none of this changes a bit of the results.
    """

    def __init__(
        self,
        limits: WorkLimits,
        tiles: TileSizes,
        page_size: int,
        num_kv_heads: int,
        fixed_split: int | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.limits = limits
        self._tiles = tiles
        self._page_size = page_size
        self._fixed_split = fixed_split
        self._rules = CutRules(tiles, num_kv_heads, fixed_split, max_positions, limits.max_items, limits.max_partials)
        self._no_bounds = LaunchBounds(limits.max_items, limits.max_items, limits.max_tokens)
        self._arange = np.arange(max(limits.max_items, limits.max_tokens) + 1, dtype=np.int64)
        self._zeros = np.zeros(limits.max_tokens, np.int64)
        self._records = np.zeros((limits.max_items, ITEM_SIZE), np.int32)

    def bounds(self, num_rows: int, num_tokens: int, *, is_decode: bool = False) -> LaunchBounds:
        """Room for every step of at most `num_rows` rows and `num_tokens` tokens.

        is_decode   every row has one token: no prefill items, which launches of few tokens do without anyway

        Raises `ValueError` if the limits are too small for such a step.
        """
        if num_tokens > self.limits.max_tokens:
            raise ValueError(f"{num_tokens} tokens do not fit {self.limits.max_tokens}")
        return self._rules.bounds(num_rows, num_tokens, is_decode=is_decode)

    def fill(
        self,
        buffer: Int32Array,
        table_rows: npt.NDArray[np.integer],
        starts: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        groups: npt.NDArray[np.integer],
        bounds: LaunchBounds | None = None,
    ) -> WorkSummary:
        """Write the items of rows [R] into `buffer` (int32 [limits.size]).

        table_rows   page-table row of each row
        starts       absolute position of its first token
        lengths      its tokens, >= 1, packed in row order
        groups       [g, 3]: (first_row, num_rows, num_pages) of adjacent rows that share their leading pages
        bounds       what the launch holds, from `bounds`; None: what the limits allow

        Raises `ValueError` if even uncut rows do not fit, as they do in bounds for their size.
        """
        bounds = bounds or self._no_bounds
        row_starts = starts.astype(np.int64, copy=False)
        row_lengths = lengths.astype(np.int64, copy=False)
        num_tokens = int(row_lengths.sum())
        if num_tokens > bounds.merged:
            raise ValueError(f"{num_tokens} tokens do not fit {bounds.merged}")
        rows = self._row_tiles(table_rows, row_starts, row_lengths, num_tokens, bounds.prefill)
        usable = self._usable_groups(groups, row_starts, row_lengths, num_tokens)
        shared = cut = None
        if usable is not None:
            shared = self._group_tiles(usable, table_rows, row_lengths, num_tokens)
            ranges = _shared_ranges(rows, usable, shared, row_lengths, num_tokens)
            cut = self._rules.cut(ranges, bounds)
        if cut is None:
            shared, ranges = None, TileRanges(rows.end, rows.is_prefill, None, rows.num_q, rows.end, num_tokens)
            cut = self._rules.cut(ranges, bounds)
        if cut is None:
            raise ValueError(f"{len(rows.end)} uncut items do not fit {bounds}")
        self._write_tokens(buffer, cut, bounds.merged)
        return self._write_items(buffer, rows, shared, ranges, cut)

    def _row_tiles(
        self,
        table_rows: npt.NDArray[np.integer],
        starts: Int64Array,
        lengths: Int64Array,
        num_tokens: int,
        max_prefill: int,
    ) -> _Tiles:
        num_rows = len(starts)
        if num_tokens == num_rows:
            return _Tiles(self._arange[:num_rows], lengths, table_rows, starts + 1, starts)
        is_prefill = self._rules.prefill_rows(lengths, max_prefill)
        per_tile = np.where(is_prefill, self._tiles.prefill, self._tiles.decode)
        counts = ceil_divide(lengths, per_tile)
        row = self._arange[:num_rows].repeat(counts)
        at = self._within(counts, row) * per_tile[row]
        num_q = np.minimum(per_tile[row], lengths[row] - at)
        position = starts[row] + at
        q_start = (lengths.cumsum() - lengths)[row] + at
        prefill_tiles = is_prefill[row] if is_prefill.any() else None
        return _Tiles(q_start, num_q, table_rows[row], position + num_q, position, prefill_tiles)

    def _usable_groups(
        self, groups: npt.NDArray[np.integer], starts: Int64Array, lengths: Int64Array, num_tokens: int
    ) -> _Groups | None:
        """Groups of two or more one-token rows that share enough positions; cut at the fixed split if there is one."""
        if len(groups) == 0:
            return None
        first, num_rows = groups[:, 0].astype(np.int64), groups[:, 1].astype(np.int64)
        edges = np.empty(2 * len(groups), np.int64)
        edges[::2], edges[1::2] = first, first + num_rows
        shortest = np.minimum.reduceat(np.append(starts, 0), edges)[::2]
        shared = np.minimum(groups[:, 2] * np.int64(self._page_size), shortest)
        shared -= shared % (self._fixed_split or self._page_size)
        keep = (shared >= _MIN_SHARED) & (num_rows > 1)
        if num_tokens > len(starts):
            keep &= np.maximum.reduceat(np.append(lengths, 0), edges)[::2] == 1
        if keep.all():
            return _Groups(first, num_rows, shared)
        return _Groups(first[keep], num_rows[keep], shared[keep]) if keep.any() else None

    def _group_tiles(
        self, groups: _Groups, table_rows: npt.NDArray[np.integer], lengths: Int64Array, num_tokens: int
    ) -> _Tiles:
        """Tiles of what groups share; their tokens' positions are beyond it, for they see all of it."""
        token = groups.first if num_tokens == len(lengths) else (lengths.cumsum() - lengths)[groups.first]
        table_row, width = table_rows[groups.first], self._tiles.decode
        if int(groups.num_rows.max()) <= width:
            return _Tiles(token, groups.num_rows, table_row, groups.shared, groups.shared)
        counts = ceil_divide(groups.num_rows, width)
        group = self._arange[: len(counts)].repeat(counts)
        at = self._within(counts, group) * width
        end = groups.shared[group]
        return _Tiles(token[group] + at, np.minimum(width, groups.num_rows[group] - at), table_row[group], end, end)

    def _write_tokens(self, buffer: Int32Array, cut: Cut, num_merged: int) -> None:
        limits, parts = self.limits, cut.token_parts
        end = limits.parts_at + len(parts)
        firsts = buffer[limits.partials_at :][: len(parts)]
        np.subtract(cut.partial_ends, parts * (parts > 1), out=firsts, casting="unsafe")
        buffer[limits.parts_at : end] = parts
        buffer[end : limits.parts_at + num_merged] = 0

    def _write_items(
        self, buffer: Int32Array, rows: _Tiles, shared: _Tiles | None, ranges: TileRanges, cut: Cut
    ) -> WorkSummary:
        """The header and every part of every tile as an item, sorted."""
        tile = self._arange[: len(cut.parts)].repeat(cut.parts)
        part = self._within(cut.parts, tile)
        splits = cut.splits[tile] if isinstance(cut.splits, np.ndarray) else cut.splits
        first = part * splits
        size = np.minimum(ranges.own[tile] - first, splits)
        order = _longest_first(size, None if ranges.is_prefill is None else ranges.is_prefill[tile])
        first_part = cut.before - (cut.parts[ranges.num_shared :] + cut.before == 1)  # of one part alone: WHOLE
        if ranges.before is not None:  # rows begin where their groups end, in positions and in parts
            none_before = self._zeros[: ranges.num_shared]
            first += np.concatenate((none_before, ranges.before))[tile]
            first_part = np.concatenate((none_before, first_part))
        self._record(rows, ranges.num_shared)
        if shared is not None:
            self._record(shared, 0)
        items_at, size_in_use = self.limits.items_at, self.limits.items_at + ITEM_SIZE * len(tile)
        items = buffer[items_at:size_in_use].reshape(-1, ITEM_SIZE)
        self._records.take(tile[order], axis=0, out=items, mode="clip")  # "raise" would copy once more
        items[:, _FIRST], items[:, _END] = first[order], (first + size)[order]
        items[:, _PART] = (first_part[tile] + part)[order]
        buffer[:_HEADER_SIZE] = (0, cut.num_decode, cut.num_decode, cut.num_prefill, ranges.num_tokens, 0, 0, 0)
        return WorkSummary(cut.num_decode, cut.num_prefill, cut.num_partials, size_in_use, cut.split)

    def _record(self, tiles: _Tiles, at: int) -> None:
        """What all items of a tile have in common."""
        records = self._records[at : at + len(tiles.end)]
        records[:, _Q_START], records[:, _NUM_Q], records[:, _TABLE_ROW] = tiles.q_start, tiles.num_q, tiles.table_row
        records[:, _POSITION] = tiles.position
        records[:, _CLASS] = DECODE if tiles.is_prefill is None else tiles.is_prefill

    def _within(self, counts: Int64Array, owner: Int64Array) -> Int64Array:
        """0..count-1 for each of the counts, one after the other; `owner` names the count that each place is of."""
        return self._arange[: len(owner)] - (counts.cumsum() - counts)[owner]


def _longest_first(sizes: Int64Array, is_prefill: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.intp]:
    """The order of items: decode before prefill, the longest first, as they came among equals."""
    key = np.minimum(sizes, LONGEST).astype(np.uint16) ^ LONGEST
    if is_prefill is not None:
        key += is_prefill * np.uint16(LONGEST + 1)
    return key.argsort(kind="stable")


def _shared_ranges(rows: _Tiles, groups: _Groups, shared: _Tiles, lengths: Int64Array, num_tokens: int) -> TileRanges:
    """Rows begin where what they share ends."""
    steps = np.zeros(len(lengths) + 1, np.int64)
    steps[groups.first] += groups.shared
    steps[groups.first + groups.num_rows] -= groups.shared
    before = steps[:-1].cumsum()
    if num_tokens > len(lengths):
        before = np.repeat(before, lengths)[rows.q_start]
    is_prefill = rows.is_prefill
    if is_prefill is not None:
        is_prefill = np.concatenate((np.zeros(len(shared.end), np.bool_), is_prefill))
    return TileRanges(
        np.concatenate((shared.end, rows.end - before)), is_prefill, before, rows.num_q, rows.end, num_tokens
    )
