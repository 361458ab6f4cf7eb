"""Log-probabilities on their way from the device: what was enqueued to be copied, and how it reads once it is there.

Owns the layout of a row of results, int32: `num_top` ids, the float32 bits of their log-probabilities, those of
`num_asked` ids, and for prompt scores one more, the prompt token's. Must not know slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.types.plan import PositionLogprobs
from headrace.types.request import Float32Array, Int32Array


@dataclass(frozen=True)
class Columns:
    """Columns of a row of results; rows may use fewer of each kind."""

    num_top: int
    num_asked: int
    num_own: int = 0

    @property
    def first_asked(self) -> int:
        """Where the values of asked ids begin."""
        return 2 * self.num_top

    @property
    def first_own(self) -> int:
        """Where the prompt token's value is."""
        return 2 * self.num_top + self.num_asked

    @property
    def size(self) -> int:
        """Length of a row."""
        return self.first_own + self.num_own


def to_host(results: Tensor) -> Tensor:
    """A copy on the host; from a device it is only enqueued, into pinned memory."""
    host = torch.empty(results.shape, dtype=results.dtype, device="cpu", pin_memory=results.is_cuda)
    return host.copy_(results, non_blocking=True)


@dataclass(frozen=True)
class PendingExtras:
    """Extras of some rows of a step: `host` [S, size] is on its way; `rows`, `num_top` and `num_asked` go together."""

    host: Tensor
    columns: Columns
    rows: npt.NDArray[np.int64]
    num_top: Int32Array
    num_asked: Int32Array

    def finish(self) -> dict[int, PositionLogprobs]:
        """By row, one position each; called once the step has ended on the device."""
        ids: Int32Array = self.host.numpy()[self.rows]  # a copy: pinned memory goes back
        values = ids.view(np.float32)
        top, asked = self.columns.num_top, self.columns.first_asked
        counts = zip(self.rows.tolist(), self.num_top.tolist(), self.num_asked.tolist(), strict=True)
        return {
            row: PositionLogprobs(
                top_ids=ids[at : at + 1, :num_top],
                top_logprobs=values[at : at + 1, top : top + num_top],
                asked_logprobs=values[at : at + 1, asked : asked + num_asked],
            )
            for at, (row, num_top, num_asked) in enumerate(counts)
        }


@dataclass(frozen=True)
class PendingScores:
    """Prompt scores on their way, in parts of [m, size]."""

    parts: list[Tensor]
    columns: Columns

    def finish(self) -> tuple[Float32Array, PositionLogprobs | None]:
        """Float32 [m], and what else was asked for of each position; called once the step has ended on the device."""
        ids: Int32Array = np.concatenate([part.numpy() for part in self.parts])
        values, columns = ids.view(np.float32), self.columns
        own = values[:, columns.first_own].copy()
        if columns.first_own == 0:
            return own, None
        extras = PositionLogprobs(
            top_ids=ids[:, : columns.num_top],
            top_logprobs=values[:, columns.num_top : columns.first_asked],
            asked_logprobs=values[:, columns.first_asked : columns.first_own],
        )
        return own, extras
