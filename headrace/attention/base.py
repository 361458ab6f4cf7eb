"""What an attention backend is given and what it must do. Must not know scheduling or layers.

Legend: R rows of a plan, T packed tokens, H query heads, G kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one layer. Scores are scaled by 1 / sqrt(head_dim)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """Factor on every score."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class AttentionInputs:
    """One step's rows. Row r holds `row_lengths[r]` packed tokens at absolute positions from `row_starts[r]` on.

    page_table      int32 tensor [slots, columns]; only the rows' slots and the columns of their positions are read
    row_slots, row_starts, row_lengths [R], token_positions, token_slots [T]   int64 arrays
    """

    page_table: Tensor
    row_slots: Int64Array
    row_starts: Int64Array
    row_lengths: Int64Array
    token_positions: Int64Array
    token_slots: Int64Array


class AttentionStep(Protocol):
    """A plan made ready: the same indices serve every layer."""

    def run(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Store all keys and values, then attend causally: [T, H * D] in q's dtype.

        Storing comes first for all rows, so a row may read pages that an earlier row of the same plan writes.
        """
        ...


class AttentionBackend(Protocol):
    """Owns nothing but the pool it was built over and scratch memory."""

    def plan(self, inputs: AttentionInputs) -> AttentionStep:
        """Everything that does not depend on the layer."""
        ...
