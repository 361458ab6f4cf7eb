"""The attention of one step as work items. Owns how rows are cut and the layout of the array that carries them.

A work item is a run of packed query tokens against a range of positions of one page-table row. Rows that share leading
pages ("groups") become items of several rows that read those pages once. A token whose context is cut into several
parts gets one partial result per part, and a merge in order of position. Nothing here needs torch or a device: the
planner fills one int32 buffer, which travels in one copy.

Layout of the buffer, int32:

    [0, 8)          header: first and number of the narrow items, first and number of the wide items, number of tokens
    token_slots     [max_tokens]  the token's first slot of partial results
    token_parts     [max_tokens]  how many parts its context is cut into; 1 means the item wrote the output itself
    items           [max_items, 8], narrow ones first, the longest first in each class:
                    first query token, number of query tokens, page-table row, first position, end position,
                    part (-1: the whole context, write the output), position of the first query token, class (1: wide)

A query token at position p sees positions up to p; tokens of an item follow one another in position, except those of a
group, which see all of their item's range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

HEADER_WORDS = 8
ITEM_WORDS = 8
WHOLE = -1

_MIN_SPLIT = 64
_TARGET_WIDE_PROGRAMS = 528  # four per multiprocessor of a large device
_MAX_WIDE_PARTS = 8  # partial results of long prompts are large
_MAX_SPLIT = 512
_TARGET_ITEM_HEADS = 2048  # item x kv-head programs that keep a large device busy
_MIN_SHARED = 64  # shared positions below this do not pay for one more part per row
_MAX_KEY = 32767


@dataclass(frozen=True)
class WorkLimits:
    """Capacities, fixed when buffers are made: packed tokens, items, and slots of partial results."""

    max_tokens: int
    max_items: int
    max_slots: int

    @property
    def num_words(self) -> int:
        """Length of the int32 buffer."""
        return HEADER_WORDS + 2 * self.max_tokens + ITEM_WORDS * self.max_items

    @property
    def slots_at(self) -> int:
        """Where `token_slots` begins."""
        return HEADER_WORDS

    @property
    def parts_at(self) -> int:
        """Where `token_parts` begins."""
        return HEADER_WORDS + self.max_tokens

    @property
    def items_at(self) -> int:
        """Where `items` begins."""
        return HEADER_WORDS + 2 * self.max_tokens


@dataclass(frozen=True)
class TileSizes:
    """Query tokens that an item of each class holds: BLOCK_M // query heads per kv head."""

    narrow: int
    wide: int


@dataclass(frozen=True)
class WorkSummary:
    """What `fill` wrote. `num_words` of the buffer are in use; the rest need not be copied."""

    num_narrow: int
    num_wide: int
    num_slots: int
    num_words: int
    split: int


@dataclass(frozen=True)
class _Tiles:
    """Query tiles in packed order [n]: the tokens, the row they belong to, and the context of the last of them."""

    q_start: Int64Array
    num_q: Int64Array
    row: Int64Array
    end: Int64Array
    position: Int64Array
    is_wide: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Groups:
    """Groups [g] of one-token rows: first row, number of rows, positions shared."""

    first: Int64Array
    num_rows: Int64Array
    shared: Int64Array


