"""Tokens and log-probabilities from logits. Owns the sampler: slots in, one token per row out.

What a log-probability means is written once, here (natural logarithm, reduced in float32 and float64):

    raw           log_softmax(logits) of the model
    temperature   log_softmax(logits / T), T the request's; for T = 0 it is defined as raw
    sampled       of the distribution the token was drawn from: after bias, mask, penalties, temperature, top-k, top-p
                  and min-p, renormalised. For T = 0 that is all on one token: 0 for it, -inf for every other

A row of logits that is not finite (NaN or +inf anywhere, or all -inf) gives some token and NaN for its log-probability,
in every mode and on every path: that is how the engine knows of it.

Rows never meet: a row's token and numbers are a pure function of its logits, its slot and its position, whatever runs
beside it, in either setting of `numerics`. Must not know plans, grammars or text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from headrace.sampling.distribution import Distribution
from headrace.sampling.noise import Float64Array, noise_keys
from headrace.sampling.row_pass import Int64Array, RowPass
from headrace.sampling.slot_state import RAW, SAMPLED, SamplingSlots
from headrace.types.plan import PositionLogprobs, SamplePatch
from headrace.types.request import Float32Array

_COPIED_ELEMENTS = 1 << 21
"""Logits copied at once for rows that are processed."""


class Sampled(NamedTuple):
    """token_ids int64 [s]; logprobs float32 [s], in each slot's output mode; extras by row, one position each."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    extras: dict[int, PositionLogprobs]


class _Batch(NamedTuple):
    """One call's rows: logits [s, V], and by row [s] its slot, position, temperature (0 is greedy) and output mode."""

    logits: Float32Array
    slots: Int64Array
    positions: Int64Array
    temperatures: Float64Array
    modes: npt.NDArray[np.int8]


class _Rows(NamedTuple):
    """Rows of the batch [n] and what they are drawn from: logits[at], the batch's own or processed copies."""

    rows: Int64Array
    logits: Float32Array
    at: Int64Array
    is_processed: bool


class _Picked(NamedTuple):
    """Rows of the batch [n], their tokens [n], and what those were drawn from; a greedy one's is softmax at T = 1."""

    rows: Int64Array
    token_ids: Int64Array
    source: Distribution
    is_processed: bool
    is_greedy: bool


