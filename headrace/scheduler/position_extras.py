"""What else was asked of consecutive positions: the top ids with their values, those of asked ids, and kept ids."""

from __future__ import annotations

import msgspec
import numpy as np

from headrace.types.plan import PositionLogprobs
from headrace.types.request import Int32Array, TokenExtras
from headrace.types.sampling_params import LogprobOptions


class PositionExtras:
    """A row per position, written in any order into arrays that grow; what was never written is 0, or no id."""

    def __init__(self, options: LogprobOptions, *, keeps: bool = False) -> None:
        """`keeps`: the ids that could have been drawn are of interest."""
        num_top, num_asked = options.num_top, len(options.token_ids)
        self._top_ids = np.zeros((0, num_top), "<i4")
        self._top_logprobs = np.zeros((0, num_top), "<f4")
        self._asked_logprobs = np.zeros((0, num_asked), "<f4")
        self._kept: dict[int, Int32Array] | None = {} if keeps else None
        self.num_kept = 0

    def write(self, position: int, values: PositionLogprobs, first: int, last: int) -> None:
        """Take rows first..last-1 of `values` for the positions from `position` on."""
        end = position + last - first
        if end > len(self._top_ids):
            self._grow(end)
        self._top_ids[position:end] = values.top_ids[first:last]
        self._top_logprobs[position:end] = values.top_logprobs[first:last]
        self._asked_logprobs[position:end] = values.asked_logprobs[first:last]
        if self._kept is not None:
            for row in range(first, last):
                at, kept = position + row - first, values.kept_between(row, row + 1)
                self.num_kept += len(kept) - len(self._kept.get(at, ()))
                self._kept[at] = kept

    def pack(self, first: int, last: int) -> TokenExtras:
        """Positions first..last-1 for a `Delta`."""
        if last > len(self._top_ids):
            self._grow(last)
        arrays = self._top_ids, self._top_logprobs, self._asked_logprobs
        found = TokenExtras(*(array[first:last].tobytes() for array in arrays))
        return found if self._kept is None else self._with_kept(found, self._kept, first, last)

    @staticmethod
    def _with_kept(found: TokenExtras, kept: dict[int, Int32Array], first: int, last: int) -> TokenExtras:
        nothing = np.empty(0, np.int32)
        rows = [kept.get(position, nothing) for position in range(first, last)]
        counts, ids = np.array([len(row) for row in rows], "<i4"), np.concatenate([nothing, *rows])
        packed: TokenExtras = msgspec.structs.replace(
            found, kept_counts=counts.tobytes(), kept_ids=ids.astype("<i4", copy=False).tobytes()
        )
        return packed

    def _grow(self, num_positions: int) -> None:
        num_more = max(num_positions, 2 * len(self._top_ids), 64) - len(self._top_ids)
        self._top_ids, self._top_logprobs, self._asked_logprobs = (
            np.concatenate((array, np.zeros((num_more, array.shape[1]), array.dtype)))
            for array in (self._top_ids, self._top_logprobs, self._asked_logprobs)
        )
