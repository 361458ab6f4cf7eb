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
class AttentionInputs:
    """One step's rows. Row r holds `row_lengths[r]` packed tokens at absolute positions from `row_starts[r]` on.

    page_table      int32 tensor [slots, columns]; only the rows' slots and the columns of their positions are read
    row_slots, row_starts, row_lengths [R], token_positions, token_slots [T]   int64 arrays
    rope_positions  int64 tensor [T], on the pool's device: what heads are rotated by, wherever their pages are
    """

    page_table: Tensor
    row_slots: Int64Array
    row_starts: Int64Array
    row_lengths: Int64Array
    token_positions: Int64Array
    token_slots: Int64Array
    rope_positions: Tensor


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of every query head and every key head before rotation: weights [D], and what is added to the mean."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


class AttentionStep(Protocol):
    """A step made ready: the same indices serve every layer."""

    def run(self, layer: int, qkv_TX: Tensor, norms: HeadNorms | None) -> Tensor:
        """Norm and rotate the heads of [T, (H + 2 G) * D], store keys and values, attend causally: [T, H * D] in qkv's
        dtype.

        The projection holds a token's H query, G key and G value heads in this order. Storing comes first for all rows,
        so a row may read pages that an earlier row of the same plan writes. What padding tokens get is undefined.
        """


class AttentionBackend(Protocol):
    """Owns nothing but the pool it was built over and scratch memory."""

    def plan(self, inputs: AttentionInputs) -> AttentionStep:
        """Everything that does not depend on the layer."""


@dataclass(frozen=True)
class DeviceTables:
    """What the steps of a device read, at addresses that never change; all int32.

    page_table               [slots, columns]
    positions, table_rows    [max_tokens], of the packed tokens; a table row of -1 is padding
    metadata                 what the backend's `fill` wrote for this step
    """

    page_table: Tensor
    positions: Tensor
    table_rows: Tensor
    metadata: Tensor


@dataclass(frozen=True)
class StepRows:
    """A step's rows as the host knows them: int arrays [R], the groups of its plan, and the host's page table."""

    slots: npt.NDArray[np.integer]
    starts: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.integer]
    prefix_groups: npt.NDArray[np.int32]
    page_table: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Bucket:
    """What a step is padded to: packed tokens, the most rows they belong to, and whether each has one token."""

    num_tokens: int
    num_rows: int
    is_decode: bool


class DeviceAttention(Protocol):
    """A backend whose launches are prepared once per bucket and fed by metadata that travel with each step.

    metadata_size   int32 words of the step buffer that it may fill
    captures        its steps may be captured in a graph
    """

    metadata_size: int
    captures: bool

    def fill(self, metadata: npt.NDArray[np.int32], rows: StepRows, bucket: Bucket) -> int:
        """Prepare the next step; returns how many of the words are in use."""

    def steps(self, tables: DeviceTables, bucket: Bucket) -> list[AttentionStep]:
        """The launches of every step of this size, by KV group."""
