"""What travels to the device for one step: one int32 array, laid out once, copied once per step.

Owns the layout, the host's pinned copies (a ring: one may still be read while the next step is packed) and the device's
copy, at one address for ever, so that captured graphs read each step's values. Must not know models or sampling.

Sections, each aligned to 64 words: the number of page cells; token ids, table rows and positions of the packed tokens;
the packed token, slot and position of each sampled row; page cells; slot records; and last the attention backend's
metadata, of which only what is in use travels. Padding tokens and rows have table row and slot -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from headrace.types.request import Int32Array

_ALIGN = 64
_Array = TypeVar("_Array")


@dataclass(frozen=True)
class StepSizes:
    """Capacities of a step: packed tokens, rows, page cells; lengths of a slot record and of the attention metadata."""

    max_tokens: int
    max_rows: int
    max_cells: int
    record_size: int
    metadata_size: int

    def sections(self) -> tuple[int, ...]:
        """Words of each section, in the order of the array."""
        tokens, rows = 3 * (self.max_tokens,), 3 * (self.max_rows,)
        return 1, *tokens, *rows, 3 * self.max_cells, self.record_size * self.max_rows, self.metadata_size

    @property
    def num_words(self) -> int:
        """Length of the array."""
        return sum(-(-words // _ALIGN) * _ALIGN for words in self.sections())


class StepViews(Generic[_Array]):
    """The sections of one array of `sizes.num_words` int32, on the host or on the device."""

    cell_count: _Array
    token_ids: _Array
    table_rows: _Array
    positions: _Array
    sampled_tokens: _Array
    sampled_slots: _Array
    sampled_positions: _Array
    cells: _Array
    records: _Array
    metadata: _Array

    def __init__(self, sizes: StepSizes, whole: Any) -> None:
        parts: list[Any] = []
        starts: list[int] = []
        at = 0
        for words in sizes.sections():
            parts.append(whole[at : at + words])
            starts.append(at)
            at += -(-words // _ALIGN) * _ALIGN
        self.metadata_at = starts[-1]
        self.cell_count, self.token_ids, self.table_rows, self.positions, *rest = parts
        self.sampled_tokens, self.sampled_slots, self.sampled_positions, cells, records, self.metadata = rest
        self.cells = cells.reshape(-1, 3)
        self.records = records.reshape(-1, sizes.record_size)


class HostStep:
    """One pinned copy: what a step sends, and where its tokens and log-probabilities arrive.

    `results` is int32 [2, max_rows]: token ids, and the bits of the float32 log-probabilities.
    """

    def __init__(self, sizes: StepSizes, *, pinned: bool) -> None:
        self._words = torch.zeros(sizes.num_words, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._results = torch.zeros(2, sizes.max_rows, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.views: StepViews[Int32Array] = StepViews(sizes, self._words.numpy())
        self.token_ids: Int32Array = self._results.numpy()[0]
        self.logprobs = self._results.numpy()[1].view(np.float32)
        self.is_free = True

    def send(self, device_words: Tensor, metadata_size: int) -> None:
        """Enqueue the copy of everything up to the attention metadata in use."""
        num_words = self.views.metadata_at + metadata_size
        device_words[:num_words].copy_(self._words[:num_words], non_blocking=True)

    def receive(self, device_results: Tensor) -> None:
        """Enqueue the copy of the results."""
        self._results.copy_(device_results, non_blocking=True)


class StepBuffer:
    """The device's copy and `num_copies` of the host, handed out in turn."""

    def __init__(self, sizes: StepSizes, device: torch.device, num_copies: int) -> None:
        self.sizes = sizes
        self.words = torch.zeros(sizes.num_words, dtype=torch.int32, device=device)
        self.results = torch.zeros(2, sizes.max_rows, dtype=torch.int32, device=device)
        self.views: StepViews[Tensor] = StepViews(sizes, self.words)
        self.token_ids, self.logprobs = self.results[0], self.results[1].view(torch.float32)
        self.views.table_rows.fill_(-1)
        self.views.sampled_slots.fill_(-1)
        self._ring = [HostStep(sizes, pinned=device.type == "cuda") for _ in range(num_copies)]
        self._next = 0

    def take(self) -> HostStep:
        """The next host copy; it is free again when its step has been collected."""
        step = self._ring[self._next]
        assert step.is_free, "more steps in flight than the ring holds"
        self._next = (self._next + 1) % len(self._ring)
        step.is_free = False
        return step
