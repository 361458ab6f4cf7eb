"""Log-probabilities on their way from the device: what was enqueued to be copied, and how it reads once it is there.

Owns the layout of a row of results, int32: `num_top` ids, the float32 bits of their log-probabilities, those of
`num_asked` ids, for prompt scores one more, the prompt token's, and a bit for each token of the vocabulary where it is
of interest which could have been drawn. Must not know slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
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
    num_kept_words: int = 0

    @property
    def first_asked(self) -> int:
        """Where the values of asked ids begin."""
        return 2 * self.num_top

    @property
    def first_own(self) -> int:
        """Where the prompt token's value is."""
        return 2 * self.num_top + self.num_asked

    @property
    def first_kept(self) -> int:
        """Where the bits begin: bit i of word j is of token 32 j + i."""
        return self.first_own + self.num_own

    @property
    def size(self) -> int:
        """Length of a row."""
        return self.first_kept + self.num_kept_words


def to_host(results: Tensor) -> Tensor:
    """A copy on the host; from a device it is only enqueued, into pinned memory."""
    host = torch.empty(results.shape, dtype=results.dtype, device="cpu", pin_memory=results.is_cuda)
    return host.copy_(results, non_blocking=True)


@dataclass(frozen=True)
class PendingExtras:
    """Extras of some rows of a step: `host` [S, size] is on its way; the arrays go together."""

    host: Tensor
    columns: Columns
    rows: npt.NDArray[np.int64]
    num_top: Int32Array
    num_asked: Int32Array
    wants_kept: npt.NDArray[np.bool_]

    def finish(self) -> dict[int, PositionLogprobs]:
        """By row, one position each; called once the step has ended on the device."""
        ids: Int32Array = self.host.numpy()[self.rows]  # a copy: pinned memory goes back
        values = ids.view(np.float32)
        top, asked = self.columns.num_top, self.columns.first_asked
        counts = zip(self.rows.tolist(), self.num_top.tolist(), self.num_asked.tolist(), strict=True)
        found = {
            row: PositionLogprobs(
                top_ids=ids[at : at + 1, :num_top],
                top_logprobs=values[at : at + 1, top : top + num_top],
                asked_logprobs=values[at : at + 1, asked : asked + num_asked],
            )
            for at, (row, num_top, num_asked) in enumerate(counts)
        }
        for at in np.flatnonzero(self.wants_kept).tolist():
            kept = _ids_of_bits(ids[at, self.columns.first_kept : self.columns.size])
            row, counts_kept = int(self.rows[at]), np.array([len(kept)], np.int32)
            found[row] = msgspec.structs.replace(found[row], kept_ids=kept, kept_counts=counts_kept)
        return found


def _ids_of_bits(words: Int32Array) -> Int32Array:
    """The numbers of the bits that are set. Few words have any, so only those are looked into."""
    places = np.flatnonzero(words)
    bits = np.unpackbits(np.ascontiguousarray(words[places]).astype("<i4").view(np.uint8), bitorder="little")
    which, offsets = np.nonzero(bits.reshape(-1, 32))
    return (32 * places[which] + offsets).astype(np.int32)


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
