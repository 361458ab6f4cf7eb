"""Tokens and log-probabilities from logits that stay on a device, with `headrace.sampling.sampler`'s meaning of both.

Owns the order of launches and their workspaces. Steps of plain and truncated rows are pure launches that may be
captured; rows that want more (logits processors, further log-probabilities) are enqueued eagerly, any mixture at once:

    process      rows that logits processors act on are copied, a bounded number at a time, and drawn from their copies
    thresholds   top-k, top-p and min-p
    sample       one pass over the logits, which also leaves each row's normaliser
    top, asked   further log-probabilities, from what that pass left
    kept         which tokens could have been drawn, by the same thresholds
    count        the tokens just sampled, where penalties act: on the device, as the host does not know them yet

Nothing waits for the device, and after `warm` nothing compiles. Must not know plans. Legend: S rows, V vocabulary,
M prompt positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.config.shares import ALIGNED_COLUMNS, vocabulary_rows
from headrace.kernels.triton.kept_rows import kept_rows, num_words
from headrace.kernels.triton.logits_processors import (
    NO_COPY,
    SKIPPED,
    ProcessedRows,
    count_tokens,
    mask_rows,
    process_rows,
)
from headrace.kernels.triton.sampling_rows import (
    BLOCK,
    SamplingWorkspace,
    VocabularyShare,
    leave_tokens,
    reduce_rows,
    sample_rows,
    walk_rows,
)
from headrace.kernels.triton.slot_params import NUM_ASKED, NUM_TOP, RECORD_SIZE, TEMPERATURE, write_records
from headrace.kernels.triton.threshold_search import find_thresholds, threshold_scratch
from headrace.kernels.triton.top_rows import LIST_SIZES, SampledRows, asked_rows, top_rows
from headrace.sampling.device_results import Columns, PendingExtras, PendingScores, to_host
from headrace.sampling.device_slots import DeviceSlots, slot_params
from headrace.types.plan import SamplePatch, SlotInit
from headrace.types.sampling_params import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS

__all__ = ["RECORD_SIZE", "DeviceSampler", "PendingExtras", "PendingScores"]

Integers = npt.NDArray[np.integer]
SamplingPath = Literal["plain", "truncated", "eager"]

_COPIED_ELEMENTS = 1 << 25
"""Logits copied at once for rows that are processed."""


class DeviceSampler:
    """Samples from logits of `vocab_size` tokens for sequences in slots 0..max_slots-1, up to `max_rows` at once.

    slot_params   float32 [max_slots, NUM_PARAMS] and slot_seeds int32 [max_slots, 2], written by `write_slots`
    last_tokens   int32 [max_slots], the token each slot sampled last

    All memory is allocated here, but for what carries results of single steps to the host.
    """

    def __init__(self, vocab_size: int, max_slots: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._slots = DeviceSlots(vocab_size, max_slots, device)
        self.slot_params = self._slots.params
        self.slot_seeds = self._slots.seeds
        self.last_tokens = self._slots.last_tokens
        self._workspace = SamplingWorkspace.make(max_rows, vocab_size, device)
        self._scratch = threshold_scratch(max_rows, device)
        self._thresholds = torch.empty(max_rows, dtype=torch.float32, device=device)
        num_copies = min(max_rows, max(1, _COPIED_ELEMENTS // vocab_size))
        self._copies = torch.empty(num_copies, vocab_size, dtype=torch.float32, device=device)
        most = Columns(min(MAX_TOP_LOGPROBS, vocab_size), MAX_LOGPROB_TOKEN_IDS, 1, num_words(vocab_size))
        self._results = torch.empty(max_rows * most.size, dtype=torch.int32, device=device)
        # Prompt scores: every position reads row 0 of its own parameters, thresholds read row 1.
        self._zeros, self._ones = (torch.full((max_rows,), n, dtype=torch.int32, device=device) for n in (0, 1))
        self._range = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._last = torch.zeros(1, dtype=torch.int32, device=device)
        self._own_tokens = torch.empty(max_rows, dtype=torch.int32, device=device)
        self._own_logprobs = torch.empty(max_rows, dtype=torch.float32, device=device)

    def enter(self, init: SlotInit) -> npt.NDArray[np.int32]:
        """A sequence takes a slot, in place of whatever was there: its record for `write_slots`, int32 [RECORD_SIZE].

        What else the device has to know of it is enqueued on the current stream.
        """
        return self._slots.enter(init)

    def write_slots(self, records: Tensor) -> None:
        """Write int32 records [n, RECORD_SIZE] on the device to the slots' tables; one with slot -1 is skipped."""
        write_records(records, self.slot_params, self.slot_seeds)

    def path(self, slots: Integers, positions: Integers) -> SamplingPath:
        """How rows of these slots are to be sampled at these positions: the least that does for all of them.

        plain       `sample` with truncated=False: only temperatures act
        truncated   `sample` with truncated=True: top-k, top-p or min-p act
        eager       `sample_eager`
        """
        if self._slots.want_extras(slots).any() or self._slots.are_processed(slots, positions).any():
            return "eager"
        return "truncated" if self._slots.is_truncated[slots].any() else "plain"

    def sample(
        self,
        logits_SV: Tensor,
        slots_S: Tensor,
        positions_S: Tensor,
        tokens_S: Tensor,
        logprobs_S: Tensor,
        processed: ProcessedRows | None = None,
        *,
        truncated: bool,
        scored_params: Tensor | None = None,
    ) -> SampledRows:
        """Sample one token per row: thresholds where rows are truncated or processed, then the sampling pass. Pure
        launches on static memory: may be captured.

        logits_SV     float32, contiguous, S <= max_rows; not changed
        slots_S, positions_S   int32; a row whose slot is -1 is skipped; positions are those of the new tokens
        tokens_S, logprobs_S   int32 and float32, written; tokens also go to `last_tokens`
        scored_params   of prompt positions: row 0 is what slot 0 reads, row 1 what thresholds are found with
        """
        num_rows = len(slots_S)
        assert num_rows <= self._max_rows, f"{num_rows} rows, room for {self._max_rows}"
        params, threshold_slots, last = self.slot_params, slots_S, self.last_tokens
        if scored_params is not None:
            params, threshold_slots, last = scored_params, self._ones[:num_rows], self._last
        thresholds = None
        if truncated or processed is not None:
            thresholds = self._thresholds[:num_rows]
            find_thresholds(logits_SV, params, threshold_slots, self._scratch, thresholds, processed)
        sample_rows(
            logits_SV, slots_S, positions_S, params, self.slot_seeds, thresholds, self._workspace, tokens_S,
            logprobs_S, last, processed,
        )  # fmt: skip
        return SampledRows(logits_SV, slots_S, tokens_S, params, thresholds, self._workspace, processed)

    def samples_shares(self, num_ranks: int) -> bool:
        """Whether ranks that share the vocabulary can sample with `walk_share`. Only where whole rows are aligned as
        those of a share are, since a row's bits must not depend on the way."""
        is_aligned = self.vocab_size % ALIGNED_COLUMNS == 0
        return is_aligned and vocabulary_rows(self.vocab_size, num_ranks) % BLOCK == 0

    def walk_share(self, logits_SW: Tensor, rank: int, slots_S: Tensor, positions_S: Tensor) -> Tensor:
        """What `sample_shares` needs of this rank's columns of a step's logits, float32 and contiguous, for rows on
        which only temperatures act. Every rank has as many whole blocks of columns; the last one's may end with
        padding. Stays until the next step is sampled."""
        num_rows, width = logits_SW.shape
        share = VocabularyShare(rank * width, min(width, self.vocab_size - rank * width))
        partial_SBW = self._workspace.room(num_rows, width)
        walk_rows(logits_SW, share, slots_S, positions_S, self.slot_params, self.slot_seeds, None, partial_SBW)
        return partial_SBW

    def sample_shares(self, partial_NSBW: Tensor, slots_S: Tensor, tokens_S: Tensor, logprobs_S: Tensor) -> None:
        """As `sample`, of what `walk_share` left on each rank."""
        norms_R2 = self._workspace.norms_R2
        reduce_rows(partial_NSBW, slots_S, self.slot_params, norms_R2, tokens_S, logprobs_S, self.last_tokens)

    def leave_tokens(self, tokens_S: Tensor, slots_S: Tensor) -> None:
        """What was sampled elsewhere is what these slots sampled last, but for slots of -1."""
        leave_tokens(tokens_S, slots_S, self.last_tokens)

    def sample_eager(
        self,
        logits_SV: Tensor,
        slots_S: Tensor,
        positions_S: Tensor,
        tokens_S: Tensor,
        logprobs_S: Tensor,
        slots: Integers,
        positions: Integers,
        *,
        patch: SamplePatch | None = None,
    ) -> PendingExtras | None:
        """As `sample` for any mixture of rows, eagerly; also what log-probabilities they asked for beside their own.

        `slots` and `positions` are the host's copy of the first rows; tensors may be longer, padded with slot -1.
        """
        columns = self._columns_of(slots)
        is_processed = self._slots.are_processed(slots, positions)
        masks = None
        if patch is not None:
            masks = self._slots.upload(patch.rows), self._slots.upload(patch.masks)
            self._slots.clear_processors(slots[patch.rows])
            is_processed[patch.rows] = True
        truncated = bool(self._slots.is_truncated[slots].any())
        rounds = self._rounds(is_processed, len(slots_S)) if is_processed.any() else iter((None,))
        for processed in rounds:
            if processed is not None:
                process_rows(logits_SV, processed, slots_S, positions_S, self._slots.processors, self._slots.counts)
                if masks is not None:
                    mask_rows(processed, *masks)
            rows = self.sample(logits_SV, slots_S, positions_S, tokens_S, logprobs_S, processed, truncated=truncated)
            self._read(rows, self._slots.asked_ids, columns)
            if processed is not None:
                count_tokens(tokens_S, slots_S, processed, self._slots.processors, self._slots.counts)
        return self._pending_extras(slots, columns)

    def score(self, logits_MV: Tensor, targets_M: Tensor, slot: int) -> PendingScores:
        """Log-probabilities of prompt tokens in the slot's prompt mode, and what else the slot asked for.

        logits_MV   float32 [m, V], contiguous, m >= 1; row i predicts targets_M[i] (int32 or int64, on the device)

        In mode "sampled" the distribution is the one the sampler would draw from, but for penalties and the mask of
        stop ids, which depend on the output.
        """
        sampling, options = self._slots.request_of(slot)
        params = slot_params(sampling, options, options.prompt_mode, self.vocab_size)
        columns = Columns(int(params[NUM_TOP]), int(params[NUM_ASKED]), num_own=1)
        both = np.stack((params, params))
        both[0, TEMPERATURE] = 0.0  # nothing is drawn: the greatest logit is taken
        device_params = self._slots.upload(both)
        is_biased = options.prompt_mode == "sampled" and bool(sampling.logit_bias)
        truncated = options.prompt_mode == "sampled" and bool(self._slots.is_truncated[slot])
        step = min(self._max_rows, len(self._copies)) if is_biased else self._max_rows
        parts = []
        for first in range(0, len(logits_MV), step):
            logits = logits_MV[first : first + step]
            if logits.data_ptr() % 16:
                logits = logits.clone()  # kernels are compiled for aligned rows
            processed = self._biased(logits, slot) if is_biased else None
            zeros, tokens, logprobs = (t[: len(logits)] for t in (self._zeros, self._own_tokens, self._own_logprobs))
            rows = self.sample(
                logits, zeros, zeros, tokens, logprobs, processed, truncated=truncated, scored_params=device_params
            )
            targets = targets_M[first : first + step].to(torch.int32)
            parts.append(to_host(self._read(rows, self._slots.asked_ids[slot : slot + 1], columns, targets)))
        return PendingScores(parts, columns)

    def warm(self) -> None:
        """Compile every kernel that a later call can need, over rows that are all skipped."""
        logits = torch.zeros(1, self.vocab_size, dtype=torch.float32, device=self._device)
        slots, positions, tokens = (torch.full((1,), -1, dtype=torch.int32, device=self._device) for _ in range(3))
        logprobs = torch.zeros(1, dtype=torch.float32, device=self._device)
        self.write_slots(torch.full((1, RECORD_SIZE), -1, dtype=torch.int32, device=self._device))
        processed = ProcessedRows(self._copies, self._slots.upload(np.full(1, SKIPPED, np.int32)))
        tables = self._slots.processors, self._slots.counts
        for scoring in (False, True):
            process_rows(logits, processed, slots, positions, *tables, scoring=scoring)
        masks = torch.zeros(1, -(-self.vocab_size // 32), dtype=torch.int32, device=self._device)
        mask_rows(processed, tokens + 1, masks)
        for truncated, copies in ((False, None), (True, None), (True, processed)):
            rows = self.sample(logits, slots, positions, tokens, logprobs, copies, truncated=truncated)
        for size in LIST_SIZES:
            self._read(rows, self._slots.asked_ids, Columns(min(size, self.vocab_size), 1, 1), tokens)
        self._read(rows, self._slots.asked_ids, Columns(0, 0, num_kept_words=num_words(self.vocab_size)))
        count_tokens(tokens, slots, processed, *tables)
        self.leave_tokens(tokens, slots)
        self._slots.warm()

    def _biased(self, logits_MV: Tensor, slot: int) -> ProcessedRows:
        num_rows = len(logits_MV)
        slots = torch.full((num_rows,), slot, dtype=torch.int32, device=self._device)
        processed = ProcessedRows(self._copies, self._range[:num_rows])
        tables = self._slots.processors, self._slots.counts
        process_rows(logits_MV, processed, slots, self._zeros[:num_rows], *tables, scoring=True)
        return processed

    def _rounds(self, is_processed: npt.NDArray[np.bool_], num_rows: int) -> Iterator[ProcessedRows]:
        """As many rounds as the room for copies asks for; rows without a copy go with the first."""
        processed, room = np.flatnonzero(is_processed), len(self._copies)
        starts = range(0, len(processed), room)
        copy_of = np.full((len(starts), num_rows), SKIPPED, np.int32)
        copy_of[0] = NO_COPY
        copy_of[0, processed] = SKIPPED
        for each, start in zip(copy_of, starts, strict=True):
            chosen = processed[start : start + room]
            each[chosen] = np.arange(len(chosen))
        for each_S in self._slots.upload(copy_of):
            yield ProcessedRows(self._copies, each_S)

    def _columns_of(self, slots: Integers) -> Columns:
        if len(slots) == 0:
            return Columns(0, 0)
        kept_words = num_words(self.vocab_size) if self._slots.wants_kept[slots].any() else 0
        num_top, num_asked = int(self._slots.num_top[slots].max()), int(self._slots.num_asked[slots].max())
        return Columns(num_top, num_asked, num_kept_words=kept_words)

    def _read(self, rows: SampledRows, asked_ids: Tensor, columns: Columns, own: Tensor | None = None) -> Tensor:
        """Write what `columns` has room for to the results [S, columns.size]: log-probabilities of top, asked and own
        ids, and the bits of kept ones."""
        num_rows = len(rows.slots_S)
        results = self._results[: num_rows * columns.size].view(num_rows, columns.size)
        if columns.num_top:
            top_rows(rows, results, columns.num_top)
        if columns.num_asked:
            asked_rows(rows, asked_ids, results, columns.first_asked, columns.num_asked)
        if own is not None:
            asked_rows(rows, own, results, columns.first_own, 1)
        if columns.num_kept_words:
            kept_rows(rows, results, columns.first_kept)
        return results

    def _pending_extras(self, slots: Integers, columns: Columns) -> PendingExtras | None:
        rows = np.flatnonzero(self._slots.want_extras(slots))
        if len(rows) == 0:
            return None
        results = self._results[: len(slots) * columns.size].view(len(slots), columns.size)
        counts = self._slots.num_top[slots[rows]], self._slots.num_asked[slots[rows]]
        return PendingExtras(to_host(results), columns, rows, *counts, self._slots.wants_kept[slots[rows]])