class Sampler:
    """Samples from logits of `vocab_size` tokens for sequences in slots 0..max_slots-1.

    Logits on a device are read back to the CPU; what it gives is there.
    """

    def __init__(self, vocab_size: int, max_slots: int) -> None:
        self.vocab_size = vocab_size
        self._slots = SamplingSlots(vocab_size, max_slots)
        self.enter = self._slots.enter
        """Show it the sequence that takes a slot."""
        self._pass = RowPass(vocab_size, torch.get_num_threads())
        num_copies = min(max_slots, max(1, _COPIED_ELEMENTS // vocab_size))
        self._copies = np.empty((num_copies, vocab_size), np.float32)  # held: fresh memory costs more than the copy

    def sample(
        self, logits_SV: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, patch: SamplePatch | None = None
    ) -> Sampled:
        """Sample one token per row and count it where penalties act; `patch` is of these rows.

        logits_SV   float32 [s, V], of any s >= 0; not changed
        slots       int64 [s], distinct
        positions   int64 [s], the absolute positions of the new tokens
        """
        indices: Int64Array = slots.detach().cpu().numpy()
        batch = _Batch(
            logits=logits_SV.detach().cpu().numpy(),
            slots=indices,
            positions=positions.detach().cpu().numpy(),
            temperatures=self._slots.temperatures[indices],
            modes=self._slots.output_modes[indices],
        )
        token_ids = np.empty(len(batch.slots), np.int64)
        logprobs = np.empty(len(batch.slots), np.float32)
        extras: dict[int, PositionLogprobs] = {}
        for picked in self._pick(batch, patch):
            token_ids[picked.rows] = picked.token_ids
            for chosen, distribution in self._output_distributions(batch, picked):
                rows = picked.rows[chosen]
                logprobs[rows] = distribution.logprobs(picked.token_ids[chosen])
                for index in np.flatnonzero(self._slots.wants_extras[batch.slots[rows]]).tolist():
                    options = self._slots.init_of(int(batch.slots[rows[index]])).logprobs
                    extra = distribution.take(np.array([index])).extras(options)
                    extras[int(rows[index])] = (
                        _with_kept(extra, picked, int(chosen[index])) if options.max_kept else extra
                    )
        if self._slots.seen:
            self._slots.add_tokens(batch.slots.tolist(), token_ids.tolist())
        return Sampled(torch.from_numpy(token_ids), torch.from_numpy(logprobs), extras)

    def score(
        self, logits_MV: torch.Tensor, targets_M: torch.Tensor, slot: int
    ) -> tuple[torch.Tensor, PositionLogprobs | None]:
        """Log-probabilities of prompt tokens in the slot's prompt mode: float32 [m], and what else the slot asked for.

        logits_MV   float32 [m, V], m >= 1; row i predicts targets_M[i] (int64)

        In mode "sampled" the distribution is the one the sampler would draw from, but for penalties and the mask of
        stop ids, which depend on the output.
        """
        logits: Float32Array = logits_MV.detach().cpu().numpy()
        options = self._slots.init_of(slot).logprobs
        temperature = float(self._slots.temperatures[slot])
        is_sampled = options.prompt_mode == "sampled"
        if is_sampled:
            logits = logits.copy()
            for row in logits:
                self._slots.process_scored_row(row, slot)
        divisor = temperature if temperature and options.prompt_mode != "raw" else 1.0
        distribution = Distribution.of(logits, np.arange(len(logits)), np.full(len(logits), divisor), self._pass)
        if is_sampled and not temperature:
            reduced = distribution.reduced
            distribution = Distribution.point(reduced.argmax, self.vocab_size, reduced.log_sums)
        values = distribution.logprobs(targets_M.detach().cpu().numpy())
        return torch.from_numpy(values), distribution.extras(options) if options.wants_extras else None

    def _pick(self, batch: _Batch, patch: SamplePatch | None) -> Iterator[_Picked]:
        """A token for every row: the greatest logit where T = 0, Gumbel-max elsewhere."""
        for rows, logits, at, is_processed in self._processed(batch, patch):
            temperatures = batch.temperatures[rows]
            greedy, drawn = np.flatnonzero(temperatures == 0.0), np.flatnonzero(temperatures)
            if len(greedy):
                source = Distribution.of(logits, at[greedy], np.ones(len(greedy)), self._pass)
                yield _Picked(rows[greedy], source.reduced.argmax, source, is_processed, is_greedy=True)
            if len(drawn):
                rows, at, temperatures = rows[drawn], at[drawn], temperatures[drawn]
                keys = noise_keys(self._slots.seeds[batch.slots[rows]], batch.positions[rows])
                token_ids, reduced = self._pass.draw(logits, at, temperatures, keys)
                source = Distribution(logits, at, temperatures, reduced)
                yield _Picked(rows, token_ids, source, is_processed, is_greedy=False)

    def _processed(self, batch: _Batch, patch: SamplePatch | None) -> Iterator[_Rows]:
        """Every row: the plain ones straight from the batch's logits, the others from copies, a few at a time."""
        is_processed = self._slots.is_processed[batch.slots] | (batch.positions < self._slots.min_lengths[batch.slots])
        if patch is not None:
            is_processed[patch.rows] = True
        plain = np.flatnonzero(~is_processed)
        yield _Rows(plain, batch.logits, plain, is_processed=False)
        processed = np.flatnonzero(is_processed)
        for start in range(0, len(processed), len(self._copies)):
            rows = processed[start : start + len(self._copies)]
            logits = np.take(batch.logits, rows, axis=0, out=self._copies[: len(rows)])
            if patch is not None:
                _apply_masks(logits, rows, patch)
            for row, values in zip(rows.tolist(), logits, strict=True):
                self._slots.process_row(values, int(batch.slots[row]), int(batch.positions[row]))
            yield _Rows(rows, logits, np.arange(len(rows)), is_processed=True)

    def _output_distributions(self, batch: _Batch, picked: _Picked) -> Iterator[tuple[Int64Array, Distribution]]:
        """Indices into `picked` and the distributions their log-probabilities are of, by each slot's output mode."""
        modes = batch.modes[picked.rows]
        is_sampled = modes == SAMPLED
        is_point = is_sampled & picked.is_greedy
        if picked.is_processed:
            is_source = is_sampled & ~is_point
        else:  # plain: the source is the model's own distribution, at T
            is_source = ~is_point & ((modes != RAW) | (picked.source.divisors == 1.0))
        if is_source.all():
            yield np.arange(len(modes)), picked.source
            return
        if is_source.any():
            chosen = np.flatnonzero(is_source)
            yield chosen, picked.source.take(chosen)
        if is_point.any():
            chosen = np.flatnonzero(is_point)
            log_sums = picked.source.reduced.log_sums[chosen]
            yield chosen, Distribution.point(picked.token_ids[chosen], self.vocab_size, log_sums)
        chosen = np.flatnonzero(~(is_source | is_point))
        if len(chosen):
            divisors = np.where(modes[chosen] == RAW, 1.0, picked.source.divisors[chosen])
            yield chosen, Distribution.of(batch.logits, picked.rows[chosen], divisors, self._pass)


def _with_kept(extra: PositionLogprobs, picked: _Picked, index: int) -> PositionLogprobs:
    """With the ids that this row's token could have been."""
    row = picked.source.logits[picked.source.rows[index]]
    kept = picked.token_ids[index : index + 1] if picked.is_greedy else np.flatnonzero(row > -np.inf)
    counts = np.array([len(kept)], np.int32)
    return msgspec.structs.replace(extra, kept_ids=kept.astype(np.int32), kept_counts=counts)


def _apply_masks(logits: Float32Array, rows: Int64Array, patch: SamplePatch) -> None:
    """Take what a patch forbids from copies of these rows. What is not finite stays in sight."""
    for index, row in enumerate(rows.tolist()):
        for mask in patch.masks[patch.rows == row]:
            is_allowed = np.unpackbits(mask.view(np.uint8), count=logits.shape[1], bitorder="little")
            logits[index][(is_allowed == 0) & (logits[index] < np.inf)] = -np.inf
