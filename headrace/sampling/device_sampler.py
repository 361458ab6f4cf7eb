"""Tokens and log-probabilities from logits that stay on a device, with `headrace.sampling.sampler`'s meaning of both.

Owns the order of launches and their workspaces. Steps of rows that want nothing beside their tokens are pure launches
that may be captured, whatever acts on their logits; rows that want further log-probabilities, and steps with masks of
allowed tokens, are enqueued eagerly. Any mixture goes at once:

    process      rows that logits processors act on are copied and drawn from their copies; rows with top-p are surveyed
    thresholds   top-k, top-p and min-p
    sample       one pass over the logits, which also leaves each row's normaliser, and counts the tokens where
                 penalties act: on the device, as the host does not know them yet
    top, asked   further log-probabilities, from what that pass left
    kept         which tokens could have been drawn, by the same thresholds

Nothing waits for the device, and after `warm` nothing compiles. Must not know plans. Legend: S rows, V vocabulary,
M prompt positions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.config.shares import ALIGNED_COLUMNS, vocabulary_rows
from headrace.kernels.triton.kept_rows import kept_rows, num_words
from headrace.kernels.triton.last_tokens import LastTokens, leave_tokens
from headrace.kernels.triton.logits_processors import AllowedTokens, ProcessedRows, SlotProcessors, process_rows
from headrace.kernels.triton.row_survey import BLOCK, RowSurvey
from headrace.kernels.triton.sampling_rows import (
    SamplingWorkspace,
    VocabularyShare,
    reduce_rows,
    sample_rows,
    walk_rows,
)
from headrace.kernels.triton.slot_params import (
    NUM_ASKED,
    NUM_TOP,
    PROCESSED,
    PROCESSORS,
    RECORD_SIZE,
    TEMPERATURE,
    UNPROCESSED,
    write_records,
)
from headrace.kernels.triton.threshold_search import ThresholdWorkspace, find_thresholds
from headrace.kernels.triton.top_rows import LIST_SIZES, SampledRows, asked_rows, top_rows
from headrace.sampling.device_results import Columns, PendingExtras, PendingScores, to_host
from headrace.sampling.device_slots import DeviceSlots, slot_params
from headrace.types.plan import SamplePatch, SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS, LogprobOptions

__all__ = ["RECORD_SIZE", "DeviceSampler", "PendingExtras", "PendingScores"]

Integers = npt.NDArray[np.integer]
SamplingPath = Literal["plain", "full", "eager"]


class DeviceSampler:
    """Samples from logits of `vocab_size` tokens for sequences in slots 0..max_slots-1, up to `max_rows` at once.

    slot_params   float32 [max_slots, NUM_PARAMS] and slot_seeds int32 [max_slots, 2], written by `write_slots`
    last_tokens   int32 [max_slots], the token each slot sampled last

    All memory is allocated here, room for copies of processed rows among it, which is as large as a step's logits; but
    for what carries results of single steps to the host.
    """

    def __init__(self, vocab_size: int, max_slots: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._slots = DeviceSlots(vocab_size, max_slots, device)
        self.slot_params = self._slots.params
        self.slot_seeds = self._slots.seeds
        self.last_tokens = self._slots.last_tokens
        self._tables = SlotProcessors(self._slots.processors, self._slots.counts)
        self._last = LastTokens(self.last_tokens, self._tables)
        self._workspace = SamplingWorkspace.make(max_rows, vocab_size, device)
        self._processed = ProcessedRows.make(max_rows, vocab_size, device)
        self._survey = RowSurvey.make(max_rows, vocab_size, device)
        self._search = ThresholdWorkspace.make(max_rows, vocab_size, device)
        self._thresholds = torch.empty(max_rows, dtype=torch.float32, device=device)
        most = Columns(min(MAX_TOP_LOGPROBS, vocab_size), MAX_LOGPROB_TOKEN_IDS, 1, num_words(vocab_size))
        self._results = torch.empty(max_rows * most.size, dtype=torch.int32, device=device)
        # Prompt scores: every position reads row 0 of its own parameters, thresholds read row 1.
        self._zeros, self._ones = (torch.full((max_rows,), n, dtype=torch.int32, device=device) for n in (0, 1))
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

        plain       `sample` with plain=True: only temperatures act
        full        `sample` with plain=False
        eager       `sample_eager`
        """
        if self._slots.want_extras(slots).any():
            return "eager"
        return "plain" if self._are_plain(slots, positions) else "full"

    def sample(
        self,
        logits_SV: Tensor,
        slots_S: Tensor,
        positions_S: Tensor,
        tokens_S: Tensor,
        logprobs_S: Tensor,
        *,
        plain: bool,
        leaves: bool = True,
        allowed: AllowedTokens | None = None,
    ) -> SampledRows:
        """Sample one token per row. Pure launches: may be captured.

        logits_SV     float32, contiguous, S <= max_rows; not changed
        slots_S, positions_S   int32; a row whose slot is -1 is skipped; positions are those of the new tokens
        tokens_S, logprobs_S   int32 and float32, written
        plain         that nothing but temperatures acts on any row; else what acts is looked up on the device
        leaves        whether tokens also go to `last_tokens` and are counted; if not, `leave_tokens` is to be told
        allowed       masks of some rows; not of plain ones
        """
        processed, thresholds = None, None
        if not plain:
            processed = self._processed.first(len(logits_SV))
            process_rows(
                logits_SV, processed, self._survey, slots_S, positions_S, self.slot_params, self._tables, allowed
            )
            thresholds = self._thresholds_of(logits_SV, self.slot_params, slots_S, processed)
        last = self._last if leaves else None
        sample_rows(
            logits_SV, slots_S, positions_S, self.slot_params, self.slot_seeds, thresholds, self._workspace, tokens_S,
            logprobs_S, last, processed,
        )  # fmt: skip
        return SampledRows(logits_SV, slots_S, tokens_S, self.slot_params, thresholds, self._workspace, processed)

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
        reduce_rows(partial_NSBW, slots_S, self.slot_params, norms_R2, tokens_S, logprobs_S, self._last)

    def leave_tokens(self, tokens_S: Tensor, slots_S: Tensor) -> None:
        """What was sampled elsewhere is what these slots sampled last, but for slots of -1."""
        leave_tokens(tokens_S, slots_S, self.slot_params, self._last)

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
        allowed = None if patch is None else self._allowed(patch, len(slots_S))
        plain = allowed is None and self._are_plain(slots, positions)
        rows = self.sample(logits_SV, slots_S, positions_S, tokens_S, logprobs_S, plain=plain, allowed=allowed)
        self._read(rows, self._slots.asked_ids, columns)
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
        is_biased = options.prompt_mode == "sampled" and bool(sampling.logit_bias)
        params[PROCESSORS] = (PROCESSED if is_biased else UNPROCESSED).value
        plain = not is_biased and not (options.prompt_mode == "sampled" and self._slots.is_truncated[slot])
        both = np.stack((params, params))
        both[0, TEMPERATURE] = 0.0  # nothing is drawn: the greatest logit is taken
        device_params = self._slots.upload(both)
        parts = []
        for first in range(0, len(logits_MV), self._max_rows):
            logits = logits_MV[first : first + self._max_rows]
            if logits.data_ptr() % 16:
                logits = logits.clone()  # kernels are compiled for aligned rows
            rows = self._sample_scored(logits, device_params, slot, plain=plain)
            targets = targets_M[first : first + self._max_rows].to(torch.int32)
            parts.append(to_host(self._read(rows, self._slots.asked_ids[slot : slot + 1], columns, targets)))
        return PendingScores(parts, columns)

    def warm(self) -> None:
        """Compile every kernel that a later call can need, over rows that are all skipped."""
        logits = torch.zeros(1, self.vocab_size, dtype=torch.float32, device=self._device)
        slots, positions, tokens = (torch.full((1,), -1, dtype=torch.int32, device=self._device) for _ in range(3))
        logprobs = torch.zeros(1, dtype=torch.float32, device=self._device)
        self.write_slots(torch.full((1, RECORD_SIZE), -1, dtype=torch.int32, device=self._device))
        masks = torch.zeros(1, num_words(self.vocab_size), dtype=torch.int32, device=self._device)
        given = logits, slots, positions, tokens, logprobs
        rows = self.sample(*given, plain=True)
        for allowed in (None, AllowedTokens(masks, slots)):
            rows = self.sample(*given, plain=False, allowed=allowed)
        params = self._slots.upload(np.stack(2 * [slot_params(TokenSampling(), LogprobOptions(), "raw", 1)]))
        for plain in (True, False):
            self._sample_scored(logits, params, 0, plain=plain)
        for size in LIST_SIZES:
            self._read(rows, self._slots.asked_ids, Columns(min(size, self.vocab_size), 1, 1), tokens)
        self._read(rows, self._slots.asked_ids, Columns(0, 0, num_kept_words=num_words(self.vocab_size)))
        self.leave_tokens(tokens, slots)
        self._slots.warm()

    def _are_plain(self, slots: Integers, positions: Integers) -> bool:
        """Whether nothing but temperatures acts on any of these rows."""
        return not (self._slots.is_truncated[slots].any() or self._slots.are_processed(slots, positions).any())

    def _thresholds_of(self, logits_SV: Tensor, params: Tensor, slots_S: Tensor, processed: ProcessedRows) -> Tensor:
        """Of rows that were processed just now."""
        thresholds_S = self._thresholds[: len(slots_S)]
        find_thresholds(logits_SV, params, slots_S, processed, self._survey, self._search, thresholds_S)
        return thresholds_S

    def _sample_scored(self, logits_MV: Tensor, params: Tensor, slot: int, *, plain: bool) -> SampledRows:
        """The pass that prompt scores are read from: row 1 of `params` says what acts, row 0 the rest."""
        num_rows = len(logits_MV)
        zeros, ones, tokens, logprobs = (
            each[:num_rows] for each in (self._zeros, self._ones, self._own_tokens, self._own_logprobs)
        )
        processed, thresholds = None, None
        if not plain:
            processed = self._processed.first(num_rows)
            owners = torch.full_like(zeros, slot)
            process_rows(logits_MV, processed, self._survey, ones, zeros, params, self._tables, scored_S=owners)
            thresholds = self._thresholds_of(logits_MV, params, ones, processed)
        workspace = self._workspace
        sample_rows(
            logits_MV, zeros, zeros, params, self.slot_seeds, thresholds, workspace, tokens, logprobs, None, processed
        )
        return SampledRows(logits_MV, zeros, tokens, params, thresholds, workspace, processed)

    def _allowed(self, patch: SamplePatch, num_rows: int) -> AllowedTokens:
        """A patch on the device."""
        mask_of = np.full(num_rows, -1, np.int32)
        mask_of[patch.rows] = np.arange(len(patch.rows))
        return AllowedTokens(self._slots.upload(patch.masks), self._slots.upload(mask_of))

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
