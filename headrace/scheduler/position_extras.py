"""Further log-probabilities of consecutive positions: the top ids with their values, and the values of asked ids."""

from __future__ import annotations

import numpy as np

from headrace.types.plan import PositionLogprobs
from headrace.types.request import TokenExtras
from headrace.types.sampling_params import LogprobOptions


class PositionExtras:
    """A row per position, written in any order into arrays that grow; what was never written is 0."""

    def __init__(self, options: LogprobOptions) -> None:
        num_top, num_asked = options.num_top, len(options.token_ids)
        self._top_ids = np.zeros((0, num_top), "<i4")
        self._top_logprobs = np.zeros((0, num_top), "<f4")
        self._asked_logprobs = np.zeros((0, num_asked), "<f4")

    def write(self, position: int, values: PositionLogprobs, first: int, last: int) -> None:
        """Take rows first..last-1 of `values` for the positions from `position` on."""
        end = position + last - first
        if end > len(self._top_ids):
            self._grow(end)
        self._top_ids[position:end] = values.top_ids[first:last]
        self._top_logprobs[position:end] = values.top_logprobs[first:last]
        self._asked_logprobs[position:end] = values.asked_logprobs[first:last]

    def pack(self, first: int, last: int) -> TokenExtras:
        """Positions first..last-1 for a `Delta`."""
        if last > len(self._top_ids):
            self._grow(last)
        arrays = self._top_ids, self._top_logprobs, self._asked_logprobs
        return TokenExtras(*(array[first:last].tobytes() for array in arrays))

    def _grow(self, num_positions: int) -> None:
        num_more = max(num_positions, 2 * len(self._top_ids), 64) - len(self._top_ids)
        self._top_ids, self._top_logprobs, self._asked_logprobs = (
            np.concatenate((array, np.zeros((num_more, array.shape[1]), array.dtype)))
            for array in (self._top_ids, self._top_logprobs, self._asked_logprobs)
        )