class AttentionPlanner:
    """Cuts steps into items. Scratch only; a plan depends on its inputs alone.

    `fixed_split` None: parts are as long as keeps the device busy. A number (a power of two): every context is cut at
    its multiples whatever else runs, and wide tiles are never cut, for the kernel walks the same parts in order; so
    results do not depend on the batch. `num_kv_heads` only guides how fine to cut.
    """

    def __init__(
        self, limits: WorkLimits, tiles: TileSizes, page_size: int, num_kv_heads: int, fixed_split: int | None = None
    ) -> None:
        self.limits = limits
        self._tiles = tiles
        self._page_size = page_size
        self._num_kv_heads = num_kv_heads
        self._fixed_split = fixed_split
        self._arange = np.arange(max(limits.max_items, limits.max_tokens) + 1, dtype=np.int64)

    def fill(
        self,
        buffer: Int32Array,
        table_rows: npt.NDArray[np.integer],
        starts: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        groups: npt.NDArray[np.integer],
        max_items: int | None = None,
    ) -> WorkSummary:
        """Write the items of rows [R] into `buffer` (int32 [limits.num_words]).

        table_rows   page-table row of each row
        starts       absolute position of its first token
        lengths      its tokens, >= 1, packed in row order
        groups       [g, 3]: (first_row, num_rows, num_pages) of adjacent rows that share their leading pages
        max_items    fewer items than the limits allow, where a captured launch holds fewer

        Raises `ValueError` if even uncut rows do not fit.
        """
        first_positions: Int64Array = starts.astype(np.int64)
        row_lengths: Int64Array = lengths.astype(np.int64)
        num_tokens = int(row_lengths.sum())
        if num_tokens > self.limits.max_tokens:
            raise ValueError(f"{num_tokens} tokens do not fit {self.limits.max_tokens}")
        tiles = self._query_tiles(first_positions, row_lengths)
        kept = self._usable_groups(groups, first_positions, row_lengths)
        shared = np.zeros(len(first_positions), np.int64)
        if kept is not None:
            shared[_expand(kept.first, kept.num_rows, self._arange)] = np.repeat(kept.shared, kept.num_rows)
        bound = min(max_items or self.limits.max_items, self.limits.max_items)
        split, splits, parts_shared, parts = self._parts(tiles, shared[tiles.row], kept, bound)
        items = self._write_items(buffer, tiles, table_rows, shared, parts_shared, parts, splits, split, kept)
        num_slots = self._write_tokens(buffer, tiles, parts_shared + parts, num_tokens)
        num_wide = int(np.count_nonzero(items[:, 7]))
        return self._write_header(buffer, len(items), num_wide, num_slots, num_tokens, split)

    def _query_tiles(self, starts: Int64Array, lengths: Int64Array) -> _Tiles:
        num_rows = len(starts)
        rows = self._arange[:num_rows]
        if len(lengths) == 0 or int(lengths.max()) == 1:
            return _Tiles(rows, lengths, rows, starts + 1, starts, np.zeros(num_rows, np.bool_))
        firsts = np.cumsum(lengths) - lengths
        is_wide = lengths > self._tiles.narrow
        per_tile = np.where(is_wide, self._tiles.wide, self._tiles.narrow)
        counts = -(-lengths // per_tile)
        row = np.repeat(rows, counts)
        at = _within(counts) * per_tile[row]
        num_q = np.minimum(per_tile[row], lengths[row] - at)
        position = starts[row] + at
        return _Tiles(firsts[row] + at, num_q, row, position + num_q, position, is_wide[row])

    def _usable_groups(
        self, groups: npt.NDArray[np.integer], starts: Int64Array, lengths: Int64Array
    ) -> _Groups | None:
        """Groups of two or more one-token rows that share enough positions; cut at the fixed split if there is one."""
        if len(groups) == 0:
            return None
        first, num_rows = groups[:, 0].astype(np.int64), groups[:, 1].astype(np.int64)
        members = _expand(first, num_rows, self._arange)
        heads = np.cumsum(num_rows) - num_rows
        shortest = np.minimum.reduceat(starts[members], heads)
        shared = np.minimum(groups[:, 2].astype(np.int64) * self._page_size, shortest)
        unit = self._fixed_split or self._page_size
        shared -= shared % unit
        keep = (shared >= _MIN_SHARED) & (num_rows > 1) & (np.maximum.reduceat(lengths[members], heads) == 1)
        return _Groups(first[keep], num_rows[keep], shared[keep]) if keep.any() else None

    def _parts(
        self, tiles: _Tiles, shared: Int64Array, groups: _Groups | None, bound: int
    ) -> tuple[int, Int64Array, Int64Array, Int64Array]:
        """The split of decode rows, and per tile its own split, the parts of its shared range and of its own range."""
        own = tiles.end - shared
        num_group_tiles = 0 if groups is None else -(-groups.num_rows // self._tiles.narrow)
        has_wide = bool(tiles.is_wide.any())
        split = self._fixed_split or self._first_split(int(own[~tiles.is_wide].sum() if has_wide else own.sum()), bound)
        longest = int(tiles.end.max(initial=1))
        wide_splits = self._wide_splits(tiles) if has_wide else own
        while True:
            splits = np.where(tiles.is_wide, wide_splits, split) if has_wide else np.full(len(own), split)
            parts_shared, parts = -(-shared // split), -(-own // splits)
            if self._fixed_split is not None:
                parts = self._uncut(parts, parts_shared, tiles, bound)
            num_items = int(parts.sum())
            if groups is not None:
                num_items += int((-(-groups.shared // split) * num_group_tiles).sum())
            totals = parts + parts_shared
            num_slots = int((totals[totals > 1] * tiles.num_q[totals > 1]).sum())
            if num_items <= bound and num_slots <= self.limits.max_slots:
                return split, splits, parts_shared, parts
            if self._fixed_split is not None or split >= longest:
                raise ValueError(
                    f"{num_items} items and {num_slots} slots do not fit {bound} and {self.limits.max_slots}"
                )
            split, wide_splits = 2 * split, tiles.end

    def _wide_splits(self, tiles: _Tiles) -> Int64Array:
        """Per tile: long prompts are cut only where there are too few tiles to fill the device."""
        if self._fixed_split is not None:
            return np.full(len(tiles.end), self._fixed_split)
        num_programs = max(1, int(np.count_nonzero(tiles.is_wide))) * self._num_kv_heads
        num_parts = min(_MAX_WIDE_PARTS, -(-_TARGET_WIDE_PROGRAMS // num_programs))
        return np.maximum(-(-tiles.end // num_parts), _MAX_SPLIT)

    def _first_split(self, num_positions: int, bound: int) -> int:
        wanted = num_positions * self._num_kv_heads // min(_TARGET_ITEM_HEADS, bound * self._num_kv_heads)
        split = _MIN_SPLIT
        while split < wanted and split < _MAX_SPLIT:
            split *= 2
        return split

    def _uncut(self, parts: Int64Array, parts_shared: Int64Array, tiles: _Tiles, bound: int) -> Int64Array:
        """With a fixed split: tiles of several tokens stay whole, and so do short contexts where items are scarce."""
        parts = np.where(tiles.num_q > 1, 1, parts)
        whole_up_to = 1
        is_free = parts_shared == 0
        while int(parts.sum()) > bound and whole_up_to < _MAX_KEY:
            whole_up_to *= 2
            parts = np.where(is_free & (parts <= whole_up_to), 1, parts)
        return parts

    def _write_items(
        self,
        buffer: Int32Array,
        tiles: _Tiles,
        table_rows: npt.NDArray[np.integer],
        shared: Int64Array,
        parts_shared: Int64Array,
        parts: Int64Array,
        splits: Int64Array,
        split: int,
        groups: _Groups | None,
    ) -> Int32Array:
        """Every item, sorted: narrow before wide, longest first."""
        tile = np.repeat(self._arange[: len(parts)], parts)
        within = _within(parts)
        row = tiles.row[tile]
        tile_split, end = splits[tile], tiles.end[tile]
        first = shared[row] + within * tile_split
        found = np.empty((len(tile), ITEM_WORDS), np.int32)
        found[:, 0], found[:, 1], found[:, 2] = tiles.q_start[tile], tiles.num_q[tile], table_rows[row]
        found[:, 3] = first
        found[:, 4] = np.where(parts[tile] > 1, np.minimum(first + tile_split, end), end)
        total = parts_shared + parts
        found[:, 5] = np.where(total[tile] > 1, parts_shared[tile] + within, WHOLE)
        found[:, 6], found[:, 7] = tiles.position[tile], tiles.is_wide[tile]
        if groups is not None:
            row_tokens = tiles.q_start[np.searchsorted(tiles.row, groups.first)]
            found = np.concatenate((self._group_items(groups, row_tokens, table_rows, split), found))
        key = np.minimum(found[:, 4] - found[:, 3], _MAX_KEY).astype(np.int16)
        np.negative(key, out=key)
        order = np.argsort(key, kind="stable")
        if tiles.is_wide.any():
            order = order[np.argsort(found[order, 7] != 0, kind="stable")]
        at = self.limits.items_at
        items = buffer[at : at + ITEM_WORDS * len(found)].reshape(-1, ITEM_WORDS)
        np.take(found, order, axis=0, out=items)
        return items

    def _group_items(
        self, groups: _Groups, row_tokens: Int64Array, table_rows: npt.NDArray[np.integer], split: int
    ) -> Int32Array:
        width = self._tiles.narrow
        num_parts = -(-groups.shared // split)
        per_group = -(-groups.num_rows // width) * num_parts
        group = np.repeat(self._arange[: len(per_group)], per_group)
        tile, part = np.divmod(_within(per_group), num_parts[group])
        found = np.zeros((len(group), ITEM_WORDS), np.int32)
        found[:, 0] = row_tokens[group] + tile * width
        found[:, 1] = np.minimum(width, groups.num_rows[group] - tile * width)
        found[:, 2] = table_rows[groups.first[group]]
        found[:, 3] = part * split
        found[:, 4] = np.minimum(found[:, 3] + split, groups.shared[group])
        found[:, 5] = part
        found[:, 6] = groups.shared[group]  # past the range: its tokens see all of it
        return found

    def _write_tokens(self, buffer: Int32Array, tiles: _Tiles, parts: Int64Array, num_tokens: int) -> int:
        token_parts = parts if num_tokens == len(parts) else np.repeat(parts, tiles.num_q)
        slots = np.where(token_parts > 1, token_parts, 0)
        ends = np.cumsum(slots)
        limits = self.limits
        np.subtract(ends, slots, out=buffer[limits.slots_at : limits.slots_at + num_tokens], casting="unsafe")
        buffer[limits.parts_at : limits.parts_at + num_tokens] = token_parts
        buffer[limits.parts_at + num_tokens : limits.items_at] = 0
        return int(ends[-1]) if num_tokens else 0

    def _write_header(
        self, buffer: Int32Array, num_items: int, num_wide: int, num_slots: int, num_tokens: int, split: int
    ) -> WorkSummary:
        num_narrow = num_items - num_wide
        buffer[:HEADER_WORDS] = (0, num_narrow, num_narrow, num_wide, num_tokens, 0, 0, 0)
        num_words = self.limits.items_at + ITEM_WORDS * num_items
        return WorkSummary(num_narrow, num_wide, num_slots, num_words, split)


def _within(counts: Int64Array) -> Int64Array:
    """0..count-1 for each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


def _expand(first: Int64Array, counts: Int64Array, arange: Int64Array) -> Int64Array:
    """first, first + 1, ... for each count, one after the other."""
    if len(first) == 0:
        return arange[:0]
    return np.repeat(first, counts) + _within(counts)
