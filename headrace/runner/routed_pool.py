"""Which experts computed tokens were given to, kept cell by cell beside the KV pool, so that whoever finds a prefix
computed finds them, too. Owns that memory, and how far each slot's sequence has been told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from headrace.attention.base import AttentionInputs, Int64Array
from headrace.config.layer_spec import ExpertsSpec, LayerSpec
from headrace.types.plan import RoutedRow, SlotInit

_NOBODY = -1


class RoutedPool:
    """int16 [pages * page_size, layers, experts per token], in host memory that is taken as it is written."""

    def __init__(self, layers: Sequence[LayerSpec], num_pages: int, page_size: int, num_slots: int) -> None:
        experts = {number: each.mlp for number, each in enumerate(layers) if isinstance(each.mlp, ExpertsSpec)}
        self._layers = list(experts)
        num_per_token = max(each.num_per_token for each in experts.values())
        self._cells = np.zeros((num_pages * page_size, len(layers), num_per_token), np.int16)
        self._page_size = page_size
        self._next = np.full(num_slots, _NOBODY, np.int64)  # the position from which on a slot's sequence is to be told

    def enter(self, inits: Sequence[SlotInit]) -> None:
        """Sequences take slots."""
        for init in inits:
            start = init.logprobs.routed_start
            self._next[init.slot] = _NOBODY if start is None else start

    def keep(self, inputs: AttentionInputs, routed: Sequence[Tensor]) -> dict[int, RoutedRow]:
        """Keep what layers listed of one step, and tell the rows that asked all that they have not been told."""
        pages: Int64Array = inputs.page_table.numpy()
        found = np.zeros((len(inputs.token_slots), *self._cells.shape[1:]), np.int16)
        for layer, experts_TK in zip(self._layers, routed, strict=True):
            found[:, layer] = experts_TK.cpu().numpy()
        self._cells[self._cells_of(pages, inputs.token_slots, inputs.token_positions)] = found
        told: dict[int, RoutedRow] = {}
        ends = inputs.row_starts + inputs.row_lengths
        for row in np.flatnonzero((self._next >= 0)[inputs.row_slots]).tolist():
            slot, end = int(inputs.row_slots[row]), int(ends[row])
            first = int(self._next[slot])
            positions = np.arange(first, end)  # none, where only what lies before them was computed
            told[row] = RoutedRow(first, self._cells[self._cells_of(pages, np.full_like(positions, slot), positions)])
            self._next[slot] = max(first, end)
        return told

    def _cells_of(self, pages: Int64Array, slots: Int64Array, positions: Int64Array) -> Int64Array:
        columns, offsets = np.divmod(positions, self._page_size)
        cells: Int64Array = pages[slots, columns].astype(np.int64) * self._page_size + offsets
        return cells
